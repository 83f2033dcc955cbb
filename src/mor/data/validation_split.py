"""`ValidationSplit`: which documents are held out for validation.

A document is held out if the hash of its name and the seed, as a number in [0, 1), is below the
fraction: the choice does not depend on the other documents, nor on their order.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mor.data.sources import Document


class ValidationSplit:
    """Counts the documents in a first pass (`survey`), tells each one's split in a second."""

    def __init__(self, fraction: float, seed: int) -> None:
        """Args:
        fraction: share of the documents to hold out whose source names no split.
        seed: of the choice.
        """
        self.num_documents = 0
        self.num_empty = 0
        self._fraction = fraction
        self._seed = seed
        # Score and number of two documents: that of the lowest score is held out and that of the
        # highest is trained on, whatever the fraction, so that neither split is empty.
        self._lowest: tuple[float, int] = (2.0, -1)
        self._highest: tuple[float, int] = (-1.0, -1)

    def survey(self, documents: Iterable[Document]) -> Iterator[str]:
        """Count all documents; yield the texts that a tokenizer may learn from.

        Those of sources that are held out as a whole are counted only. Documents without text are
        counted in `num_empty`, and have no number.
        """
        for document in documents:
            if not document.text:
                self.num_empty += 1
                continue
            score = self._score(document)
            if score < self._lowest[0]:
                self._lowest = (score, self.num_documents)
            if score >= self._highest[0]:
                self._highest = (score, self.num_documents)
            self.num_documents += 1
            if document.split != "valid":
                yield document.text

    def state(self) -> dict[str, Any]:
        """What the survey has found, as plain data for `restore`; its keys are in the journal."""
        return {
            "documents": self.num_documents,
            "empty": self.num_empty,
            "lowest": self._lowest,
            "highest": self._highest,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what an earlier survey has found."""
        self.num_documents, self.num_empty = state["documents"], state["empty"]
        self._lowest, self._highest = tuple(state["lowest"]), tuple(state["highest"])

    def split_of(self, number: int, document: Document) -> str:
        """`train` or `valid`.

        Args:
            number: of the document, counting those with text from 0.
        """
        if document.split is not None:
            return document.split
        if self._fraction == 0 or number == self._highest[1]:
            return "train"
        held_out = number == self._lowest[1] or self._score(document) < self._fraction
        return "valid" if held_out else "train"

    def _score(self, document: Document) -> float:
        """Uniform in [0, 1), and a function of the seed and the document's name."""
        # File names that are not Unicode hold lone surrogates.
        name = f"{self._seed}:{document.name}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest()) / 2**48
