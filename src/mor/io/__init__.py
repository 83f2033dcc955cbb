"""Models, tokenizers and foreign checkpoints on disk.

In reading order:

    atomic_files          files and folders that appear whole or not at all
    tokenizer             Tokenizer: text to token ids and back
    detokenizer           the text of tokens as they come, and stop texts
    weights               safetensors and torch pickles, whole or in shards
    checkpoint            save and load a MoR model
    llama                 Llama checkpoints as vanilla or recursive models
    uptrain               a recursive model initialized from a vanilla one
    gguf                  Llama checkpoints in llama.cpp's format
    reference_checkpoint  checkpoints of the paper's own code
    model_card            README.md beside a model's weights
    hub                   upload to the Hugging Face hub
    hf_export             folders that transformers loads without mor
    hf                    the classes for transformers; `import mor.io.hf` registers them

`mor.io.hf` is not imported here: it needs transformers, which takes seconds to import.
"""

from mor.io import checkpoint, gguf, hf_export, llama, reference_checkpoint, tokenizer

__all__ = ["checkpoint", "gguf", "hf_export", "llama", "reference_checkpoint", "tokenizer"]
