"""What runs in a process that only encodes: it imports the tokenizers' library and no torch."""

import signal

import numpy as np
import numpy.typing as npt
import tokenizers


class _Kept:
    """What the process keeps between calls."""

    backend: tokenizers.Tokenizer


def open_encoder(text: str) -> None:
    """Take the tokenizer of this `tokenizer.json`, special tokens as text, as `io.tokenizer`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gave the work
    backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    _Kept.backend = backend


def encode(texts: list[str]) -> list[npt.NDArray[np.uint32]]:
    """The token ids of each text."""
    encodings = _Kept.backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]
