"""What a step of each layout communicates, over which axis and how many bytes, is what the theory says (docs/communication.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from reference import VOCAB, config, token_loss
from test_context import batches
from test_trainer import config as trainer_config
from test_trainer import fit

from paratrain.api import setup
from paratrain.config import FSDP, HSDP, Context, Parallel, Zero1, Zero2
from paratrain.mesh import build
from paratrain.metrics.communication import Communication, CommunicationReport
from paratrain.models.gpt import GPT
from paratrain.spawn import run

LAYERS, DIM, SAMPLES, TIME, WIDTH = 2, 16, 12, 8, 8  # WIDTH: bytes of a float64
ACTIVATIONS = SAMPLES * TIME * DIM * WIDTH  # of a micro-batch that is the whole batch, between blocks
TOKENS = SAMPLES * TIME * WIDTH  # a number a token


def gpt(tied=False):
    torch.manual_seed(11)
    return GPT(VOCAB, 8, layers=LAYERS, dim=DIM, heads=4, ffn=20, tied=tied)


def weights(shards=1):
    """(bytes of all parameters, of those in blocks, how many there are), each padded to divide by `shards` along dim 0."""
    sizes = {name: -(-p.shape[0] // shards) * shards * p[0].numel() * WIDTH for name, p in gpt().named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("blocks")), len(sizes)


def measured(ranks, cases, tied=False):
    """What rank 0 communicates in a step of each configuration, after those that compare the order of blocks: {(axis, operation): (count, bytes)}."""

    def body():
        found = []
        for cfg in cases:
            engine = setup(lambda: gpt(tied), token_loss, cfg)
            *first, last = batches(10, SAMPLES)  # behind the steps in which losses and states are looked at
            for batch in first:
                engine.train_step(engine.local(batch))
            with Communication(engine.mesh) as seen:
                engine.train_step(engine.local(last))
            found.append({key: (amount.count, amount.bytes) for key, amount in seen.amounts.items()})
        return found

    return run(body, ranks, timeout=200)[0]


LOSS = 2 * WIDTH  # a sum and a count
ORDER = 2 * WIDTH  # a digest of the order of blocks, and its square


def of_sharding(axis, gathers, reductions, shards=2):
    """`gathers` of all weights (one more of the blocks alone where it ends in .5), `reductions` of all gradients; and numbers."""
    total, blocks, count = weights(shards)
    again = gathers % 1 > 0
    gathered = int(gathers) * total + again * blocks, int(gathers) * (LAYERS + 1) + again * LAYERS
    return {
        (axis, "all_gather"): gathered[::-1],
        (axis, "reduce_scatter"): (reductions * (LAYERS + 1), reductions * total),
        (axis, "all_reduce"): (2, LOSS + ORDER + count * WIDTH + WIDTH),  # which weights were used goes with the loss; then the norm
    }


def times(factor, amounts):
    return {key: (count * factor, size * factor) if key[1] != "all_reduce" else (count, size) for key, (count, size) in amounts.items()}


def test_data_parallelism():
    total, _, count = weights()
    cases = {
        "ddp": (config(), {("dp_replicate", "all_reduce"): (3, total + 4 * count + LOSS)}),  # gradients, int32 flags of use, loss
        "ddp, accumulation 3": (config(2), {("dp_replicate", "all_reduce"): (3, total + 4 * count + LOSS)}),
        "fsdp": (config(strategy=FSDP()), of_sharding("dp_shard", 1.5, 1)),
        "fsdp, accumulation 3": (config(2, strategy=FSDP()), times(3, of_sharding("dp_shard", 1.5, 1))),
        "fsdp kept": (config(2, strategy=FSDP(reshard_after_forward=False)), of_sharding("dp_shard", 1, 3)),
        "zero1": (config(strategy=Zero1()), of_sharding("dp_shard", 1, 1)),
        "zero1, accumulation 3": (config(2, strategy=Zero1()), of_sharding("dp_shard", 1, 1)),
        "zero2, accumulation 3": (config(2, strategy=Zero2()), of_sharding("dp_shard", 1, 3)),
    }
    for name, found in zip(cases, measured(2, [cfg for cfg, _ in cases.values()]), strict=True):
        assert found == cases[name][1], name


def of_tensor_parallelism(sequence):
    """Shoeybi et al. (2019): an all-reduce of activations after attention and after the MLP, each way, and one for embedding and head."""
    sums, loss, norms = 2 * (2 * LAYERS + 1), (3, 3 * TOKENS), (2, 2 * WIDTH)
    if not sequence:
        return {("tp", "all_reduce"): (sums + loss[0] + norms[0], sums * ACTIVATIONS + loss[1] + norms[1])}
    vectors = 2 * LAYERS + 1  # weights of norms, which see a part of the sequence on each rank
    return {
        **{("tp", operation): (sums, sums * ACTIVATIONS) for operation in ("all_gather", "reduce_scatter")},
        ("tp", "all_reduce"): (vectors + loss[0] + norms[0], vectors * DIM * WIDTH + loss[1] + norms[1]),
    }


def of_context_parallelism(method, ranks=2):
    """q, k, v and results of a rank are `part` bytes each; and the gradients as under ddp."""
    total, _, count = weights()
    part = ACTIVATIONS // ranks
    common = {("cp", "all_reduce"): (3, total + 4 * count + LOSS)}
    if method == "all_to_all":  # q, k, v and the result, each way
        return common | {("cp", "all_to_all"): (8 * LAYERS, 8 * LAYERS * part)}
    if method == "all_gather":  # k and v; their gradients back
        return common | {("cp", kind): (2 * LAYERS, 2 * LAYERS * part * ranks) for kind in ("all_gather", "all_to_all")}
    turns = LAYERS * (ranks - 1 + ranks), LAYERS * ((ranks - 1) * 2 + (ranks - 1) * 4 + 2) * part  # k, v; with gradients; these home
    return common | {("cp", "send"): turns, ("cp", "recv"): turns}


METHODS = ("all_to_all", "all_gather", "ring")


def test_model_parallelism():
    cases = {f"tp{' sp' * sp}": (config(parallel=Parallel(tp=2, sp=sp)), of_tensor_parallelism(sp)) for sp in (False, True)}
    for method in METHODS:
        cases[method] = config(parallel=Parallel(cp=2), context=Context(method)), of_context_parallelism(method)
    sent = 3, ACTIVATIONS  # three micro-batches, which together are the batch: activations one way, their gradients the other
    numbers = {("pp", "all_reduce"): (2, LOSS + WIDTH)}  # loss and norm
    cases["pp"] = config(4, parallel=Parallel(pp=2)), {("pp", "send"): sent, ("pp", "recv"): sent, **numbers}
    for name, found in zip(cases, measured(2, [cfg for cfg, _ in cases.values()]), strict=True):
        assert found == cases[name][1], name
    (tied,) = measured(2, [cases["pp"][0]], tied=True)
    shared = 4, ACTIVATIONS + (VOCAB * DIM + 1) * WIDTH  # and the gradient of the shared matrix, with whether there is one
    assert tied == {("pp", "send"): shared, ("pp", "recv"): shared, **numbers}


def test_products_of_axes():
    hsdp, ddp_tp, cp_tp = measured(
        4,
        [
            config(strategy=HSDP(), parallel=Parallel(dp_replicate=2, dp_shard=2)),
            config(parallel=Parallel(tp=2)),
            config(parallel=Parallel(tp=2, cp=2), context=Context("all_to_all")),
        ],
    )
    total, _, count = weights(2)
    inside = of_sharding("dp_shard", 1.5, 1) | {("dp_shard", "all_reduce"): (1, WIDTH)}  # the norm
    across = {("dp_replicate", "all_reduce"): (LAYERS + 1, total // 2)}  # of what each shard rank has after its reduction
    assert hsdp == inside | across | {("dp_replicate x dp_shard", "all_reduce"): (1, LOSS + ORDER + count * WIDTH)}

    ((key, (number, size)),) = of_tensor_parallelism(False).items()
    assert ddp_tp[key] == (number, (size - 2 * WIDTH) // 2 + 2 * WIDTH), "half of the samples; the norm's numbers are as many"
    halves = sum(p.numel() * WIDTH // 2 for name, p in gpt().named_parameters() if p.ndim == 2 and name.startswith("blocks"))
    halves += 2 * (VOCAB // 2) * DIM * WIDTH  # of embedding and head, rank 0 holds the larger part
    assert ddp_tp["dp_replicate", "all_reduce"] == (LAYERS + 2, weights()[0] - halves + LOSS + ORDER + count * WIDTH)

    assert cp_tp["cp", "all_to_all"] == (8 * LAYERS, 8 * LAYERS * ACTIVATIONS // 2 // 2), "a rank exchanges its heads"
    assert cp_tp["tp", "all_reduce"] == (number, (size - 2 * WIDTH) // 2 + 2 * WIDTH), "a rank sums its positions"


def two_ranks():
    return build(config(parallel=Parallel(tp=2)), "cpu")


def test_every_operation_is_seen():
    def body():
        mesh = two_ranks()
        group, rank = mesh.root["tp"].get_group(), dist.get_rank()
        one, four, eight = torch.ones(1), torch.ones(4), torch.ones(8)
        with Communication(mesh) as seen:
            dist.all_reduce(four, group=group)
            dist.all_gather([torch.empty(4), torch.empty(4)], four, group=group)
            dist.all_gather_into_tensor(eight, four, group=group)
            dist.reduce_scatter(four, [torch.ones(4), torch.ones(4)], group=group)
            dist.reduce_scatter_tensor(four, eight, group=group)
            dist.all_to_all_single(torch.empty(4), four, group=group)
            dist.broadcast(four, group=group, group_src=0)
            dist.reduce(four, group=group, group_dst=0)
            dist.gather(four, [torch.empty(4), torch.empty(4)] if rank == 0 else None, group=group, group_dst=0)
            dist.scatter(four, [torch.ones(4), torch.ones(4)] if rank == 0 else None, group=group, group_src=0)
            dist.send(four, group=group, group_dst=1) if rank == 0 else dist.recv(four, group=group, group_src=0)
            dist.barrier(group=group)
            dist.all_reduce(four, group=mesh.data.get_group())  # of one rank: nothing travels
            functional.all_reduce(one, "sum", group).wait()
            functional.all_gather_tensor(one, 0, group).wait()
            functional.reduce_scatter_tensor(eight, "sum", 0, group).wait()
            functional.all_to_all_single(four, None, None, group).wait()
        dist.all_reduce(four, group=group)  # after it
        amounts = {operation: (amount.count, amount.bytes) for (axis, operation), amount in seen.amounts.items() if axis == "tp"}
        assert len(amounts) == len(seen.amounts)
        return amounts, seen.sent("tp", "all_reduce"), seen.sent("tp", "all_gather"), str(seen)

    (first, *sent, text), (second, *_) = run(body, 2)
    assert first == {
        "all_reduce": (2, 16 + 4),
        "all_gather": (3, 32 + 32 + 8),
        "reduce_scatter": (3, 32 + 32 + 32),
        "all_to_all": (2, 16 + 16),
        **{operation: (1, 16) for operation in ("broadcast", "reduce", "gather", "scatter", "send")},
    }
    assert second.keys() == first.keys() - {"send"} | {"recv"}
    assert sent == [20, 36]
    assert text.splitlines()[:2] == ["axis  operation       count  MiB    MiB sent", "tp    all_gather      3      0.000  0.000"]


def test_training_reports_it(capfd, tmp_path):
    cfg = trainer_config(tmp_path)
    cfg = replace(cfg, trainer=replace(cfg.trainer, max_steps=3))
    run(lambda: fit(cfg, [CommunicationReport(2)]), 2)
    shown = capfd.readouterr().out
    assert shown.count("communication of rank 0 in step 2:\naxis ") == 1
    assert "dp_replicate  all_reduce" in shown


def test_a_step_that_never_comes():
    with pytest.raises(ValueError, match="the first step is 1"):
        CommunicationReport(0)
