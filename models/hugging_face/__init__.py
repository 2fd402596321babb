"""Weights in Hugging Face's formats, read and written: LLaMA, RoBERTa, BERT, PEFT's adapters."""

from models.hugging_face.llama import load_llama, save_llama
from models.hugging_face.roberta import load_roberta, save_roberta

__all__ = ["load_llama", "load_roberta", "save_llama", "save_roberta"]
