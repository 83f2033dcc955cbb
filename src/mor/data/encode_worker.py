"""The worker process of `encoding`: it imports the tokenizers' library and no torch."""

import signal

import numpy as np
import numpy.typing as npt
import tokenizers


class _Worker:
    """The state of the process: its tokenizer, which `open_encoder` sets once."""

    backend: tokenizers.Tokenizer


def open_encoder(text: str) -> None:
    """Start the worker: open the tokenizer whose `tokenizer.json` holds `text`.

    Special tokens in texts are encoded as the text that they are, as `io.tokenizer` does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gave the work
    backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    _Worker.backend = backend


def encode(texts: list[str]) -> list[npt.NDArray[np.uint32]]:
    """The token ids of each text."""
    encodings = _Worker.backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]
