"""precision.accumulate_dtype=fp32: gradients of bfloat16 weights, summed over micro-batches and ranks in float32, rounded once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import config, token_batches, token_loss
from sharding_zoo import Scalars, float_batches, gpt, seeded, squares

from paratrain.api import setup
from paratrain.config import DDP, FSDP, HSDP, Optimizer, Parallel, Precision, Single, Zero1, Zero2, from_dict
from paratrain.errors import ConfigError
from paratrain.spawn import run

BATCHES = token_batches(3, 16, True)
FLOATS = float_batches(3, (16, 5), (16, 5))
BOUND = {"gpt": 0.0, "scalars": 0.03}  # the second calls a block three times: one backward adds its three gradients in float32, too
LR = {"gpt": 0.25, "scalars": 0.002}
MODELS = {"gpt": (gpt(tied=False), token_loss, BATCHES), "scalars": (seeded(Scalars), lambda o, t: squares(o, t.float()), FLOATS)}


def cfg(micro, accumulate="fp32", **sections):
    return config(
        micro,
        clip=None,
        precision=Precision("bf16-true", accumulate_dtype=accumulate),
        optimizer=Optimizer("torch.optim.SGD", weight_decay=0.0),
        **sections,
    )


def train(configuration, model):
    build, loss, batches = MODELS[model]
    engine = setup(build, loss, replace(configuration, optimizer=replace(configuration.optimizer, lr=LR[model])))
    for batch in batches:
        engine.train_step(engine.local(batch))
    dtypes = {str(param.dtype) for param in engine.model.parameters()}
    assert dtypes == {"torch.bfloat16"}
    return engine.full_state_dict()


def by_hand(model, micro=2):
    """Plain torch: each micro-batch's gradient in bfloat16, their sum in float32, the mean rounded once."""
    build, loss, batches = MODELS[model]
    net = build().bfloat16()
    for inputs, targets in batches:
        sums, count = {}, 0.0
        for x, y in zip(inputs.split(micro), targets.split(micro), strict=True):
            total, number = loss(net(x.bfloat16() if x.is_floating_point() else x).float(), y)
            total.backward()
            count += float(number)
            for param in net.parameters():
                if param.grad is not None:
                    sums[param] = sums.get(param, 0) + param.grad.float()
                    param.grad = None
        with torch.no_grad():
            for param, grad in sums.items():
                param.add_((grad * (1 / count)).bfloat16(), alpha=-LR[model])
    return dict(net.state_dict())


def different(one, other):
    """Fraction of the weights that differ in any bit."""
    return sum(int((one[n] != w).sum()) for n, w in other.items()) / sum(w.numel() for w in other.values())


@pytest.mark.parametrize("model", MODELS)
def test_one_process_is_the_reference_bit_by_bit(model):
    assert different(train(cfg(2, strategy=Single()), model), by_hand(model)) <= BOUND[model]
    if model == "gpt":
        assert different(train(cfg(2, "grad", strategy=Single()), model), by_hand(model)) > 0.05, "the test sees the rounding"


LAYOUTS = {
    "ddp": {"strategy": DDP()},
    "zero1": {"strategy": Zero1()},
    "zero2": {"strategy": Zero2()},
    "fsdp": {"strategy": FSDP()},
    "whole": {"strategy": FSDP(reduce_each_micro_batch=False)},
    "hsdp": {"strategy": HSDP(), "parallel": Parallel(dp_replicate=2, dp_shard=1)},
    "tp": {"strategy": DDP(), "parallel": Parallel(tp=2)},
    "pp": {"strategy": DDP(), "parallel": Parallel(pp=2)},
}


def test_layouts_are_the_reference():
    """Two ranks, eight micro-batches of 2 in all; sums over ranks in another order, so a float32 rounding may tip a bfloat16 one."""

    def body():
        found = {("gpt", name): train(cfg(2, **layout), "gpt") for name, layout in LAYOUTS.items()}
        return found | {("scalars", name): train(cfg(2, **LAYOUTS[name]), "scalars") for name in ("ddp", "fsdp", "zero1")}

    expected = {model: by_hand(model) for model in MODELS}
    for (model, name), weights in run(body, 2)[0].items():
        bound = BOUND[model] + (0.2 if name == "tp" else 0.002)  # products split over ranks are added in bfloat16 in another order
        assert different(weights, expected[model]) <= bound, (model, name, different(weights, expected[model]))


def test_refused_where_there_is_nothing_to_widen():
    faulty = {"precision": {"name": "bf16-mixed", "accumulate_dtype": "fp32"}, "strategy": {"name": "ddp", "comm_hook": "fp16"}}
    with pytest.raises(ConfigError) as caught:
        from_dict(faulty)
    assert "precision.accumulate_dtype: fp32, but gradients of bf16-mixed have 32 bits or more already" in str(caught.value)
    assert "hooks want gradients of the weights' dtype; write none; or leave it out" in str(caught.value)
    with pytest.raises(ConfigError, match="strategy=fairscale_oss sums gradients by itself"):
        from_dict({"precision": {"name": "bf16-true", "accumulate_dtype": "fp32"}, "strategy": {"name": "fairscale_oss"}})
