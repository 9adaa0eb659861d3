"""Batches as people bring them: what belongs to a sample goes with it, whatever holds it, or is refused by name."""

from __future__ import annotations

import itertools
from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import practice
import pytest
import torch
from practice import assert_exact, assert_refused, assert_same
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import paratrain as pt
from paratrain import batch as batches
from paratrain.errors import UserError
from paratrain.spawn import run

F64 = torch.float64


def rows(n=8, width=6, steps=3):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    return [(draw(n, width) + torch.arange(n)[:, None] * 0.3, draw(n, 1)) for _ in range(steps)]


def square(outputs, targets):
    return (outputs - targets).square().sum(), targets.numel()


class Net(nn.Module):
    """A linear map, four blocks, and a head, each sample with a scale of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def run(self, x, scale):
        h = self.inner(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h) * scale.reshape(-1, 1)


@dataclass
class Scaled:
    x: torch.Tensor
    extra: dict


Pair = namedtuple("Pair", "x scale")


class Ragged:
    """A sequence of rows that can be sliced, of no kind that anybody knows."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, key):
        return Ragged(self.values[key]) if isinstance(key, slice) else self.values[key]


WORDS = ["cat", "dog", "cow", "ape", "dog", "dog", "cat", "cow"]
SCALE = [0.1 * k + 1 for k in range(8)]


class TakesDataclass(Net):
    def forward(self, batch):
        return self.run(batch.x, batch.extra["scale"])


class TakesPair(Net):
    def forward(self, pair, scale=None):
        return self.run(pair.x, pair.scale)


class TakesNames(Net):
    def forward(self, x, names, weights):
        assert len(x) == len(names) == len(weights)
        return self.run(x, torch.tensor([WORDS.index(name) + weight for name, weight in zip(names, weights, strict=True)], dtype=F64))


class TakesImages(Net):
    """Samples of different sizes: a list with a tensor a sample."""

    def forward(self, images):
        return self.run(torch.stack([image.mean(0) for image in images]), torch.tensor([1.0 + len(image) for image in images], dtype=F64))


class TakesNamed(Net):
    def forward(self, x, scale):
        return self.run(x, scale)


class TakesJagged(Net):
    def forward(self, values, other):
        means = torch.stack([row.mean(0) for row in (values * other).unbind()])
        return self.run(means, torch.ones(len(means), dtype=F64))


class TakesSparse(Net):
    def forward(self, x):
        return self.run(torch.sparse.mm(x, torch.eye(6, dtype=F64)), torch.ones(x.shape[0], dtype=F64))


class TakesPacked(Net):
    def forward(self, packed):
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        return self.run(padded.sum(1), lengths.to(F64))


class TakesShared(Net):
    def forward(self, x, mixing):
        assert mixing.shape == (6, 6)
        return self.run(x @ mixing, torch.ones(len(x), dtype=F64))


def images(x):
    return [row.expand(1 + k % 3, 6) * torch.arange(1, 2 + k % 3)[:, None] for k, row in enumerate(x)]


def jagged(x):
    values = torch.nested.nested_tensor(images(x), layout=torch.jagged)
    return values, torch.nested.nested_tensor_from_jagged(values.values().cos(), values.offsets())


def boxes(x):
    return [{"boxes": row.expand(1 + k % 3, 6), "label": k} for k, row in enumerate(x)]


def box_loss(outputs, targets):
    assert len(outputs) == len(targets)
    return sum((out - target["boxes"].sum() - target["label"]).square().sum() for out, target in zip(outputs, targets, strict=True)), len(
        targets
    )


KINDS = {
    "dataclass": (TakesDataclass, lambda x, y: (Scaled(x, {"scale": torch.tensor(SCALE)}), y)),
    "named tuple in a tuple": (TakesPair, lambda x, y: ((Pair(x, torch.tensor(SCALE)),), y)),
    "strings and an array": (TakesNames, lambda x, y: ((x, WORDS, np.array(SCALE)), y)),
    "a tuple of strings and numbers": (TakesNames, lambda x, y: ((x, tuple(WORDS), SCALE), y)),
    "a tensor a sample": (TakesImages, lambda x, y: ((images(x),), y)),
    "UserDict": (TakesNamed, lambda x, y: (UserDict(x=x, scale=torch.tensor(SCALE)), y)),
    "jagged": (TakesJagged, lambda x, y: (jagged(x), y)),
    "sparse": (TakesSparse, lambda x, y: (x.clamp(min=0).to_sparse(), y)),
    "sparse rows": (TakesSparse, lambda x, y: (x.clamp(min=0).to_sparse_csr(), y)),
    "packed": (TakesPacked, lambda x, y: ((pack_sequence(images(x), enforce_sorted=False),), y)),
}


def by_hand(model, inputs, targets, loss=square):
    if isinstance(inputs, UserDict):
        return loss(model(**inputs), targets)[0] / len(targets)
    total, count = loss(practice.call(model, inputs), targets)
    return total / count


@pytest.mark.parametrize("kind", KINDS)
def test_samples_go_with_what_belongs_to_them(kind):
    model, make = KINDS[kind]
    assert_exact(model, [make(*batch) for batch in rows()], square, "ddp", mean=by_hand)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_under_every_layout(kind):
    model, make = KINDS[kind]
    layouts = ["single", "ddpm", "z1m", "fsdp", "fsdpm"]
    assert_exact(model, [make(*batch) for batch in rows()], square, *layouts, mean=by_hand)
    assert_exact(model, [make(*batch) for batch in rows()], square, "ddpm", mean=by_hand, ranks=3)


def test_targets_of_different_sizes():
    data = [((images(x),), boxes(x)) for x, _ in rows()]
    assert_exact(TakesImages, data, box_loss, "ddp", "fsdpm", mean=lambda m, i, t: by_hand(m, i, t, box_loss))


def test_hugging_face_encodings():
    encoding = pytest.importorskip("transformers").BatchEncoding
    assert_exact(TakesNamed, [(encoding({"x": x, "scale": torch.tensor(SCALE)}), y) for x, y in rows()], square, "ddpm", mean=by_hand)


def test_what_all_samples_share_is_declared():
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=F64)
    data = [((x, mixing), y) for x, y in rows()]
    assert_refused(TakesShared, data, square, "ddp", says="paratrain.Shared(...)")
    expected = practice.plain(TakesShared, data, square)
    shared = [((x, pt.Shared(mixing)), y) for x, y in rows()]
    for layout in ("ddpm", "fsdp"):
        results = run(lambda layout=layout: practice.ours(TakesShared, shared, square, practice.LAYOUTS[layout]), 2)
        assert_same(results[0], expected, what=layout)
    assert_same(practice.ours(TakesShared, shared, square, ["strategy=single"]), expected)


def test_shares_of_ones_own_may_differ_in_size():
    class Tiny(Net):
        def forward(self, x):
            return self.run(x, torch.ones(len(x), dtype=F64))

    data = rows()
    expected = practice.plain(Tiny, data, square)

    def body(layout):
        part = slice(0, 5) if torch.distributed.get_rank() == 0 else slice(5, 8)
        engine = pt.setup(Tiny, square, pt.load_config([*practice.BASE, *layout, "data.micro_batch_size=1"]))
        steps = [engine.train_step((x[part], y[part])) for x, y in data]
        return practice.Trained([s.loss for s in steps], [s.grad_norm for s in steps], engine.full_state_dict())

    for strategy in ("fsdp", "ddp"):
        results = run(lambda strategy=strategy: body([f"strategy={strategy}"]), 2)
        assert_same(results[0], expected, what=strategy)


def dealt(inputs, targets, ranks=2, micro=None):
    """The micro-batches of every rank, those of one sample that weigh nothing left out."""
    shares = [batches.local((inputs, targets), rank, ranks) for rank in range(ranks)]
    return [part[:2] for share in shares for part in batches.split(share, micro) if part[2]]


def test_the_number_of_samples_decides_once_for_the_whole_batch():
    """Of eight samples, four here and two at once: four and two things that all samples use are still what all use."""
    x, y = rows()[0]
    constants = [np.arange(4), ["a", "b"], (224, 224)]
    for inputs, _ in dealt((x, WORDS, *constants), y, micro=2):
        assert len(inputs[0]) == len(inputs[1]) == 2
        assert inputs[2].tolist() == [0, 1, 2, 3]
        assert inputs[3:] == (["a", "b"], (224, 224))
    parts = dealt((x, Ragged(WORDS), range(8)), y)
    assert [part[0][1].values for part in parts] == [WORDS[:4], WORDS[4:]]
    assert [list(part[0][2]) for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_lists_of_tensors_that_count_samples_are_arguments():
    x, y = rows()[0]
    parts = dealt({"features": [x, 2 * x]}, y, micro=2)
    assert torch.equal(torch.cat([part[0]["features"][1] for part in parts]), 2 * x)


class Graph:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (lambda x: (x, [name for name in WORDS for _ in range(2)]), "which may be 2 a sample"),
        (lambda x: (x, Graph(x)), "the batch holds a Graph, whose samples cannot be dealt to ranks"),
        (lambda x: (x, torch.eye(3)), r"disagree about the number of samples \(sizes of dim 0: \[3, 8\]\).*paratrain.Shared"),
        (lambda x: (x, torch.eye(8).to_sparse_bsr((2, 2))), "a tensor of layout torch.sparse_bsr"),
    ],
)
def test_what_cannot_be_dealt_is_refused(inputs, says):
    x, y = rows()[0]
    with pytest.raises(UserError, match=says):
        dealt(inputs(x), y)


def test_lists_that_do_not_say_how_many():
    with pytest.raises(UserError, match="does not say how many samples it has"):
        batches.samples((([torch.ones(3, 2), torch.ones(3, 2)],), None))


class Bag(nn.Module):
    def __init__(self, mode="sum", **kw):
        super().__init__()
        self.e, self.out = nn.EmbeddingBag(16, 8, mode=mode, **kw), nn.Linear(8, 1)

    def forward(self, tokens, offsets=None):
        return self.out(torch.tanh(self.e(tokens, offsets)))


class BagOfLengths(Bag):
    def forward(self, tokens, lengths):
        return super().forward(tokens, lengths.cumsum(0) - lengths)


class BagOfRows(Bag):
    """Flattens rows itself; `numbers` is what else a batch may have."""

    def forward(self, tokens, numbers, others):
        bags = self.e(tokens.flatten(), torch.arange(0, tokens.numel(), tokens.shape[1]))
        single = self.e(numbers, torch.arange(len(numbers)))
        return self.out(torch.tanh(bags + single + self.e(others[:, None])))


class BagOfJagged(Bag):
    def forward(self, tokens):
        return super().forward(tokens.values(), tokens.offsets()[:-1])


def draws(*shapes, steps=3):
    generator = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(1, 16, shape, generator=generator) for shape in shapes) for _ in range(steps)]


STARTS = torch.tensor([0, 1, 1, 2, 4, 4, 6, 7])  # on the first of two ranks, and in its first micro-batch, bags of one token and others
EACH = torch.tensor([0, 1, 2, 3, 3, 5, 6, 7])  # on the first rank, a bag for each token


@pytest.mark.parametrize(("model", "second"), [(Bag, STARTS), (Bag, EACH), (BagOfLengths, torch.tensor([1, 0, 1, 2, 0, 2, 1, 1]))])
def test_offsets_of_bags_are_no_samples(model, second):
    data = [((tokens, second), y) for (tokens,), (_, y) in zip(draws((8,)), rows(), strict=True)]
    assert_refused(model, data, square, "ddp", says="e (EmbeddingBag) is given a flat list of tokens")
    assert_exact(model, data, square, "single")


@pytest.mark.slow
def test_offsets_of_bags_under_every_layout():
    data = [((tokens, STARTS), y) for (tokens,), (_, y) in zip(draws((8,)), rows(), strict=True)]
    assert_refused(Bag, data, square, "ddpm", "z1m", "fsdp", "hsdp", says="let the batch hold one row of tokens a sample")
    assert_exact(Bag, data, square, "tp", more=["parallel.tp_plan={}"])


class Packed(nn.Module):
    """Sequences one after another, and where each begins and ends: what each row is centred by."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 1)

    def forward(self, x, cu_seqlens):
        parts = [x[a:b] - x[a:b].mean(0) for a, b in itertools.pairwise(cu_seqlens.tolist()) if b > a]
        return self.out(torch.cat(parts))


def test_packed_sequences_are_no_samples():
    data = [((x, torch.tensor([0, 2, 2, 3, 5, 5, 6, 8])), y) for x, y in rows(8)]
    assert_refused(Packed, data, square, "ddpm", says="offsets (cu_seqlens) of sequences")
    assert_exact(Packed, data, square, "single")


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [0, 0, 1, 1], [4, 3, 2, 4], [0, 3, 2, 4], [1, 2, 3, 4]])
def test_integers_that_are_no_offsets_are_dealt(numbers):
    (x, numbers_), _ = batches.local(((torch.zeros(4, 2), torch.tensor(numbers)), torch.zeros(4)), 1, 2)[:2]
    assert len(x) == 2
    assert numbers_.tolist() == numbers[2:]


def test_bags_that_are_samples():
    data = [(parts, y) for parts, (_, y) in zip(draws((8, 3), (8,), (8,)), rows(), strict=True)]
    assert_exact(BagOfRows, data, square, "ddpm")
    padded = [(torch.where(torch.arange(4) < n[:, None] % 4, x, 0), y) for (x, n), (_, y) in zip(draws((8, 4), (8,)), rows(), strict=True)]
    assert_exact(lambda: Bag("mean", padding_idx=0), padded, square, "ddp")
    jagged = [(torch.nested.nested_tensor([row[row > 0] for row in x], layout=torch.jagged), y) for x, y in padded]
    assert_exact(BagOfJagged, jagged, square, "ddp")
