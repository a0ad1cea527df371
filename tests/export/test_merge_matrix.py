"""Every family in every precision, saved by us, in plain transformers and PEFT; the table of docs/saving.md.

``python -m tests.export.test_merge_matrix`` measures anew and writes the table.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pantheraml import FastLanguageModel
from pantheraml.export.gguf.save import save_gguf
from pantheraml.export.merge import save_merged
from tests import tiny
from tests.export.models import adapted, logits
from tests.live_bytes import LiveBytes

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]
PAGE = Path(__file__).parents[2] / "docs" / "saving.md"
BEGIN, END = (
    "<!-- merged: python -m tests.export.test_merge_matrix -->\n",
    "<!-- end of merged -->",
)
# What the base model is held in, and how the merged one is saved.
PRECISIONS = {
    "float32": (dict(load_in_4bit=False, dtype="float32"), "float32"),
    "bfloat16": (dict(load_in_4bit=False, dtype="bfloat16"), None),
    "float16": (dict(load_in_4bit=False, dtype="float16"), None),
    "NF4": (dict(load_in_4bit=True, dtype="bfloat16"), None),
    "8-bit": (dict(load_in_8bit=True, dtype="bfloat16"), None),
    "FP8": (dict(load_in_fp8=True, dtype="bfloat16"), None),
}


def is_usual(family: str, precision: str) -> bool:
    """Whether it is tested every time; rare precisions are so with one family of each kind."""
    return precision in ("float32", "bfloat16", "NF4") or family in ("llama", "gemma3_text", "gpt_oss")


def checkpoint(root: Path, family: str) -> Path:
    """A tiny checkpoint whose sizes are whole blocks of every quantisation."""
    folder = root / family
    return folder if folder.exists() else tiny.save_checkpoint(folder, family, intermediate_size=128)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits, in parts of the largest, of nine tokens in ten.

    A router that is rounded may send the tenth to another expert.
    """
    of_tokens = (found - expected).abs().amax(-1).flatten()
    return float(of_tokens.quantile(0.9) / expected.abs().max())


def train_and_save(base: Path, precision: str, folder: Path):
    """The trained model, after its adapter and the merged model were saved, and what it computes."""
    options, dtype = PRECISIONS[precision]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), max_seq_length=64, device_map="cpu", kernels="off", use_multi_gpu=False, **options
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    expected = logits(model.eval())
    model.save_pretrained(folder / "adapter", tokenizer)
    model.save_pretrained_merged(folder / "merged", tokenizer, dtype=dtype, max_shard_size="100KB")
    assert len(list((folder / "merged").glob("model-*.safetensors"))) > 1
    with model.disable_adapter():
        assert difference(logits(model), expected) > 0.05
    return model, expected


@pytest.fixture(scope="module")
def documented() -> dict[tuple[str, str], float]:
    """Family and precision -> the figure in the page."""
    lines = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {
        (row[0], precision): float(cell)
        for row in rows[1:]
        for precision, cell in zip(rows[0][1:], row[1:], strict=True)
    }


@pytest.mark.promise("F8")
@pytest.mark.parametrize(
    ("family", "precision"),
    [
        pytest.param(family, precision, marks=[] if is_usual(family, precision) else pytest.mark.slow)
        for family in tiny.FAMILIES
        for precision in PRECISIONS
    ],
)
def test_merged_it_is_the_trained_model(family, precision, documented, tmp_path_factory, tmp_path):
    base = checkpoint(tmp_path_factory.getbasetemp(), family)
    _, expected = train_and_save(base, precision, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    error = difference(logits(merged), expected)
    assert error <= documented[family, precision], "type: python -m tests.export.test_merge_matrix"
    if precision == "float32":
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        again = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)


@pytest.mark.promise("F8")
def test_memory_does_not_grow_with_the_model(tokenizer, tmp_path):
    """Beyond the model: a shard and a layer, or for GGUF one weight."""
    layer = 2 * (3 * 64**2 + 3 * 64 * 256)  # bytes in bfloat16
    most = defaultdict(list)
    for layers in (3, 9):
        model = adapted(tiny.build_model("llama", intermediate_size=256, num_hidden_layers=layers))
        for name, save in {
            "merged": lambda model=model: save_merged(model, tmp_path / "merged", max_shard_size=layer),
            "gguf": lambda model=model: save_gguf(model, tmp_path / "gguf", tokenizer, ["bf16", "q8_0"]),
        }.items():
            with LiveBytes() as live:
                save()
            most[name].append(live.most)
    for name, (small, large) in most.items():
        assert large == pytest.approx(small, rel=0.05), name
    assert most["merged"][0] < 5 * layer and most["gguf"][0] < 3 * layer


def table(errors: dict[tuple[str, str], float]) -> str:
    """Rows of families, columns of precisions; figures rounded up, with room for other machines, from 1e-5."""
    lines = [f"| | {' | '.join(PRECISIONS)} |", f"|---{'|---' * len(PRECISIONS)}|"]
    for family in tiny.FAMILIES:
        cells = [f"{_rounded_up(max(1.2 * errors[family, precision], 1e-5)):g}" for precision in PRECISIONS]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rounded_up(value: float) -> float:
    step = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / step - 1e-9) * step


def write_table(root: Path) -> None:
    """Measure all, and put the table into the page."""
    errors = {}
    for family in tiny.FAMILIES:
        for precision in PRECISIONS:
            folder = root / f"{family} {precision}"
            _, expected = train_and_save(checkpoint(root, family), precision, folder)
            merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
            errors[family, precision] = difference(logits(merged), expected)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(errors)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        write_table(Path(place))
