"""The same short training by one rank and by all: a tiny random Llama, LoRA, float32, the same rows in a step."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pantheraml.doctor.apart import call_apart
from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import Finding
from pantheraml.doctor.ranks import call_on_ranks, hide_a_single_gpu, num_ranks

NAME = "one rank and several"
STEPS, ROWS_A_RANK = 4, 2
_VOCABULARY = 512
_LONGEST = 48
_SEED = 3407
_SECONDS = 180.0
# Float32 sums of another order differ by 1e-6 and less; a row that is lost changes a loss by 1e-3.
TOLERANCE = 1e-4

Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Step:
    """What a step logged."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Facts:
    """Two trainings.

    Attributes:
        ranks: of the second.
        device: what they trained on, ``"GPUs"`` or ``"CPU"``.
        alone: the steps of one rank.
        together: of all ranks.
    """

    ranks: int
    device: str
    alone: tuple[Step, ...]
    together: tuple[Step, ...]


def probe(gpus: int) -> Facts:
    """Train alone in one process, and at the same time on all ranks."""
    ranks = num_ranks(gpus)
    rows = build_rows(ranks * ROWS_A_RANK * STEPS)
    hide_a_single_gpu(gpus)
    with tempfile.TemporaryDirectory(prefix="pantheraml-doctor-") as folder, ThreadPoolExecutor(1) as beside:
        alone = beside.submit(call_apart, train, folder, rows, ranks * ROWS_A_RANK, seconds=_SECONDS)
        together = call_on_ranks(train, folder, rows, ROWS_A_RANK, gpus=gpus)
        return Facts(ranks, "GPUs" if gpus > 1 else "CPU", alone.result(), together)


def build_rows(count: int) -> Rows:
    """Random rows of 8 to 48 tokens, the first of which carry no loss."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    found: Rows = []
    for index in range(count):
        length = int(torch.randint(8, _LONGEST + 1, (1,), generator=generator))
        ids = torch.randint(3, _VOCABULARY, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (index % 5) + ids[index % 5 :]})
    return found


def train(folder: str, rows: Rows, per_device: int, seed: int = _SEED) -> tuple[Step, ...]:
    """Train this process, or this rank.

    Args:
        folder: for what is written; each training has one of its own in it.
        rows: all of them, the same on every rank.
        per_device: rows of a step on this rank.
        seed: of weights, adapter and order.

    Returns:
        What each step logged; the same on all ranks.
    """
    from datasets import Dataset

    from pantheraml import FastLanguageModel, PantheraMLDistributedTrainer, PantheraMLTrainingArguments
    from pantheraml.distributed.process_group import barrier, group_size, is_first_of_group

    own = Path(folder) / f"of_{group_size()}"
    if is_first_of_group():
        save_model(own / "model", seed)
    barrier()  # the others wait for it
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(own / "model"), max_seq_length=_LONGEST, load_in_4bit=False, dtype="float32"
    )
    model = FastLanguageModel.get_peft_model(model, r=4, random_state=seed)
    arguments = PantheraMLTrainingArguments(
        output_dir=str(own / "run"),
        per_device_train_batch_size=per_device,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        fp16=False,
        seed=seed,
    )
    trainer = PantheraMLDistributedTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), tokenizer=tokenizer
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return tuple(Step(entry["loss"], entry["grad_norm"]) for entry in logged)


def save_model(folder: Path, seed: int) -> None:
    """Write a random Llama with 2 layers of width 64, and a tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(_VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)


def judge(facts: Facts) -> list[Finding]:
    """One row."""
    where = f"{facts.ranks} ranks ({facts.device})"
    if len(facts.alone) != STEPS or len(facts.together) != STEPS:
        seen = f"one rank did {len(facts.alone)} of {STEPS} steps, {where} did {len(facts.together)}"
        return [Finding(NAME, "bad", seen, _fix(facts))]
    worst = 0.0
    for number, (alone, together) in enumerate(zip(facts.alone, facts.together, strict=True), 1):
        for what in ("loss", "grad_norm"):
            one, other = getattr(alone, what), getattr(together, what)
            difference = abs(one - other) / max(abs(one), 1e-12)
            if not difference <= TOLERANCE:  # a number that is none differs, too
                seen = f"step {number}: {what} {one:.6f} on one rank, {other:.6f} on {where}"
                return [Finding(NAME, "bad", seen, _fix(facts))]
            worst = max(worst, difference)
    seen = (
        f"{STEPS} steps on one rank and on {where}: losses and gradient norms differ by {worst:.0e} at most"
    )
    return [Finding(NAME, "ok", seen)]


def _fix(facts: Facts) -> str:
    if facts.device == "GPUs":
        return (
            "Train on one GPU meanwhile (CUDA_VISIBLE_DEVICES=0). Type NCCL_P2P_DISABLE=1 pantheraml doctor: if it is "
            "green then, the links between GPUs are at fault."
        )
    return "Type pip check, and pip install --force-reinstall torch accelerate transformers trl peft."


CHECK = Check(
    NAME,
    probe,
    judge,
    if_it_fails="Mend the other red rows first; then type pantheraml doctor --json > doctor.json and report it.",
    seconds=_SECONDS + 60,
    counts=True,
    is_long=True,
)
