"""The way from text to batches: text, tokenizer, sequences, loader. Imports nothing of `train`."""
