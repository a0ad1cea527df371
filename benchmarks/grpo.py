"""What a step of GRPO takes by each way to generate its completions, on one GPU (or, to try the command, a CPU).

    python -m benchmarks.grpo --model /models/llama-8b --json grpo.json
    python -m benchmarks.grpo --shape tiny --prompts 2 --tokens 8 --cpu

    fused          our layers: decoding by recorded steps, the training by fused kernels
    plain          transformers' own layers (``kernels="off"``) and its ``generate``
    continuous     the same with ``use_transformers_continuous_batching=True``

Every way trains an adapter on 16-bit weights, with the same prompts; completions go on to their full length, since the
weights are random. Each is a process of its own. The first third of the steps is warm-up. The exit code is 1 when a way
fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.child import environment
from benchmarks.device import peaks, reset_peaks, synchronize, versions
from benchmarks.scaling import tell
from benchmarks.shapes import add_model_options, model_of

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fused": ({}, {}),
    "plain": ({"kernels": "off"}, {}),
    "continuous": ({"kernels": "off"}, {"use_transformers_continuous_batching": True}),
}


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig

    from pantheraml import FastLanguageModel
    from pantheraml.training.grpo import PantheraMLGRPOTrainer

    loading, generating = WAYS[way]
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=options.prompt + options.tokens, load_in_16bit=True,
        device_map="cpu" if options.cpu else None, **loading,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(model, r=16)
    warm = max(1, options.steps // 3)
    generator = torch.Generator().manual_seed(0)
    letters = [
        [chr(97 + int(number)) for number in torch.randint(26, (options.prompt - 1,), generator=generator)]
        for _ in range(options.prompts * options.steps)
    ]

    class Clock(TrainerCallback):
        """Waits for the device at both ends of what is timed."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == warm:
                synchronize()
                reset_peaks()
                self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == options.steps:
                synchronize()
                self.passed = time.perf_counter() - self.began

    clock, written = Clock(), []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Differs within a group, and counts what was written."""
        written.append(sum(map(len, completion_ids)))
        return [float(sum(ids) % 7) for ids in completion_ids]

    model.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder, per_device_train_batch_size=options.group, num_generations=options.group, logging_steps=1,
            gradient_accumulation_steps=options.prompts, max_completion_length=options.tokens, report_to="none",
            max_steps=options.steps, learning_rate=1e-5, save_strategy="no", disable_tqdm=True, use_cpu=options.cpu,
            bf16=not options.cpu, **generating,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": ["".join(row) for row in letters]})
        trainer = PantheraMLGRPOTrainer(
            model, reward, args, tokenizer=tokenizer, train_dataset=data, callbacks=[clock]
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    steps = options.steps - warm
    tokens = sum(written[-steps:])
    return {
        "way": way, "status": "ok", "s": clock.passed / steps, "tokens": tokens / steps,
        "tok_s": tokens / clock.passed, "grad_norm": logs[-1]["grad_norm"], **peaks(), **versions(),
    }  # fmt: skip


def run(way: str, words: list[str], timeout: float) -> dict[str, Any]:
    """The figures of one way, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.grpo", *words, f"--way={way}", f"--json={result}"]
        try:
            done = subprocess.run(
                command, env=environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"way": way, "status": f"stopped after {timeout:.0f} s", "printed": ""}
        if done.returncode:
            return {"way": way, "status": f"code {done.returncode}", "printed": done.stdout[-4000:]}
        return json.loads(result.read_text())


def markdown(lines: list[dict[str, Any]]) -> str:
    """The ways as a table."""
    rows = [
        "| completions by | s a step | tokens generated a second | GiB | gradient norm |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        if line["status"] != "ok":
            rows.append(f"| {line['way']} | {line['status']}: {line['printed'].strip().splitlines()[-1:]} |")
            continue
        rows.append(
            f"| {line['way']} | {line['s']:.2f} | {line['tok_s']:,.0f} | {line['allocated_gib'] or 0:.2f} | "
            f"{line['grad_norm']:.4f} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--ways", default=",".join(WAYS), help="with commas")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt, about")
    parser.add_argument("--tokens", type=int, default=128, help="of a completion")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one way")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path, help="file of all figures")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # this process trains itself
    options = parser.parse_args()
    options.model = model_of(options)
    if options.way:
        options.json.write_text(json.dumps(measure(options.way, options)))
        return 0
    names = ("prompts", "group", "prompt", "tokens", "steps", "model")
    words = [f"--{name}={getattr(options, name)}" for name in names] + ["--cpu"] * options.cpu
    return tell((run(way, words, options.timeout) for way in options.ways.split(",")), markdown, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
