"""Weights of Hugging Face's formats, in and out: LLaMA folders and PEFT's adapters."""

from models.hugging_face.llama import load_llama, save_llama

__all__ = ["load_llama", "save_llama"]
