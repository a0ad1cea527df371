"""How many operations a second GPUs can do on paper: what a share of the peak (MFU) is a share of."""

from __future__ import annotations

# Dense bfloat16 (float16 before Ampere) TFLOP/s on tensor cores with float32 sums, from the makers' data sheets. The
# first name that is part of the device's counts, so longer names come first.
_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.5),
    ("H200", 989.5),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.5),
    ("H800", 989.5),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.0),
    ("RTX A6000", 155.0),
    ("A40", 150.0),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("MI300X", 1307.0),
    ("MI250X", 383.0),
)


def peak_tflops(name: str) -> float | None:
    """Dense 16-bit TFLOP/s of the GPU that torch calls ``name``; None for one that is not in the table."""
    return next((tflops for part, tflops in _TFLOPS if part in name), None)
