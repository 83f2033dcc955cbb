"""Models, tokenizers and foreign checkpoints on disk."""

from mor.io import checkpoint, official, tokenizer

__all__ = ["checkpoint", "official", "tokenizer"]
