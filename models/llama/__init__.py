"""LLaMA: its configuration, the model and text generation. Imports `galore_optax`."""

from models.llama.axes import dimension_numbers
from models.llama.config import SIZES, LlamaConfig
from models.llama.model import Llama
from models.llama.rope import RopeScaling

__all__ = ["SIZES", "Llama", "LlamaConfig", "RopeScaling", "dimension_numbers"]
