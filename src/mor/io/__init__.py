"""Models, tokenizers and foreign checkpoints on disk."""

from mor.io import checkpoint, gguf, hf_export, llama, tokenizer
from mor.io import reference_checkpoint as official

__all__ = ["checkpoint", "gguf", "hf_export", "llama", "official", "tokenizer"]
