"""Weights in Hugging Face's formats, read and written: LLaMA checkpoints and PEFT's adapters."""

from models.hugging_face.llama import load_llama, save_llama

__all__ = ["load_llama", "save_llama"]
