"""Models, tokenizers and foreign checkpoints on disk."""

from mor.io import checkpoint, gguf, hf, llama, official, tokenizer

__all__ = ["checkpoint", "gguf", "hf", "llama", "official", "tokenizer"]
