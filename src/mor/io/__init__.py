"""Models, tokenizers and foreign checkpoints on disk."""

from mor.io import checkpoint, gguf, llama, official, tokenizer

__all__ = ["checkpoint", "gguf", "llama", "official", "tokenizer"]
