"""The benchmark command on a CPU with a tiny model, so that it does not rot: figures mean nothing here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import lora_step, one_case
from benchmarks.cases import ROWS, Case, Settings, cases_of
from benchmarks.device import BadGradient, check_norm, checked_norm
from benchmarks.kernel_times import group, table
from benchmarks.plain_loop import search
from benchmarks.shapes import make_llama
from benchmarks.table import compare, markdown, merge
from benchmarks.train_run import TokenCounter, alpaca_lengths
from pantheraml.training.head import needs_cpu_head


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_llama(folder, shape="tiny", device="cpu")
    return str(folder)


def case(model, **settings) -> Case:
    settings = (
        dict(row="default", kind="step", who="ours", precision="float32", seq=32, batch=2, steps=2) | settings
    )
    return Case(model=model, **settings)


@pytest.mark.slow
def test_the_command(model, tmp_path, monkeypatch, capsys):
    # What a process costs on a shared CPU is paid once; the other cases run in this process.
    real, started = lora_step.run_case, []

    def run_case(case, timeout):
        started.append(case.who)
        if len(started) == 1:
            return real(case, timeout)
        return {**one_case.run(case), "wall_s": 0.0}

    monkeypatch.setattr(lora_step, "run_case", run_case)
    file = tmp_path / "figures" / "run.json"
    words = f"--model {model} --rows default --peers liger,hf --steps 2 --seq 32 --batch 2 --rounds 2"
    code = lora_step.main([*words.split(), "--precision", "float32", "--json", str(file)])
    assert code == 0
    stored = json.loads(file.read_text())
    lines = {line["who"]: line for line in stored["lines"]}
    assert list(lines) == ["ours", "ours-loop", "liger", "hf", "limit"]
    for who in ("ours", "ours-loop", "hf"):
        line = lines[who]
        assert line["status"] == "ok" and line["rounds"] == 2 and len(line["each_round"]) == 2
        assert line["grad_norm"] > 0 and 5 < line["loss"] < 8 and line["share"] > 0
        assert line["versions"]["torch"] and line["tok_s"] > 0 and line["first_step_s"] > 0
    assert lines["hf"]["ratio"] == pytest.approx(lines["ours"]["tok_s"] / lines["hf"]["tok_s"])
    assert lines["liger"]["status"] == "not installed" and "liger_kernel" in lines["liger"]["reason"]
    assert started.count("liger") == 1 and started[:5] == list(lines)
    assert stored["command"].startswith("python -m benchmarks.lora_step --model")
    out = capsys.readouterr().out
    assert "| ours | float32 |" in out and "| liger | float32 | auto | not installed" in out


@pytest.mark.parametrize("who", ["ours", "hf"])
def test_ragged_rows_count_real_tokens_only(model, who):
    if who == "hf" and needs_cpu_head(torch.device("cpu")):
        pytest.skip("this TRL computes its loss on GPUs only")
    ragged = case(model, kind="ragged", who=who, seq=2048, accumulation=2, steps=3, samples=12)
    outcome = one_case.run(ragged)
    assert outcome["status"] == "ok", outcome
    lengths = alpaca_lengths(12)
    # A step has 4 of the 12 rows; rows are shuffled, so only bounds are known.
    tokens = outcome["tok_s"] * outcome["ms"] / 1e3
    assert sum(sorted(lengths)[:4]) <= round(tokens) <= sum(sorted(lengths)[-4:])


def test_longest_and_profile(model):
    outcome = one_case.run(case(model, kind="longest", who="ours-loop", seq=64, batch=1))
    assert outcome["status"] == "ok" and outcome["tokens"] == 64 and outcome["is_at_least"]
    outcome = one_case.run(case(model, steps=3, profile=True))
    assert outcome["status"] == "ok" and outcome["kernel_times"]["layers"] == 2


@pytest.mark.parametrize("who", ["ours", "hf-static", "hf-dynamic"])
def test_decoding(model, who):
    decode = case(model, kind="decode", who=who, seq=5, new_tokens=4, adapter=who == "ours")
    outcome = one_case.run(decode)
    assert outcome["status"] == "ok" and outcome["tok_s"] > 0 and outcome["first_token_ms"] > 0


def test_a_bad_gradient_fails_the_run(model, monkeypatch):
    from benchmarks import plain_loop

    monkeypatch.setattr(plain_loop.Loop, "update", lambda self: self.optimizer.zero_grad())
    outcome = one_case.run(
        case(model, who="ours-loop")
    )  # no update: LoRA's B stays zero, so A's gradient is too
    assert outcome["status"] == "bad gradient" and "14 zero" in outcome["reason"]
    assert lora_step.is_failure({"who": "hf", **outcome})


def test_which_lines_fail_the_run():
    assert lora_step.is_failure({"who": "ours", "status": "failed"})
    assert not lora_step.is_failure({"who": "unsloth", "status": "failed"})
    assert not lora_step.is_failure({"who": "unsloth", "status": "not installed"})
    assert lora_step.is_failure({"who": "unsloth", "status": "bad gradient"})


def test_gradients_are_checked():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    with pytest.raises(BadGradient, match="3 are missing"):
        checked_norm(weights)
    for weight in weights:
        weight.grad = torch.ones(2)
    assert checked_norm(weights) == pytest.approx(6**0.5)
    weights[0].grad = torch.tensor([1.0, float("nan")])
    weights[1].grad = torch.zeros(2)
    with pytest.raises(BadGradient, match="0 are missing, 1 zero, 1 not finite"):
        checked_norm(weights)
    with pytest.raises(BadGradient, match="nothing is trained"):
        checked_norm([])
    for norm in (0.0, float("nan"), float("inf")):
        with pytest.raises(BadGradient):
            check_norm(norm)


def test_every_row_has_cases():
    for name in ROWS:
        cases = cases_of(name, Settings(model="m", peers=("unsloth", "hf")))
        assert cases[0].who.startswith("ours") and "unsloth" in [entry.who for entry in cases]
        assert all(Case(**json.loads(json.dumps(entry.to_dict()))) == entry for entry in cases)
    decode = cases_of("decode-1", Settings(model="m", peers=("unsloth", "hf")))
    assert [entry.who for entry in decode] == ["ours", "hf-static", "hf-dynamic", "unsloth"]
    fp8 = cases_of("fp8", Settings(model="m", peers=("unsloth",)))
    assert [entry.precision for entry in fp8] == ["fp8", "fp8", "bf16", "fp8"]
    assert cases_of("ragged", Settings(model="m"))[0].steps == 125


def test_lengths_look_like_alpacas():
    lengths = sorted(alpaca_lengths(1000))
    assert 80 <= lengths[500] <= 100 and 600 <= lengths[-1] <= 1024 and lengths[0] >= 20
    assert alpaca_lengths(1000) == alpaca_lengths(1000)


def test_tokens_between_steps():
    def batch(tokens, padding=0):
        ids = torch.zeros(1, tokens + padding)
        mask = {"attention_mask": torch.tensor([[1] * tokens + [0] * padding])} if padding else {}
        return {"input_ids": ids, **mask}

    steps = iter([[batch(1), batch(2)], [batch(3, 2), batch(0)], [batch(5), batch(6, 1)]])
    trainer = SimpleNamespace(get_batch_samples=lambda *a: (next(steps), None))
    counter = TokenCounter(trainer)
    for _ in range(3):
        trainer.get_batch_samples(None, 2, "cpu")
    assert counter.between(1, 3) == 3 + 0 + 5 + 6


def test_the_search_finds_the_longest():
    for longest, guess in (
        (40_000, 39_000),
        (40_000, 60_000),
        (40_000, 10_000),
        (131_072, 200_000),
        (300, 5000),
    ):
        found = search(lambda tokens, most=longest: tokens <= most, 131_072, guess)
        assert 0.96 * longest - 256 <= found <= longest
    with pytest.raises(RuntimeError, match="no sequence fits"):
        search(lambda tokens: False, 131_072, 5000)


def test_kernels_are_grouped_and_overlaps_merged():
    kernels = [
        ("nvjet_tst_128x128", 0.0, 100.0),
        ("cudnn_flash_fprop", 50.0, 150.0),  # overlaps
        ("_glu_kernel", 200.0, 220.0),
        ("Memcpy DtoD", 205.0, 210.0),  # inside
        ("ampere_bf16_gemm", 300.0, 310.0),
    ]
    times = group(kernels, layers=2, ours=frozenset({"_glu_kernel"}))
    assert times["span_ms"] == pytest.approx(0.310) and times["busy_ms"] == pytest.approx(0.180)
    assert times["gaps_ms"] == pytest.approx(0.130) and times["launches"] == 5
    assert times["groups"] == {
        "GEMM, from 60 us": [0.1, 1],
        "attention": [0.1, 1],
        "ours: _glu_kernel": [0.02, 1],
        "GEMM, below 60 us": [0.01, 1],
        "copies": [0.005, 1],
    }
    assert "| gaps, nothing runs | 0.13 | 41.9% | 65 | 0 |" in table(times)


def test_rounds_are_merged_by_their_median():
    ok = [{"status": "ok", "tok_s": speed, "recompute": True, "name": "x"} for speed in (10.0, 30.0, 20.0)]
    assert merge(ok) == {
        "status": "ok", "tok_s": 20.0, "recompute": True, "name": "x", "rounds": 3, "spread": 1.0,
    }  # fmt: skip
    failed = {"status": "failed", "reason": "out of memory"}
    assert merge([failed, *ok])["rounds"] == 3 and merge([failed])["reason"] == "out of memory"
    assert merge([*ok, {"status": "bad gradient", "reason": "zero"}])["status"] == "bad gradient"


def test_tables_leave_out_empty_columns():
    lines = [
        {"row": "a", "who": "ours", "precision": "bf16", "recompute": "auto", "status": "ok", "tok_s": 200.0},
        {"row": "a", "who": "hf", "precision": "bf16", "recompute": "auto", "status": "ok", "tok_s": 100.0},
        {
            "row": "a",
            "who": "limit",
            "precision": "bf16",
            "recompute": "auto",
            "status": "ok",
            "tok_s": 400.0,
        },
        {
            "row": "a",
            "who": "liger",
            "precision": "bf16",
            "recompute": "auto",
            "status": "failed",
            "reason": "a|b",
        },
    ]
    compare(lines)
    text = markdown(lines, {"a": "title"})
    assert "| who | precision | recompute | tok/s | of limit | ours / this |" in text
    assert (
        "| ours | bf16 | auto | 200 | 0.50 | - |" in text
        and "| hf | bf16 | auto | 100 | 0.25 | 2.00 |" in text
    )
    assert "| limit | bf16 | - | 400 | - | - |" in text and "failed: a/b" in text


@pytest.mark.parametrize("words", ["--rows fast", "--peers axolotl", "--model a --shape tiny"])
def test_unknown_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        lora_step.parse(words.split())
    assert stop.value.code == 2
