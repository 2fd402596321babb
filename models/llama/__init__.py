"""LLaMA: its configuration, the model and text generation."""

from models.llama.config import SIZES, LlamaConfig
from models.llama.model import Llama, dimension_numbers

__all__ = ["SIZES", "Llama", "LlamaConfig", "dimension_numbers"]
