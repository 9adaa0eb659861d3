import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paratrain.errors import UserError
from paratrain.loss import as_sum_and_count, checked, cross_entropy, mse


def test_cross_entropy_is_torchs_sum_and_counts_targets():
    outputs, targets = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(7, (3, 5))
    total, count = cross_entropy(outputs, targets)
    assert total.dtype == torch.float64
    assert count == 15
    expected = -sum(outputs[b, t].log_softmax(-1)[targets[b, t]] for b in range(3) for t in range(5))
    torch.testing.assert_close(total, expected)


def test_ignored_targets_weigh_nothing():
    outputs, targets = torch.randn(2, 4, 7, requires_grad=True), torch.randint(7, (2, 4))
    targets[0, 1:] = -100
    total, count = cross_entropy(outputs, targets)
    assert count == 5
    kept = targets != -100
    torch.testing.assert_close(total, F.cross_entropy(outputs[kept], targets[kept]) * 5)
    total.backward()
    assert outputs.grad[0, 1:].abs().max() == 0
    assert outputs.grad[kept].abs().min() > 0
    assert cross_entropy(outputs, torch.where(kept, targets, 3), ignore_index=3)[1] == (targets[kept] != 3).sum()


def test_nothing_to_predict_is_zero_not_nan():
    total, count = cross_entropy(torch.randn(2, 3, requires_grad=True), torch.full((2,), -100))
    total.backward()
    assert total.item() == 0
    assert count == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype):
    outputs = torch.zeros(4096, 16, dtype=dtype)
    total, _ = cross_entropy(outputs, torch.zeros(4096, dtype=torch.int64))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(4096 * math.log(16), rel=1e-6)
    total, count = mse(torch.full((300, 300), 2, dtype=dtype), torch.zeros(300, 300, dtype=dtype))
    assert (total.dtype, total.item(), count) == (torch.float32, 360000.0, 90000)


def test_classes_without_further_dims():
    outputs, targets = torch.randn(6, 3), torch.randint(3, (6,))
    total, count = cross_entropy(outputs, targets)
    torch.testing.assert_close(total / count, F.cross_entropy(outputs, targets))


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(UserError, match=r"\(2, 3, 7\) and targets \(2, 4\)"):
        cross_entropy(torch.zeros(2, 3, 7), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(UserError, match=r"\(4, 1\) and targets \(4,\)"):
        mse(torch.zeros(4, 1), torch.zeros(4))


def test_outputs_that_are_no_tensor_are_refused():
    with pytest.raises(UserError, match=r"the model returns tuple\(Tensor, Tensor\).*loss=balanced_cross_entropy"):
        cross_entropy((torch.zeros(2, 3, 7), torch.zeros(2)), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(UserError, match=r"mse: the model returns dict\(logits=\)"):
        mse({"logits": torch.zeros(4)}, torch.zeros(4))


def test_a_pair_needs_a_number_as_its_count():
    for second, what in (([1], "a list"), (None, "a NoneType"), (torch.ones(3), r"a tensor of shape \(3,\)")):
        with pytest.raises(UserError, match=f"returned {what} as the second"):
            as_sum_and_count((torch.tensor(1.0), second))
    assert as_sum_and_count((torch.tensor(1.0), np.int64(3)))[1] == 3


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (nn.MSELoss(reduction="sum"), "MSELoss with reduction=sum"),
        (partial(F.l1_loss, reduction="sum"), "l1_loss with reduction=sum"),
        (nn.CrossEntropyLoss(ignore_index=0), "CrossEntropyLoss with ignore_index=0"),
        (partial(F.cross_entropy, ignore_index=3), "cross_entropy with ignore_index=3"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "CrossEntropyLoss with weight"),
        (nn.Linear(3, 1), r"Linear has parameters \(weight, bias\)"),
    ],
)
def test_losses_that_would_be_silently_wrong_are_refused(loss_fn, match):
    with pytest.raises(UserError, match=match):
        checked(loss_fn, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "loss_fn", [F.mse_loss, nn.CrossEntropyLoss(label_smoothing=0.1), partial(F.cross_entropy, label_smoothing=0.1), cross_entropy]
)
def test_other_losses_are_taken_as_they_are(loss_fn):
    assert checked(loss_fn, torch.device("cpu"), torch.float64) is loss_fn


def test_buffers_of_a_loss_follow_the_dtype_of_the_weights():
    loss_fn = checked(nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), torch.device("cpu"), torch.float64)
    assert loss_fn.pos_weight.dtype is torch.float64
