"""An encoder with the layers of BERT and RoBERTa. Imports `galore_optax` and `models.llama`."""

from models.encoder.config import EncoderConfig
from models.encoder.model import Encoder

__all__ = ["Encoder", "EncoderConfig"]
