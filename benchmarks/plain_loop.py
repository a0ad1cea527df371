"""One case as forward, backward and AdamW in a plain loop: the same lines for everyone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.device import checked_norm, peaks, reset_peaks, synchronize
from benchmarks.peers import build, recompute_of


class Loop:
    """A model of a case, its optimizer, and one step on a batch of token ids."""

    def __init__(self, case: Case) -> None:
        self.case = case
        built = build(case)
        self.model, self.import_s, self.load_s = built.model, built.import_s, built.load_s
        self.device = next(self.model.parameters()).device
        self.extra: dict[str, Any] = {}
        if case.who == "ours-loop":
            self.model.train()
            self.extra = _bind_head(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def batch(self, seed: int, seq: int | None = None) -> Tensor:
        """Random token ids (B, S)."""
        generator = torch.Generator().manual_seed(seed)
        vocab = min(self.model.config.vocab_size, 128000)
        shape = (self.case.batch, seq or self.case.seq)
        return torch.randint(3, vocab, shape, generator=generator).to(self.device)

    def gradients(self, ids: Tensor) -> Tensor:
        """Forward and backward; the loss."""
        mixed = self.case.precision != "float32"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            loss = self.model(input_ids=ids, labels=ids, **self.extra).loss
        loss.backward()
        return loss

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, ids: Tensor) -> float:
        loss = self.gradients(ids)
        self.update()
        return loss.item()


def measure(case: Case) -> dict[str, Any]:
    """Median time of a step after warm-up, the device idle before each step."""
    loop = Loop(case)
    batches = [loop.batch(seed) for seed in range(4)]
    times, losses = [], []
    for i in range(case.steps):
        if i == case.warm:
            reset_peaks()
        synchronize()
        began = time.perf_counter()
        losses.append(loop.step(batches[i % 4]))
        times.append(time.perf_counter() - began)
    memory = peaks()
    # One more backward, not timed: after a step LoRA's B is no longer zero, so every gradient has to be there.
    losses.append(loop.gradients(batches[0]).item())
    norm = checked_norm(loop.model.parameters())
    seconds = sorted(times[case.warm :])[(case.steps - case.warm) // 2]
    return {
        "tok_s": case.batch * case.seq / seconds,
        "ms": seconds * 1e3,
        **memory,
        "first_step_s": times[0],
        "load_s": loop.load_s,
        "import_s": loop.import_s,
        "recompute": recompute_of(loop.model, case),
        "loss": losses[-1],
        "loss_first": losses[0],
        "grad_norm": norm,
    }


def longest(case: Case) -> dict[str, Any]:
    """The longest sequence of which one step fits into memory, to 3 %; ``case.seq`` is the most that is tried."""
    loop = Loop(case)
    for _ in range(2):  # the optimizer's state is there from here on
        loop.step(loop.batch(0, seq=min(2048, case.seq)))
    loop.gradients(loop.batch(0, seq=min(2048, case.seq)))
    norm = checked_norm(loop.model.parameters())
    loop.optimizer.zero_grad(set_to_none=True)
    tried: dict[int, float] = {}

    def fits(tokens: int) -> bool:
        """Whether a step of ``tokens`` runs; how long it took is kept."""
        ids = loop.batch(1, seq=tokens)
        synchronize()
        began = time.perf_counter()
        try:
            loop.step(ids)
        except torch.OutOfMemoryError:
            loop.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return False
        tried[tokens] = time.perf_counter() - began
        return True

    guess = _predict(loop, fits) if loop.device.type == "cuda" else case.seq
    found = search(fits, case.seq, guess)
    reset_peaks()
    fits(found)
    return {
        "tokens": found,
        "is_at_least": found == case.seq,
        "tok_s": found / tried[found],
        "ms": tried[found] * 1e3,
        **peaks(),
        "load_s": loop.load_s,
        "import_s": loop.import_s,
        "recompute": recompute_of(loop.model, case),
        "grad_norm": norm,
    }


def search(fits: Callable[[int], bool], most: int, guess: int) -> int:
    """The largest multiple of 256 up to ``most`` that fits, to 3 %, beginning at ``guess``."""
    low, high = 0, most + 256
    while high - low > max(256, 0.03 * high):
        guess = min(max(guess // 256 * 256, low + 256), high - 256, most)
        if guess <= low:
            break
        if fits(guess):
            low = guess
            guess = min(int(1.1 * low), (low + high) // 2)
        else:
            high = guess
            guess = (low + high) // 2 if low else int(0.94 * high)
    if not low:
        raise RuntimeError("no sequence fits into memory")
    return low


def _predict(loop: Loop, fits: Callable[[int], bool]) -> int:
    """Tokens that should fit, from the peaks of two short steps: memory is linear in them."""
    points = []
    for tokens in (4096, 8192):
        reset_peaks()
        if not fits(tokens):
            return tokens
        points.append(torch.cuda.max_memory_allocated())
    slope = max(1.0, (points[1] - points[0]) / 4096)
    total = torch.cuda.get_device_properties(0).total_memory
    total = min(total, (loop.case.memory_gib or 1e9) * 2**30)
    return int(8192 + (0.97 * total - points[1]) / slope)


def _bind_head(model: Any) -> dict[str, Any]:
    """Give the model the head that our trainer gives it; the argument that asks for it."""
    from pantheraml.models.patching import PatchSet
    from pantheraml.training.head import bind_head, why_not_fused

    base = model.get_base_model()
    if model.device.type != "cuda" or why_not_fused(base) is not None:
        return {}
    bind_head(base, PatchSet())
    return {"fused_lm_head": True}
