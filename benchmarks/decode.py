"""Generation: tokens per second after warm-up, the first call, and the first token.

    python -m benchmarks.decode --json decode.json                     # ours, transformers compiled and not
    python -m benchmarks.decode --adapter --peers unsloth --batches 1,32

``ours`` is ``FastLanguageModel.for_inference(model)`` and ``model.generate(...)``. ``hf-static`` is plain transformers
with ``cache_implementation="static"``, which compiles the step; ``hf-dynamic`` is plain transformers as it comes.
Everyone generates greedily from random prompts and never stops early. Tokens per second count the new tokens of all
rows, and the time of the prompt is in them. Other options are those of ``benchmarks.lora_step``.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from benchmarks.cases import Case
from benchmarks.device import peaks, reset_peaks, synchronize
from benchmarks.peers import build

CALLS = 3


def measure(case: Case) -> dict[str, Any]:
    """Figures of one way to generate."""
    import torch

    built = build(case, adapter=case.adapter)
    model: Any = _ready(case, built.model)
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    vocab = min(model.config.vocab_size, 128000)
    ids = torch.randint(3, vocab, (case.batch, case.seq), generator=generator).to(model.device)
    settings: dict[str, Any] = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0
    )
    if case.who == "hf-static":
        settings["cache_implementation"] = "static"

    def call(new: int) -> float:
        """Seconds of one call."""
        synchronize()
        began = time.perf_counter()
        out = model.generate(**settings, max_new_tokens=new)
        synchronize()
        if out.shape[1] != case.seq + new:
            raise RuntimeError(f"{out.shape[1] - case.seq} of {new} tokens were generated")
        return time.perf_counter() - began

    first = call(case.new_tokens)
    call(case.new_tokens)
    reset_peaks()
    seconds = median(call(case.new_tokens) for _ in range(CALLS))
    memory = peaks()
    call(1)
    one = median(call(1) for _ in range(CALLS))
    result: dict[str, Any] = {
        "tok_s": case.batch * case.new_tokens / seconds,
        "ms": 1e3 * (seconds - one) / max(1, case.new_tokens - 1),
        "first_token_ms": 1e3 * one,
        "first_step_s": first,
        **memory,
        "load_s": built.load_s,
        "import_s": built.import_s,
        "recompute": "-",
    }
    if case.profile:  # of one whole call; "per layer" is per layer and new token
        from benchmarks.kernel_times import start, summary

        profiler = start()
        call(case.new_tokens)
        profiler.stop()
        layers = model.config.get_text_config().num_hidden_layers
        result["kernel_times"] = summary(profiler, layers * case.new_tokens)
    return result


def _ready(case: Case, model: Any) -> Any:
    if case.who == "ours":
        from pantheraml import FastLanguageModel

        return FastLanguageModel.for_inference(model)
    if case.who == "unsloth":
        from unsloth import FastLanguageModel as Unsloth  # pyright: ignore[reportMissingImports]

        return Unsloth.for_inference(model)
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", default="1,32", help="of 1 and 32")
    options, rest = parser.parse_known_args()
    from benchmarks import lora_step

    rows = ",".join(f"decode-{batch}" for batch in options.batches.split(","))
    return lora_step.main(["--rows", rows, *rest])


if __name__ == "__main__":
    raise SystemExit(main())
