"""FLOPs against closed formulas, peaks, the meter under a fake clock, the environment report."""

import contextlib
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paratrain.metrics import env, flops, meter, peaks
from paratrain.models.gpt import GPT

LAYERS, DIM, TIME, BATCH = 3, 64, 40, 2


def gpt(**options):
    return GPT(vocab_size=97, seq_len=TIME, layers=LAYERS, dim=DIM, heads=4, **options)


def tokens():
    return torch.zeros(BATCH, TIME, dtype=torch.int64)


def matrices(model):
    """N of the formula: the weights of every product, the head included and the embedding not."""
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)


class TestFlops:
    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_gpt_equals_the_closed_formula(self, kv_heads):
        model = gpt(kv_heads=kv_heads)
        attention = 12 * LAYERS * DIM * TIME
        found = flops.count(model, tokens())
        assert found.source == "counted"
        assert found.tokens == TIME
        assert found.full == (6 * matrices(model) + attention) * TIME
        assert found.causal == (6 * matrices(model) + attention / 2) * TIME
        assert found.backward == 2 * found.forward
        assert found.causal_backward == 2 * found.causal_forward
        assert found.hardware(1.0) == (8 * matrices(model) + attention * 4 / 3) * TIME

    def test_tied_head_is_counted_as_a_product(self):
        assert flops.count(gpt(tied=True), tokens()) == flops.count(gpt(), tokens())

    def test_model_is_left_alone(self):
        model = gpt(dropout=0.1).eval()
        before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        flops.count(model, tokens())
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
        assert not model.training
        assert torch.equal(rng, torch.get_rng_state())

    def test_model_on_meta_and_batch_size_do_not_matter(self):
        with torch.device("meta"):
            model = gpt()
        assert flops.count(model, tokens()) == flops.count(gpt(), tokens()[:1])

    def test_conv_net_by_hand(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.Linear(4 * 7 * 7, 10))
        first, second, linear = 2 * 16 * 16 * 8 * 3 * 9, 2 * 7 * 7 * 4 * 8 * 9, 2 * 4 * 7 * 7 * 10
        found = flops.count(net, torch.randn(5, 3, 16, 16))
        assert found.forward == first + second + linear
        assert found.backward == first + 2 * second + 2 * linear  # the image needs no gradient
        assert found.causal == found.full
        assert found.tokens is None

    def test_frozen_parts_cost_no_weight_gradient(self):
        net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False))
        net[0].requires_grad_(False)
        found = flops.count(net, torch.randn(3, 6))
        assert (found.forward, found.backward) == (2 * 30 + 2 * 20, 2 * 20)
        assert flops.count(net.requires_grad_(False), torch.randn(3, 6)).backward == 0

    def test_dict_and_tuple_inputs_and_a_mapping_as_output(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(5, 3, bias=False)

            def forward(self, x, y):
                return {"sum": self.a(x) + self.b(y), "note": "text"}

        x, y = torch.randn(2, 4), torch.randn(2, 5)
        by_name, by_place = flops.count(Two(), {"x": x, "y": y}), flops.count(Two(), (x, y))
        assert by_name == by_place
        assert by_name.forward == 2 * (12 + 15)

    def test_tensor_kept_outside_the_buffers_moves_too(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.scales = nn.Linear(4, 4, bias=False), [torch.ones(4)]

            def forward(self, x):
                return self.linear(x * self.scales[0]) + torch.arange(4)

        assert flops.count(Scaled(), torch.randn(2, 4)).source == "counted"

    @pytest.mark.parametrize("causal", [True, False])
    def test_causal_attention_inside_torch_modules(self, causal):
        layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2)

        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = encoder

            def forward(self, x):
                mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if causal else None
                return self.encoder(x, mask=mask, is_causal=causal)

        found = flops.count(Masked(), torch.randn(3, 24, 32))
        attention = 2 * 4 * 24 * 24 * 32
        assert found.source == "counted"
        assert found.forward == 2 * 2 * 24 * (4 * 32 * 32 + 2 * 32 * 64) + attention
        assert found.forward - found.causal_forward == (attention / 2 if causal else 0)

    def test_causal_backward_follows_what_needs_a_gradient(self):
        class OnlyValues(nn.Module):
            def __init__(self):
                super().__init__()
                self.v = nn.Linear(8, 8, bias=False)

            def forward(self, x):
                return F.scaled_dot_product_attention(x, x, self.v(x), None, 0.0, True)

        found = flops.count(OnlyValues(), torch.randn(2, 10, 8))
        product = 2 * 10 * 10 * 8
        assert found.forward - found.causal_forward == product  # half of two products
        assert found.backward - found.causal_backward == product / 2  # half of one: only the values have a gradient

    def test_data_dependent_model_is_estimated_and_says_so(self, caplog):
        class Peeks(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)

            def forward(self, x):
                return self.head(self.embed(x)) * float(x.sum().item())

        with caplog.at_level(logging.WARNING):
            found = flops.count(Peeks(), tokens())
        assert found.source == "6N"
        assert found.reason
        assert found.full == 6 * 8 * 50 * TIME
        assert "estimated as 6N" in caplog.text

    def test_output_without_tensors_is_not_taken_for_a_free_backward(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x):
                return type("Result", (), {"logits": self.linear(x)})()

        assert flops.count(Odd(), torch.randn(2, 4)).source == "6N"


class TestPeaks:
    @pytest.mark.parametrize(
        ("name", "dtype", "tflops"),
        [
            ("NVIDIA A100-SXM4-80GB", "bf16", 312),
            ("A100-PCIE-40GB", "tf32", 156),
            ("NVIDIA A100 80GB PCIe", "fp16", 312),
            ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
            ("NVIDIA H100 PCIe", "bf16", 756),
            ("NVIDIA H100 NVL", "fp8", 1670.5),
            ("NVIDIA H200", "bf16", 989.4),
            ("NVIDIA B200", "bf16", 2250),
            ("NVIDIA L4", "bf16", 121),
            ("NVIDIA L40S", "bf16", 362),
            ("NVIDIA A10", "bf16", 125),
            ("NVIDIA GeForce RTX 3090", "bf16", 71),
            ("NVIDIA GeForce RTX 4090", "fp32", 82.6),
            ("Tesla V100-SXM2-16GB", "fp16", 125),
            ("AMD Instinct MI300X", "bf16", 1307.4),
        ],
    )
    def test_known_names(self, name, dtype, tflops):
        assert peaks.peak(name, dtype) == pytest.approx(tflops * 1e12)

    @pytest.mark.parametrize(
        "name",
        ["cpu", "NVIDIA A10G", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "X"],
    )
    def test_near_misses_are_unknown(self, name):
        assert peaks.peak(name, "bf16") is None

    def test_dtype_a_device_lacks_is_unknown(self):
        assert peaks.peak("Tesla V100-SXM2-16GB", "bf16") is None

    def test_float32_is_tf32_where_torch_was_told(self):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            assert peaks.compute_dtype("32-true") == "fp32"
            torch.set_float32_matmul_precision("high")
            assert peaks.compute_dtype("32-true") == "tf32"
        finally:
            torch.set_float32_matmul_precision(before)
        assert [peaks.compute_dtype(p) for p in ("bf16-mixed", "bf16-true", "16-mixed", "64-true", "fp8")] == [
            "bf16",
            "bf16",
            "fp16",
            "fp64",
            "fp8",
        ]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


CPU = torch.device("cpu")


class TestMeter:
    def window(self, **options):
        clock = Clock()
        counted = flops.Flops(forward=100.0, backward=200.0, causal_forward=80.0, causal_backward=160.0, tokens=10)
        return clock, meter.Meter(world_size=4, device=CPU, flops=counted, clock=clock, **options)

    def test_figures_of_a_window(self):
        clock, m = self.window(peak=1000.0, recomputed=1.0)
        for _ in range(5):
            with m.data():
                clock.now += 0.1
            clock.now += 0.3
            m.add(samples=8, tokens=torch.tensor(60))
        found = m.read()
        assert found.pop("memory/peak_gib") > 0
        rate = 5 * 60 / 10 / 2.0 / 4  # samples' worth of real tokens a second and device: padding does no useful work
        assert found == pytest.approx(
            {
                "throughput/samples_per_sec": 20.0,
                "throughput/tokens_per_sec": 150.0,
                "throughput/device/tokens_per_sec": 37.5,
                "throughput/device/tflops": 300 * rate / 1e12,
                "throughput/device/mfu": 300 * rate / 1000,
                "throughput/device/mfu_causal": 240 * rate / 1000,
                "throughput/device/hfu": 400 * rate / 1000,
                "time/step": 0.4,
                "time/data": 0.1,
            }
        )

    def test_pause_is_left_out_and_windows_are_apart(self):
        clock, m = self.window()
        clock.now += 1
        m.add(8, 80)
        with m.pause():
            clock.now += 50
        clock.now += 1
        assert m.read()["time/step"] == pytest.approx(2.0)
        clock.now += 3
        m.add(8, 80)
        assert m.read()["throughput/samples_per_sec"] == pytest.approx(8 / 3)

    def test_without_steps_tokens_peak_or_flops(self):
        clock, m = self.window()
        clock.now += 1
        assert m.read() == {}
        clock.now += 1
        m.add(8)
        found = m.read()
        assert found["throughput/device/tflops"] == pytest.approx(300 * 8 / 4 / 1e12)
        assert not any("tokens" in name or "mfu" in name or "hfu" in name for name in found)
        plain = meter.Meter(1, CPU, clock=clock)
        clock.now += 1
        plain.add(1)
        assert set(plain.read()) == {"throughput/samples_per_sec", "time/step", "time/data", "memory/peak_gib"}

    def test_time_of_a_failing_pause_still_counts(self):
        clock, m = self.window()
        m.add(1)
        clock.now += 1
        with contextlib.suppress(KeyError), m.pause():
            clock.now += 9
            raise KeyError
        assert m.read()["time/step"] == pytest.approx(1.0)

    def test_memory_peak_on_cpu_is_the_resident_set(self):
        held = torch.ones(48 * 2**20, dtype=torch.uint8)
        assert held.nbytes < meter.peak_memory(CPU) < 2**40

    def test_unknown_device_is_said_and_an_override_wins(self, caplog):
        with caplog.at_level(logging.INFO):
            assert meter.device_peak(CPU, "bf16-mixed") is None
        assert "MFU is not reported" in caplog.text
        assert "logger.peak_tflops" in caplog.text
        assert meter.device_peak(CPU, "bf16-mixed", override_tflops=2.5) == 2.5e12


class TestEnvironment:
    def test_report_is_complete_and_readable(self):
        found, text = env.report(), env.text()
        assert found["torch"] == torch.__version__
        assert found["cores"] >= 1
        assert found["ram_gib"] > 0.1
        assert "gloo" in found["backends"]
        assert found["packages"]["hydra-core"]
        assert f"torch: {torch.__version__}" in text
        assert "None" not in text

    def test_commit_of_a_checkout_and_outside_one(self, tmp_path):
        import subprocess

        def git(*args):
            subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *args], check=True, capture_output=True)

        assert env.git_commit(tmp_path) is None
        git("init")
        (tmp_path / "file").write_text("a")
        git("add", "file")
        git("commit", "-m", "first")
        commit = env.git_commit(tmp_path)
        assert commit
        assert len(commit) == 40
        (tmp_path / "file").write_text("b")
        assert env.git_commit(tmp_path) == f"{commit}-dirty"


def test_operations_are_counted_before_the_layout(tmp_path):
    """Sharded weights change neither the count nor its source."""
    from paratrain import api, config, spawn
    from paratrain.loss import cross_entropy
    from paratrain.models.gpt import GPT

    def counted(strategy):
        cfg = config.from_dict({"strategy": {"name": strategy}, "trainer": {"device": "cpu", "max_steps": 1}})
        engine = api.setup(lambda: GPT(64, 16, layers=2, dim=32, heads=2), cross_entropy, cfg)
        result = flops.count(engine.blueprint, torch.zeros(2, 16, dtype=torch.int64))
        return result.full, result.source

    (alone,) = spawn.run(counted, 1, "single")
    assert alone[1] == "counted"
    assert spawn.run(counted, 2, "fsdp") == spawn.run(counted, 2, "ddp") == [alone, alone]
