"""The support matrix of docs/parallelism.md, of the table that refuses: ``python -m tests.docs.support_matrix``."""

from __future__ import annotations

from pathlib import Path

from pantheraml.config.combinations import REFUSED, Refusal

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"
BEGIN, END = (
    "<!-- support matrix: python -m tests.docs.support_matrix -->\n",
    "<!-- end of the support matrix -->",
)
# Columns: what spreads the work, and under which names the table has it.
WAYS = {
    "`ddp`": ("ddp",),
    "`fsdp`": ("fsdp",),
    "`deepspeed`, stages 0-2": ("deepspeed",),
    "stage 3": ("deepspeed", "deepspeed, zero_stage=3"),
    "`tensor`": ("tensor",),
    "`pipeline`": ("pipeline",),
}
# What does not go there in a part of the cases.
IN_PART = {"`deepspeed`, stages 0-2": "deepspeed, cut gradients"}
FEATURES = {
    "4-bit": "4-bit weights",
    "8-bit": "8-bit weights",
    "FP8": "FP8 weights",
    "full_finetuning": "full fine-tuning",
    "use_dora": "DoRA",
    "init_lora_weights": "PiSSA, OLoRA and other starts from weights",
    "target_parameters": "adapters of experts",
    "bias": "trained biases",
    "num_labels": "classifiers",
    "fused kernels": "fused layers",
    "merge_micro_batches": "merged micro-batches",
    "keep_dequantized": "`keep_dequantized`",
    "torch_compile": "`torch_compile`",
    "async_save": "`async_save`",
    "on_non_finite=restore": '`on_non_finite="restore"`',
    "out-of-memory repeats": "steps repeated when memory runs out",
    "another number of ranks": "going on with another number of ranks",
}


def support_matrix() -> str:
    """The table, and the reasons below it."""
    reasons: dict[Refusal, int] = {}
    lines = [f"| | {' | '.join(WAYS)} |", f"|---{'|---' * len(WAYS)}|"]
    for feature, label in FEATURES.items():
        cells = []
        for way, names in WAYS.items():
            found = next((REFUSED[name, feature] for name in names if (name, feature) in REFUSED), None)
            partly = REFUSED.get((IN_PART.get(way, ""), feature))
            refused = found or partly
            number = None if refused is None else reasons.setdefault(refused, len(reasons) + 1)
            cells.append("yes" if number is None else f"{'in part' if found is None else 'no'} ({number})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    told = (
        f"{number}. {one.reason[0].upper()}{one.reason[1:]} {one.instead}" for one, number in reasons.items()
    )
    return "\n".join([*lines, "", *told]) + "\n"


def with_matrix(page: str) -> str:
    """``page`` with the table of now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{support_matrix()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_matrix(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
