"""Whether bitsandbytes quantises to 4 bits, and multiplies by what it quantised."""

from __future__ import annotations

from dataclasses import dataclass

from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import Finding

NAME = "bitsandbytes"
# NF4 rounds normal numbers by a tenth of their size; the product is that of the rounded numbers, in half precision.
_MOST_ROUNDING, _MOST_DIFFERENCE = 0.15, 0.02


@dataclass(frozen=True)
class Facts:
    """What came out.

    Attributes:
        version: of bitsandbytes.
        device: where it computed.
        rounding: norm of what 4 bits took from the weight, as a share of the weight's.
        difference: of the product from that of the rounded weight, likewise.
    """

    version: str
    device: str
    rounding: float
    difference: float


def probe(gpus: int) -> Facts:
    """Multiply by an NF4 weight (256, 128)."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes import functional

    device = torch.device("cuda" if gpus else "cpu")
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if not gpus or torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    weight, rows = (torch.randn(*s, generator=generator).to(device, dtype) for s in ((256, 128), (16, 128)))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    rounded = functional.dequantize_4bit(packed, state)
    product = bnb.matmul_4bit(rows, packed.t(), quant_state=state)
    return Facts(
        version=bnb.__version__,
        device=torch.cuda.get_device_name() if gpus else "the CPU",
        rounding=float((rounded.float() - weight.float()).norm() / weight.float().norm()),
        difference=float(
            (product.float() - rows.float() @ rounded.float().t()).norm() / product.float().norm()
        ),
    )


def judge(facts: Facts) -> list[Finding]:
    """One row."""
    where = f"bitsandbytes {facts.version} on {facts.device}"
    fix = "Type python -m bitsandbytes, and pip install --force-reinstall --no-deps bitsandbytes."
    # A number that is none is wrong, too.
    if not facts.rounding <= _MOST_ROUNDING:
        return [Finding(NAME, "bad", f"{where}: 4 bits took {facts.rounding:.0%} of the weight", fix)]
    if not facts.difference <= _MOST_DIFFERENCE:
        return [Finding(NAME, "bad", f"{where}: a 4-bit product is off by {facts.difference:.0%}", fix)]
    return [Finding(NAME, "ok", f"{where}: a 4-bit product is right")]


CHECK = Check(
    NAME,
    probe,
    judge,
    if_it_fails="Type python -m bitsandbytes: it says which library is missing; load_in_4bit=False does without.",
    seconds=120,
    counts=True,
)
