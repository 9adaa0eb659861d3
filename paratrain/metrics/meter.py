"""Throughput over the wall time between log points, with no device synchronisation of its own."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from paratrain.metrics import peaks
from paratrain.metrics.flops import Flops

log = logging.getLogger(__name__)


class Meter:
    """Counts what a window of steps did and how long it took.

    A window runs from one `read` (or the construction) to the next, minus what `pause` covers. The steps in it are timed as a
    whole: on a GPU a single step's host time says nothing, while the values logged with `read` were waited for anyway. The first
    window holds the start-up: compilation, the first allocation, the loader's workers.

    Args:
        world_size: devices of the job: figures "a device" are the job's divided by this.
        device: this rank's device, for the memory peak.
        flops: of a sample (see `flops.count`); None reports no FLOP/s.
        peak: of one device in FLOP/s; None reports no utilisation.
        recomputed: fraction of the forward pass that runs again in the backward: 1.0 under full activation checkpointing; None where
            it is not known, which reports no HFU.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        world_size: int,
        device: torch.device,
        flops: Flops | None = None,
        peak: float | None = None,
        recomputed: float | None = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.world_size, self.device, self.flops, self.peak, self.recomputed = world_size, device, flops, peak, recomputed
        self._clock = clock
        self._restart()

    def _restart(self) -> None:
        self._steps, self._samples, self._data = 0, 0, 0.0
        self._tokens: float | Tensor | None = None
        self._paused = 0.0
        self._began = self._clock()

    def add(self, samples: int, tokens: float | Tensor | None = None) -> None:
        """One optimizer step is done.

        Args:
            samples: of the global batch.
            tokens: real tokens (padding excluded) of the global batch, already reduced over the ranks: a number, or a 0-dim
                tensor that stays on its device until `read`. None where a sample is not made of tokens.
        """
        self._steps += 1
        self._samples += samples
        if tokens is not None:
            self._tokens = tokens if self._tokens is None else self._tokens + tokens

    @contextmanager
    def data(self) -> Iterator[None]:
        """Time spent waiting for the next batch."""
        began = self._clock()
        try:
            yield
        finally:
            self._data += self._clock() - began

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that belongs to no step: an evaluation, a checkpoint."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def read(self) -> dict[str, float]:
        """Figures of the window that ends now; starts the next. Empty without a step.

        Call it where the step's values are read, after the device was waited for. MFU is a fraction of the peak, between 0 and 1:
        `mfu` counts attention in full, `mfu_causal` half of it where it is causal, `hfu` in full with recomputation.
        """
        tokens = None if self._tokens is None else float(self._tokens)
        steps, samples, data = self._steps, self._samples, self._data
        seconds = self._clock() - self._began - self._paused
        self._restart()
        if not steps or seconds <= 0:
            return {}
        metrics = {"throughput/samples_per_sec": samples / seconds, "time/step": seconds / steps, "time/data": data / steps}
        if tokens is not None:
            metrics["throughput/tokens_per_sec"] = tokens / seconds
            metrics["throughput/device/tokens_per_sec"] = tokens / seconds / self.world_size
        if self.flops:
            units = samples if tokens is None or not self.flops.tokens else tokens / self.flops.tokens
            rate = units / seconds / self.world_size
            metrics["throughput/device/tflops"] = self.flops.full * rate / 1e12
            if self.peak:
                metrics["throughput/device/mfu"] = self.flops.full * rate / self.peak
                metrics["throughput/device/mfu_causal"] = self.flops.causal * rate / self.peak
                if self.recomputed is not None:
                    metrics["throughput/device/hfu"] = self.flops.hardware(self.recomputed) * rate / self.peak
        metrics["memory/peak_gib"] = peak_memory(self.device) / 2**30
        return metrics


def peak_memory(device: torch.device) -> int:
    """Most bytes this process ever held: allocated by torch on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak(device: torch.device, precision: str, override_tflops: float | None = None) -> float | None:
    """Peak of `device` in FLOP/s under a precision, or the user's own figure; says once in the log when there is none.

    Args:
        precision: `precision.name` of the configuration.
        override_tflops: `logger.peak_tflops` of the configuration, in TFLOP/s.
    """
    if override_tflops:
        return override_tflops * 1e12
    name, dtype = peaks.device_name(device), peaks.compute_dtype(precision)
    found = peaks.peak(name, dtype)
    if found is None:
        log.info("no published %s peak is known for %r: MFU is not reported; set logger.peak_tflops to have it", dtype, name)
    return found
