"""Whether a Triton kernel of ours compiles, launches and computes what torch does, on every GPU."""

from __future__ import annotations

from dataclasses import dataclass

from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import Finding

NAME = "Triton"
_MOST_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class Launch:
    """One device.

    Attributes:
        device: as torch calls it.
        failure: why no kernel launches there, as a clause, or None.
        difference: of act(g) * u from torch's, at most, in float32.
    """

    device: str
    failure: str | None
    difference: float = 0.0


def probe(gpus: int) -> tuple[Launch, ...]:
    """Launch on every GPU."""
    return tuple(launch(f"cuda:{index}") for index in range(gpus))


def launch(name: str) -> Launch:
    """Compute ``silu(g) * u`` of (37, 300) numbers on a device by Triton and by torch."""
    import torch
    from torch.nn import functional

    from pantheraml.kernels.launch import runs_triton, why_no_triton
    from pantheraml.kernels.swiglu import glu

    device = torch.device(name)
    generator = torch.Generator().manual_seed(0)
    g, u = (torch.randn(37, 300, generator=generator).to(device) for _ in range(2))
    failure = None if runs_triton(g) and device.type == "cpu" else why_no_triton(device)
    if failure is not None:
        return Launch(name, failure)
    return Launch(name, None, float((glu(g, u) - functional.silu(g) * u).abs().max()))


def judge(facts: tuple[Launch, ...]) -> list[Finding]:
    """A row for each device that is at fault, or one for all."""
    found: list[Finding] = []
    for one in facts:
        if one.failure is not None:
            fix = (
                "Type gcc --version (Triton needs a C compiler: apt install gcc), and pip install --force-reinstall "
                'triton; kernels="off" in from_pretrained does without.'
            )
            found.append(Finding(NAME, "bad", f"{one.device}: {one.failure}", fix))
        elif not one.difference <= _MOST_DIFFERENCE:
            fix = 'Type rm -r ~/.triton/cache; if it stays, pass kernels="off" to from_pretrained.'
            found.append(Finding(NAME, "bad", f"{one.device}: a kernel is off by {one.difference:.1g}", fix))
    return found or [Finding(NAME, "ok", f"a kernel is right on {', '.join(one.device for one in facts)}")]


CHECK = Check(
    NAME,
    probe,
    judge,
    if_it_fails='Type rm -r ~/.triton/cache and try again; kernels="off" in from_pretrained does without.',
    seconds=120,
    counts=True,
    least_gpus=1,
)
