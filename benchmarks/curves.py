"""The same training on any number of GPUs: loss curves of one run in several layouts, in one table and one plot.

    python -m benchmarks.curves --model /models/llama-8b --layouts 1x4,1x2,2x4,4x4,8x2 --json curves.json
    python -m benchmarks.curves --plot docs/images/curves.png --json curves.json
    python -m benchmarks.curves --shape tiny --cpu --layouts 1x4,2x2 --steps 10

A layout is GPUs x rows of a micro-batch. Every run starts from the same weights and takes the same rows in the same
steps (``global_batch_size``); rows are text of Python's standard library, of lengths that differ, with LoRA dropout.
What differs between layouts is the order in which sums are rounded: "1x4,1x2" shows how much that is on one GPU.
Layouts that together need no more GPUs than the widest one run beside each other. The exit code is 1 when a run fails.
Plots need matplotlib (extra ``plots``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.child import environment
from benchmarks.scaling import visible
from benchmarks.shapes import add_model_options, model_of

Curve = dict[str, Any]


def texts(count: int, longest: int) -> list[str]:
    """Pieces of the standard library's source, 100 to ``longest`` characters each; the same on every machine alike."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    source = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    found, place = [], 0
    for number in range(count):
        length = 100 + (number * 7919) % (longest - 100)
        found.append(source[place : place + length])
        place = (place + length) % (len(source) - longest)
    return found


def train(options: argparse.Namespace) -> None:
    """One run, on the ranks of ``options.ranks``; rank 0 writes its losses and gradient norms to ``options.output``."""
    from pantheraml import MultiGPUConfig, is_main_process, setup_multi_gpu

    config = setup_multi_gpu(MultiGPUConfig(num_processes=options.ranks))
    from datasets import Dataset

    from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments

    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=options.seq, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_dropout=options.dropout)
    rows = Dataset.from_dict({"text": texts(options.steps * options.rows, 3 * options.seq)})
    trainer = PantheraMLDistributedTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows,
        args=PantheraMLTrainingArguments(
            output_dir=str(options.output), per_device_train_batch_size=options.batch,
            global_batch_size=options.rows, max_steps=options.steps, learning_rate=2e-4, warmup_steps=5,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=3407,
        ),
        multi_gpu_config=config,
    )  # fmt: skip
    trainer.train()
    if is_main_process():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        curve = {name: [float(entry[name]) for entry in logs] for name in ("loss", "grad_norm")}
        (options.output / "curve.json").write_text(json.dumps(curve))


def run(layout: str, first: int, options: argparse.Namespace, model: str) -> Curve:
    """The curve of one layout, on GPUs from the ``first`` on, or how it failed."""
    ranks, batch = map(int, layout.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--model={model}", f"--output={folder}", f"--ranks={ranks}", f"--batch={batch}"]
        words += [f"--{name}={getattr(options, name)}" for name in ("seq", "steps", "rows", "dropout")]
        gpus = "" if options.cpu else visible(ranks, first)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.curves", *words], cwd=folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=options.timeout, check=False,
            env=environment(CUDA_VISIBLE_DEVICES=gpus),
        )  # fmt: skip
        file = Path(folder, "curve.json")
        if done.returncode or not file.exists():
            return {"layout": layout, "failed": f"code {done.returncode}", "printed": done.stdout[-4000:]}
        return {"layout": layout, **json.loads(file.read_text())}


def all_runs(options: argparse.Namespace, model: str) -> list[Curve]:
    """The curves of all layouts: beside each other where the GPUs of the widest one suffice, in their order."""
    widest = max(_width(layout) for layout in options.layouts.split(","))
    waves: list[list[str]] = [[]]
    for layout in options.layouts.split(","):
        if sum(map(_width, waves[-1])) + _width(layout) > widest:
            waves.append([])
        waves[-1].append(layout)
    found: list[Curve] = []
    for wave in waves:
        firsts = [sum(map(_width, wave[:place])) for place in range(len(wave))]
        with ThreadPoolExecutor(len(wave)) as pool:
            found += pool.map(lambda one, first: run(one, first, options, model), wave, firsts)
    return found


def _width(layout: str) -> int:
    """Its GPUs."""
    return int(layout.split("x", maxsplit=1)[0])


def table(curves: list[Curve]) -> str:
    """How far each curve is from the first one."""
    first = curves[0]
    lines = [
        "| GPUs x rows | first loss | last loss | loss, most apart | on average | gradient norm, most apart |"
    ]
    lines.append("|" + "---|" * 6)
    for curve in curves:
        if "failed" in curve or "failed" in first:
            lines.append(f"| {curve['layout']} | {curve.get('failed', 'nothing to compare with')} |")
            continue
        apart = [abs(a - b) for a, b in zip(curve["loss"], first["loss"], strict=True)]
        norms = [abs(a - b) / b for a, b in zip(curve["grad_norm"], first["grad_norm"], strict=True)]
        lines.append(
            f"| {curve['layout']} | {curve['loss'][0]:.5f} | {curve['loss'][-1]:.5f} | {max(apart):.1e} | "
            f"{sum(apart) / len(apart):.1e} | {max(norms):.1e} of it |"
        )
    return "\n".join(lines)


def plot(curves: list[Curve], file: Path) -> None:
    """The curves over one another, and below how far each is from the first."""
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    first = curves[0]
    for number, curve in enumerate(one for one in curves if "failed" not in one):
        ranks, batch = curve["layout"].split("x")
        name = f"{ranks} GPU{'s' if ranks != '1' else ''}, micro-batches of {batch}"
        steps = range(1, len(curve["loss"]) + 1)
        # The widest line lies lowest: where curves are one, all of them are seen.
        above.plot(steps, curve["loss"], label=name, linewidth=5 - number, color=f"C{number}")
        if number:
            apart = [abs(a - b) for a, b in zip(curve["loss"], first["loss"], strict=True)]
            below.semilogy(steps, apart, label=name, color=f"C{number}")
    above.set_ylabel("loss")
    above.legend()
    below.set_ylabel("|loss - loss of the first|")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--layouts", default="1x4,1x2,2x4", help="GPUs x rows of a micro-batch, with commas")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step, on all GPUs together")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--cpu", action="store_true", help="ranks on the CPU")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one run may take")
    parser.add_argument("--json", type=Path, help="file of all curves")
    parser.add_argument("--plot", type=Path, help="PNG to draw; of the curves in --json where it exists")
    for hidden, kind in (("--ranks", int), ("--batch", int), ("--output", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)  # of one run
    options = parser.parse_args()
    if options.output:
        train(options)
        return 0
    if options.plot and options.json and options.json.exists():
        curves = json.loads(options.json.read_text())["curves"]
    else:
        curves = all_runs(options, model_of(options))
    if options.json and not options.json.exists():
        options.json.write_text(json.dumps({"command": sys.argv, "curves": curves}, indent=1) + "\n")
    if options.plot:
        plot(curves, options.plot)
    print(table(curves))
    failed = [curve for curve in curves if "failed" in curve]
    for curve in failed:
        print(curve["printed"])
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
