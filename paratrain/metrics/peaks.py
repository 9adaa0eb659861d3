"""Peak FLOP/s of devices, from their makers' data sheets: the denominator of MFU.

Dense rates, without the sparsity factor of two, at the boost clock; fp64, fp32 and tf32 as a matrix product runs there. Consumer
cards are listed with float32 accumulation, which training uses. A device that is not listed, a laptop or MIG variant included,
has no peak here: MFU is then not reported, rather than guessed.
"""

from __future__ import annotations

import re

import torch

_HOPPER_SXM = {"fp64": 67, "fp32": 67, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9}
_HOPPER_NVL = {"fp64": 60, "fp32": 60, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5, "fp8": 1670.5}
_B200: dict[str, float] = {"fp64": 37, "fp32": 75, "tf32": 1125, "bf16": 2250, "fp16": 2250, "fp8": 4500}
_GB200: dict[str, float] = {"fp64": 40, "fp32": 80, "tf32": 1250, "bf16": 2500, "fp16": 2500, "fp8": 5000}
_MI300X = {"fp64": 163.4, "fp32": 163.4, "tf32": 653.7, "bf16": 1307.4, "fp16": 1307.4, "fp8": 2614.9}

# Full match of the name the driver reports, without the maker -> TFLOP/s by dtype of the products.
_TFLOPS: list[tuple[str, dict[str, float]]] = [
    # NVIDIA V100 data sheet, 2020 (no bf16)
    (r"V100-SXM2-\d+GB(-LS)?|V100-SXM3-\d+GB", {"fp64": 7.8, "fp32": 15.7, "fp16": 125}),
    (r"V100-PCIE-\d+GB", {"fp64": 7, "fp32": 14, "fp16": 112}),
    (r"V100S-PCIE-\d+GB", {"fp64": 8.2, "fp32": 16.4, "fp16": 130}),
    # NVIDIA T4 data sheet, 2019
    (r"T4", {"fp32": 8.1, "fp16": 65}),
    # NVIDIA A100, A30, A10, A40 and RTX A6000 data sheets, 2020-2022; SXM and PCIe are equal
    (
        r"A100[- ]SXM4-(40|80)GB|A100-PCIE-(40|80)GB|A100 80GB PCIe",
        {"fp64": 19.5, "fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312},
    ),
    (r"A30", {"fp64": 10.3, "fp32": 10.3, "tf32": 82, "bf16": 165, "fp16": 165}),
    (r"A10", {"fp32": 31.2, "tf32": 62.5, "bf16": 125, "fp16": 125}),
    (r"A40", {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7}),
    (r"RTX A6000", {"fp32": 38.7, "tf32": 77.4, "bf16": 154.8, "fp16": 154.8}),
    # NVIDIA GA102 architecture white paper, appendix A
    (r"RTX 3090", {"fp32": 35.6, "tf32": 35.6, "bf16": 71, "fp16": 71}),
    # NVIDIA Ada architecture white paper, appendix A; L4, L40, L40S and RTX 6000 Ada data sheets
    (r"RTX 4090", {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2, "fp8": 330.3}),
    (r"L4", {"fp32": 30.3, "tf32": 60, "bf16": 121, "fp16": 121, "fp8": 242.5}),
    (r"L40", {"fp32": 90.5, "tf32": 90.5, "bf16": 181, "fp16": 181, "fp8": 362}),
    (r"L40S", {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362, "fp8": 733}),
    (r"RTX 6000 Ada Generation", {"fp32": 91.1, "tf32": 182.1, "bf16": 364.2, "fp16": 364.2, "fp8": 728.5}),
    # NVIDIA H100 data sheets (SXM and NVL 2023, PCIe 2022), H200 data sheet 2023, GH200 data sheet 2023, H20
    (r"H100 80GB HBM3|H100 SXM5?( 80GB)?", _HOPPER_SXM),
    (r"H100 PCIe", {"fp64": 51, "fp32": 51, "tf32": 378, "bf16": 756, "fp16": 756, "fp8": 1513}),
    (r"H100 NVL", _HOPPER_NVL),
    (r"H200", _HOPPER_SXM),
    (r"H200 NVL", _HOPPER_NVL),
    (r"GH200 (480|144G|96G|120)\w*( HBM3e?)?", _HOPPER_SXM),
    (r"H20", {"fp64": 1, "fp32": 44, "tf32": 74, "bf16": 148, "fp16": 148, "fp8": 296}),
    # NVIDIA HGX B200 and GB200 NVL72 data sheets, 2024, a GPU; RTX Blackwell white paper
    (r"B200( SXM6?)?", _B200),
    (r"GB200", _GB200),
    (r"RTX 5090", {"fp32": 104.8, "tf32": 104.8, "bf16": 209.5, "fp16": 209.5, "fp8": 419}),
    # AMD Instinct data sheets; an MI250X shows up as two devices, each half of it
    (r"Instinct MI210", {"fp64": 45.3, "fp32": 45.3, "bf16": 181, "fp16": 181}),
    (r"Instinct MI250X", {"fp64": 47.9, "fp32": 47.9, "bf16": 191.5, "fp16": 191.5}),
    (r"Instinct MI3(00|25)X", _MI300X),
]

_DTYPES = {"64": "fp64", "32": "fp32", "bf16": "bf16", "16": "fp16", "fp8": "fp8"}


def peak(device_name: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of one device; None where no data sheet is listed.

    Args:
        device_name: as `torch.cuda.get_device_name` reports it.
        dtype: of the matrix products: fp64, fp32, tf32, bf16, fp16 or fp8.
    """
    name = re.sub(r"^(NVIDIA|AMD|Tesla|GeForce|\s)+", "", device_name).strip()
    for pattern, tflops in _TFLOPS:
        if re.fullmatch(pattern, name, re.IGNORECASE) and dtype in tflops:
            return tflops[dtype] * 1e12
    return None


def device_name(device: torch.device) -> str:
    """Name of the device as its driver reports it; the type (`cpu`) where there is no driver to ask."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def compute_dtype(precision: str) -> str:
    """dtype of the matrix products under a precision (`bf16-mixed`, `32-true`, ...): float32 is tf32 where torch was told so."""
    dtype = _DTYPES[precision.split("-")[0]]
    return "tf32" if dtype == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32" else dtype
