"""From text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paratrain.errors import UserError

END_OF_TEXT = "<|endoftext|>"
BPE_TRAINING_CHARACTERS = 50_000_000  # later text hardly changes the merges, and costs minutes


class Tokenizer(Protocol):
    """Text to token ids and back; `decode(encode(text)) == text`.

    Attributes:
        vocab_size: ids are below this.
        separator: the id that stands after every document.
    """

    vocab_size: int
    separator: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def encode_many(self, texts: list[str]) -> list[np.ndarray]: ...


class Byte:
    """The bytes of UTF-8; byte 0, which text does not contain, separates documents."""

    vocab_size = 256
    separator = 0

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(_utf8(text), np.uint8) for text in texts]


class BPE:
    """Byte-level byte-pair encoding (Sennrich et al., 2016; Radford et al., 2019), by the package `tokenizers`.

    Id 0 separates documents. A text that spells the separator's name is encoded as any other text.
    """

    separator = 0

    def __init__(self, model: Any, vocab_size: int):
        self.model = model
        self.model.encode_special_tokens = True
        self.vocab_size = vocab_size

    @classmethod
    def load(cls, file: Path, vocab_size: int) -> BPE:
        """Read what `save` wrote; ValueError where the file is damaged."""
        package = _package()
        try:
            return cls(package.Tokenizer.from_file(str(file)), vocab_size)
        except Exception as error:  # the package raises no subclass
            raise ValueError(f"{file} holds no tokenizer: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPE:
        """Learn the merges from the first 50 million characters of `texts`; little text may fill less than `vocab_size` ids."""
        package = _package()
        model = package.Tokenizer(package.models.BPE())
        model.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(_first(texts, BPE_TRAINING_CHARACTERS), trainer)
        return cls(model, vocab_size)

    def save(self, file: Path) -> None:
        self.model.save(str(file))

    def encode(self, text: str) -> list[int]:
        return self.model.encode(_utf8(text).decode()).ids

    def decode(self, tokens: list[int]) -> str:
        return self.model.decode(tokens, skip_special_tokens=False)

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, np.uint32) for encoding in self.model.encode_batch_fast([_utf8(text).decode() for text in texts])]


def _utf8(text: str) -> bytes:
    """JSON can hold halves of surrogate pairs, which no encoding can."""
    return text.encode(errors="replace")


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield _utf8(text[:characters]).decode()
        characters -= len(text)
        if characters <= 0:
            return


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("data.tokenizer=bpe needs the package `tokenizers`: pip install tokenizers, or use data.tokenizer=byte") from error
    return tokenizers
