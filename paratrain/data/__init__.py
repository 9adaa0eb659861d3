"""What to train on, in which order, and how it reaches each rank.

    train, evaluation = build(cfg.data, cfg.seed)
    order = Order(len(train), cfg.data.global_batch, cfg.seed, cfg.data.shuffle)
    for step, batch in loader(train, order, start_step, rank, ranks, cfg.data.workers, cfg.seed): ...

A data set is any object with `__len__` and `__getitem__(i) -> (inputs, targets)`.
"""

from __future__ import annotations

from typing import Any

from paratrain.config import CustomData, Data, HFData, StdlibData, SyntheticData, TextData
from paratrain.data.loader import loader, map_style
from paratrain.data.order import Order
from paratrain.data.tokenizers import Tokenizer
from paratrain.errors import UserError

__all__ = ["Order", "Tokenizer", "build", "loader", "map_style", "tokenizer"]


def build(data: Data, seed: int) -> tuple[Any, Any | None]:
    """The data sets to train and to evaluate on, as the configuration describes them.

    Text is tokenized and cached the first time. Every process may call this at once: on each machine one builds, the others wait.

    Args:
        data: the `data` section of the configuration.
        seed: of the random tokens of `data=synthetic`; text is the same whatever the seed.

    Returns:
        (train, eval), map-style data sets of (inputs, targets) samples; eval is None where nothing is held out. Samples of
        language are int64 [seq_len] each, targets shifted by one and -100 where there is none.

    Raises:
        UserError: the data cannot be found, read or built, or is empty.
    """
    if isinstance(data, CustomData):
        return _custom(data)
    if isinstance(data, SyntheticData):
        return _synthetic(data, seed)
    assert isinstance(data, StdlibData | TextData | HFData), f"no source {data!r}"
    return _text(data)


def tokenizer(data: Data) -> Tokenizer | None:
    """The tokenizer of a text source, with `encode`, `decode`, `vocab_size` and `separator`; None for data that is not text.

    Raises:
        UserError: as `build`.
    """
    if not isinstance(data, StdlibData | TextData | HFData):
        return None
    from paratrain.data.tokens import prepare

    return prepare(data)[0]


def _custom(data: CustomData) -> tuple[Any, Any | None]:
    from paratrain.build import instantiate

    if data.train is None:
        raise UserError("data.train is required with data=custom: data.train._target_=my.module.dataset, a map-style data set")
    train = map_style(instantiate(data.train, "data.train"), "data.train")
    return train, None if data.eval is None else map_style(instantiate(data.eval, "data.eval"), "data.eval")


def _synthetic(data: SyntheticData, seed: int) -> tuple[Any, Any | None]:
    from paratrain.data.datasets import Synthetic

    train = Synthetic(data.samples, data.seq_len, data.vocab_size, seed)
    held_out = Synthetic(data.eval_samples, data.seq_len, data.vocab_size, ~seed)
    return train, held_out if data.eval_samples else None


def _text(data: StdlibData | TextData | HFData) -> tuple[Any, Any | None]:
    from paratrain.data.datasets import Packed
    from paratrain.data.tokens import prepare

    tokens, files = prepare(data)
    where = f"data={data.source}"
    if "train" not in files:
        raise UserError(f"{where}: there is no text to train on: every document is empty")
    train = Packed(files["train"], data.seq_len, tokens.separator)
    if train.file.length <= data.seq_len:
        raise UserError(
            f"{where}: the text is too short: {train.file.length} tokens to train on, but one sample of data.seq_len={data.seq_len} "
            f"takes {data.seq_len + 1}. Use more text or a smaller data.seq_len"
        )
    wants_eval = data.eval_fraction > 0 or getattr(data, "eval_split", None)
    if not wants_eval:
        return train, None
    if "eval" not in files or files["eval"].length < 2:
        raise UserError(
            f"{where}: data.eval_fraction={data.eval_fraction} holds out no text, so little is there: "
            "use more text, a larger fraction, or data.eval_fraction=0 to train without evaluation"
        )
    return train, Packed(files["eval"], data.seq_len, tokens.separator)
