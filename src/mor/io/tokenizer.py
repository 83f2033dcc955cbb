"""Text to token ids and back, in Hugging Face's `tokenizer.json` format.

A tokenizer that mor trains (byte-level BPE) knows every byte, so any text survives the round trip
exactly. Special tokens are not recognized in text: a document that spells out `<|endoftext|>` is
encoded letter by letter, and the end-of-text id occurs only where a document ends.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mor.errors import ConfigError, DataError
from mor.io.atomic_files import storage_error, write_file

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and the end of text

# Files that are read and saved with a tokenizer: names of special tokens, chat template.
_COMPANIONS = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")

# Names of the end of text in the model families that we read; the first one present counts.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # how other vocabularies name a byte
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A `tokenizers.Tokenizer` that adds no special tokens and recognizes none in text."""

    def __init__(
        self, backend: tokenizers.Tokenizer, companions: Mapping[str, str] | None = None
    ) -> None:
        """Wrap `backend`, and switch off its truncation, padding and recognition of special tokens.

        Args:
            companions: texts of the files that are saved with it, by name.
        """
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        # A vocabulary of bytes has a letter for each of them; that of the blank is Ġ.
        is_bytes = backend.token_to_id("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}") is not None
        self._byte_values = _byte_values() if is_bytes else {}
        self._vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        self.sidecar_files = dict(companions or {})
        """Texts of the files that are saved with it, by name; one has the chat template."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE tokenizer learned from `texts`, the same for the same texts.

        Args:
            texts: read once, as a stream.
            vocab_size: number of entries; short texts give fewer. The first is the end of text
                (id 0), the next 256 are the bytes.

        Raises:
            ConfigError: `vocab_size` has no room for the bytes.
            DataError: a text is not valid Unicode.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size: {vocab_size} is too small: the end of text and 256 bytes need "
                f"at least {MIN_VOCAB_SIZE}."
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        try:
            backend.train_from_iterator(texts, trainer)
        except UnicodeEncodeError as error:
            raise DataError(f"a text is not valid Unicode: {error}.") from error
        return cls(backend)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """The tokenizer in `path`: a `tokenizer.json`, or a folder that holds one.

        Raises:
            DataError: it is missing, cannot be read or is no tokenizer.
        """
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER_FILE
        if not file.exists():
            raise DataError(
                f"{file}: there is no tokenizer here: give a {TOKENIZER_FILE} or a folder that "
                "holds one, or train one with `mor data build`."
            )
        try:
            companions = {
                name: (file.parent / name).read_text(encoding="utf-8")
                for name in _COMPANIONS
                if (file.parent / name).is_file()
            }
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
            tokenizer = cls(backend, companions)
        except Exception as error:  # the library raises a bare Exception for a damaged file
            raise DataError(
                f"{file}: not a readable tokenizer ({error}): copy it again from where it came, "
                "or train one with `mor data build`."
            ) from error
        if not tokenizer.vocab_size:
            raise DataError(f"{file}: the vocabulary is empty: train one with `mor data build`.")
        return tokenizer

    def save(self, path: Path | str) -> Path:
        """Write `path` if it is named `*.json`, else `path/tokenizer.json`; returns that file.

        Each file appears whole or not at all, the companions first.

        Raises:
            CapacityError: the disk is full.
            DataError: `path` cannot be written.
        """
        file = Path(path)
        if file.is_dir() or file.suffix != ".json":
            file = file / TOKENIZER_FILE
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            for name, text in self.sidecar_files.items():
                write_file(file.parent / name, text.encode("utf-8"))
            write_file(file, self.to_json().encode("utf-8"))
        except OSError as error:
            raise storage_error(file, error) from error
        return file

    def to_json(self) -> str:
        """The text of `tokenizer.json`."""
        return self._backend.to_str(pretty=True)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self._vocab_size

    @property
    def eos_id(self) -> int:
        """The id that ends a document.

        Raises:
            DataError: the vocabulary has no end-of-text token under a name that we know.
        """
        for name in _END_OF_TEXT_NAMES:
            token_id = self._backend.token_to_id(name)
            if token_id is not None:
                return token_id
        raise DataError(
            "the tokenizer has no end-of-text token: its vocabulary must hold one of "
            f"{', '.join(_END_OF_TEXT_NAMES)}."
        )

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, no special ones among them.

        Raises:
            DataError: `text` is not valid Unicode (a lone surrogate).
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, encoded on all cores.

        Raises:
            DataError: a text is not valid Unicode (a lone surrogate).
        """
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            _refuse_surrogates(texts)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelled out; broken UTF-8 becomes U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, which need not be whole characters; none for an unknown id."""
        name = self._backend.id_to_token(token_id)
        if name is None:
            return b""
        if self._byte_values and all(letter in self._byte_values for letter in name):
            return bytes(self._byte_values[letter] for letter in name)
        if _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(name[3:5])
        return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens, which `encode` never gives, by their text."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token: as many pieces as ids, which joined are `decode(ids)`.

        A token that ends inside a character has the piece "" and its text goes to the token that
        completes the character, or to the last one.
        """
        pieces: list[str] = []
        # Some decoders drop the blank before a first token. So tokens are decoded after those of
        # the piece before, ids[start:stop] with the text `known`, and the rest of the text counts.
        start = stop = 0
        known = ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[start:end])
            if text.endswith(_REPLACEMENT) and end < len(ids):
                pieces.append("")
                continue
            pieces.append(text[len(known) :])
            start, stop = stop, end
            known = self.decode(ids[start:stop])
        return pieces


def _byte_values() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table).

    Printable bytes are written as the character of that code, the others as U+0100, U+0101, ..
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"text {number} is not valid Unicode: {error}.") from error
