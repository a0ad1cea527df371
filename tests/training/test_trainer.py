"""PantheraMLTrainer: what it adds to TRL's trainer, on a tiny model and real rows."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from pantheraml import FastLanguageModel, PantheraMLTrainer, PantheraMLTrainingArguments, UnslothTrainer
from pantheraml.errors import ConfigError, DataError, SaveError
from pantheraml.models.patching import PatchSet
from pantheraml.models.recompute import is_recomputing
from pantheraml.training.head import bind_cpu_head, needs_cpu_head
from tests import tiny
from tests.small_disk import small_disk

ALPACA = Dataset.from_list(
    [
        {"instruction": "Name a colour.", "input": "", "output": "Blue."},
        {"instruction": "Add the numbers.", "input": "2 and 3", "output": "Five is the answer."},
        {"instruction": "Say hello.", "input": "", "output": "Hello to you and to all the others here."},
        {"instruction": "Opposite?", "input": "hot", "output": "Cold."},
        {"instruction": "Capital of France?", "input": "", "output": "Paris, on the river Seine."},
    ]
)


@pytest.fixture
def load(llama):
    def load(**kwargs):
        return FastLanguageModel.from_pretrained(
            str(llama), **{"max_seq_length": 64, "load_in_4bit": False, **kwargs}
        )

    return load


@pytest.fixture
def arguments(tmp_path):
    def build(kind=PantheraMLTrainingArguments, **kwargs):
        base = dict(
            output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_steps=1, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        return kind(**{**base, **kwargs})

    return build


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.promise("A8")
def test_the_known_script(load, arguments, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    model, tokenizer = load()
    model = FastLanguageModel.get_peft_model(model, r=4)
    trainer = PantheraMLTrainer(
        model=model, tokenizer=tokenizer, train_dataset=ALPACA, args=arguments(max_steps=8)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(losses(trainer)) == 8 and losses(trainer)[-1] < losses(trainer)[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert "Alpaca" in caplog.text and "Paris" not in caplog.records[0].message
    assert "2 x 1 x 1 = 2 rows a step" in caplog.text and "in float32" in caplog.text
    assert "‹" in caplog.text


@pytest.mark.skipif(
    needs_cpu_head(torch.device("cpu")), reason="TRL's own trainer cannot train on a CPU here"
)
def test_it_trains_exactly_like_trl(load, arguments):
    """Same model, rows and arguments in TRL's own trainer give the same losses and gradient norms."""
    histories = []
    for kind in (PantheraMLTrainer, SFTTrainer):
        model, tokenizer = load(kernels="off")
        model = FastLanguageModel.get_peft_model(model, r=4)
        rows = Dataset.from_dict({"text": [row["output"] * 3 for row in ALPACA]})
        trainer = kind(
            model,
            args=arguments(SFTConfig, max_steps=4, max_length=64, bf16=False),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
        histories.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
    assert histories[0] == histories[1]


def test_the_cpu_head_gives_the_figures_of_trls_own(load, arguments):
    """Loss, gradient norm, entropy and accuracy with the head for TRL 1.15, against whatever this TRL computes."""
    if needs_cpu_head(torch.device("cpu")):
        pytest.skip("this TRL has no head of its own on a CPU")
    histories = []
    for own in (False, True):
        model, tokenizer = load(kernels="off")
        model = FastLanguageModel.get_peft_model(model, r=4)
        trainer = PantheraMLTrainer(model, arguments(max_steps=3), train_dataset=ALPACA, tokenizer=tokenizer)
        if own:
            bind_cpu_head(model.get_base_model(), PatchSet())
        trainer.train()
        names = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
        histories.append(
            [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
        )
    assert torch.allclose(*(torch.tensor(history) for history in histories), rtol=1e-4)


@pytest.mark.promise("A8")
def test_positional_model_and_either_name_of_the_tokenizer(load, arguments):
    model, tokenizer = load()
    assert PantheraMLTrainer(model, arguments(), train_dataset=ALPACA, processing_class=tokenizer)
    with pytest.raises(ConfigError, match="tokenizer= and processing_class="):
        PantheraMLTrainer(
            model,
            arguments(),
            train_dataset=ALPACA,
            processing_class=tokenizer,
            tokenizer=tiny.build_tokenizer(),
        )
    with pytest.raises(ConfigError, match="got no tokenizer"):
        PantheraMLTrainer(model, arguments(), train_dataset=ALPACA)
    with pytest.raises(ConfigError, match="The trainer takes a loaded model"):
        PantheraMLTrainer("some/model", arguments(), train_dataset=ALPACA, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="args is a dict"):
        PantheraMLTrainer(model, {"max_steps": 1}, train_dataset=ALPACA, tokenizer=tokenizer)
    assert UnslothTrainer is PantheraMLTrainer


@pytest.mark.promise("A8")
def test_a_model_without_adapter_gets_one_and_is_told(load, arguments, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    model, tokenizer = load()
    trainer = PantheraMLTrainer(model, arguments(), train_dataset=ALPACA, tokenizer=tokenizer)
    assert isinstance(trainer.model, PeftModel) and "LoRA r=16 is attached" in caplog.text


def test_a_script_saves_the_adapter_that_its_trainer_attached(load, arguments, tmp_path):
    """By the model that it has: the one that it loaded, whose layers are the adapter's by now."""
    model, tokenizer = load()
    trainer = PantheraMLTrainer(model, arguments(), train_dataset=ALPACA, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "adapter", tokenizer)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    model.save_pretrained_merged(tmp_path / "lora", save_method="lora")
    assert (tmp_path / "lora" / "adapter_config.json").exists()
    plain = trainer.model.merge_and_unload()
    assert plain is model, "without the adapter it is saved as what it is"
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_full_finetuning_trains_every_weight(load, arguments):
    model, tokenizer = load(full_finetuning=True, load_in_4bit=None)
    trainer = PantheraMLTrainer(
        model, arguments(learning_rate=1e-2), train_dataset=ALPACA, tokenizer=tokenizer
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert not isinstance(trainer.model, PeftModel)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("policy", "kind", "written", "expected"),
    [
        (False, SFTConfig, {}, False),  # TRL's default True does not undo the model's policy
        (True, TrainingArguments, {}, True),
        ("auto", SFTConfig, {}, False),  # a tiny model fits
        ("unsloth", PantheraMLTrainingArguments, {}, True),
        (False, PantheraMLTrainingArguments, {"gradient_checkpointing": True}, True),
        (True, PantheraMLTrainingArguments, {"gradient_checkpointing": False}, False),
        (True, SFTConfig, {"gradient_checkpointing": False}, False),
        (False, TrainingArguments, {"gradient_checkpointing": True}, True),
    ],
)
def test_the_models_recompute_policy_rules(load, arguments, policy, kind, written, expected):
    model, tokenizer = load(use_gradient_checkpointing=policy)
    args = arguments(kind, max_steps=1, bf16=False, **written)
    trainer = PantheraMLTrainer(model, args, train_dataset=ALPACA, tokenizer=tokenizer)
    trainer.train()
    assert is_recomputing(trainer.model) is expected


def test_row_length_follows_the_model(load, arguments, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    model, tokenizer = load(max_seq_length=24)
    model = FastLanguageModel.get_peft_model(model, r=4)
    trainer = PantheraMLTrainer(model, arguments(), train_dataset=ALPACA, tokenizer=tokenizer)
    assert trainer.args.max_length == 24
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 24
    assert re.search(r"5 of 5 train rows are longer than 24 tokens \(the longest has \d+\)", caplog.text)
    for args, kwargs, length in (
        (arguments(SFTConfig, bf16=False), {}, 24),  # 1024 is only TRL's default
        (arguments(SFTConfig, max_length=20, bf16=False), {}, 20),
        (arguments(max_length=20), {}, 20),
        (arguments(max_length=20), {"max_seq_length": 16}, 16),
    ):
        trainer = PantheraMLTrainer(model, args, train_dataset=ALPACA, tokenizer=tokenizer, **kwargs)
        assert trainer.args.max_length == length
    assert args.max_length == 20, "the caller's arguments are not changed"


def test_arguments_of_older_scripts(load, arguments):
    model, tokenizer = load()
    rows = Dataset.from_dict({"body": ["one two three four", "five six seven"], "note": ["x", "y"]})
    trainer = PantheraMLTrainer(
        model=model, tokenizer=tokenizer, train_dataset=rows, dataset_text_field="body", max_seq_length=32,
        packing=True, dataset_num_proc=1, args=arguments(TrainingArguments),
    )  # fmt: skip
    assert trainer.args.packing and trainer.args.max_length == 32 and trainer.args.dataset_num_proc == 1
    assert "seq_lengths" in trainer.train_dataset.column_names
    trainer.train()


def test_a_formatting_function_switches_recognition_off(load, arguments):
    model, tokenizer = load()
    rows = Dataset.from_dict({"question": ["two and two"], "reply": ["four"]})
    trainer = PantheraMLTrainer(
        model, arguments(), train_dataset=rows, tokenizer=tokenizer,
        formatting_func=lambda row: f"{row['question']} = {row['reply']}",
    )  # fmt: skip
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == "two and two = four</s>"


def test_padding_free_rows_are_cut(load, arguments):
    model, tokenizer = load(max_seq_length=16)
    args = arguments(padding_free=True)
    trainer = PantheraMLTrainer(model, args, train_dataset=ALPACA, eval_dataset=ALPACA, tokenizer=tokenizer)
    trainer.train()
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        assert max(len(row["input_ids"]) for row in rows) == 16 == max(len(row["labels"]) for row in rows)


class Fill(TrainerCallback):
    """Leaves ``free`` bytes of the disk after the first checkpoint."""

    def __init__(self, folder, free):
        self.folder, self.free = folder, free

    def on_save(self, args, state, control, **_):
        if state.global_step == 1:
            (self.folder / "ballast").write_bytes(
                bytes(max(shutil.disk_usage(self.folder).free - self.free, 0))
            )


@pytest.mark.parametrize(
    ("free", "reason"),
    [(10_000, "the disk is too small"), (140_000, "No space left")],
)
def test_a_full_disk_costs_one_checkpoint(load, arguments, tmp_path, free, reason):
    """Whichever file of checkpoint 2 does not fit: it leaves no trace, checkpoint 1 loads and can be resumed from."""
    out = tmp_path / "disk"
    with small_disk(out, "2m"):
        args = arguments(
            output_dir=str(out), max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1
        )
        model, tokenizer = load()
        model = FastLanguageModel.get_peft_model(model, r=8)
        fill = Fill(out, free)
        trainer = PantheraMLTrainer(model, args, train_dataset=ALPACA, tokenizer=tokenizer, callbacks=[fill])
        with pytest.raises(SaveError, match=f"Saving to.*{reason}"):
            trainer.train()
        assert sorted(path.name for path in out.iterdir()) == [
            "README.md",
            "ballast",
            "checkpoint-1",
            "latest.json",
        ]
        model, _ = FastLanguageModel.from_pretrained(
            str(out / "checkpoint-1"), max_seq_length=64, load_in_4bit=False
        )
        assert isinstance(model, PeftModel)


def test_streamed_rows_train(load, arguments):
    model, tokenizer = load()
    stream = ALPACA.to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    trainer = PantheraMLTrainer(model, arguments(), train_dataset=stream, tokenizer=tokenizer)
    trainer.train()
    assert len(losses(trainer)) == 2


def test_rows_with_nothing_to_train_on(load, arguments):
    model, tokenizer = load()
    model = FastLanguageModel.get_peft_model(model, r=4)
    masked = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2, "labels": [[-100] * 3] * 2})
    with pytest.raises(DataError, match="every token of every row is masked"):
        PantheraMLTrainer(model, arguments(), train_dataset=masked, tokenizer=tokenizer)
    with pytest.raises(DataError, match="has no rows"):
        PantheraMLTrainer(model, arguments(), train_dataset=ALPACA.select([]), tokenizer=tokenizer)
    with pytest.raises(DataError, match="No train_dataset"):
        PantheraMLTrainer(model, arguments(), tokenizer=tokenizer)


def test_rows_that_are_left_out_are_counted(load, arguments, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    model, tokenizer = load()
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 3, "labels": [[5, 6, 7], [-100] * 3, [5, 6, 7]]})
    PantheraMLTrainer(model, arguments(), train_dataset=rows, tokenizer=tokenizer)
    assert "1 of 3 train rows have no token left to train on" in caplog.text


@pytest.mark.promise("D5")
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_evaluation_is_a_mean_over_tokens(load, arguments, batch):
    """Loss, perplexity and accuracy do not depend on how rows are batched; computed here row by row."""
    model, tokenizer = load()
    trainer = PantheraMLTrainer(
        model,
        arguments(per_device_eval_batch_size=batch),
        train_dataset=ALPACA,
        eval_dataset=ALPACA,
        tokenizer=tokenizer,
    )
    metrics = trainer.evaluate()
    total = correct = tokens = 0.0
    with torch.no_grad():
        for row in trainer.eval_dataset:
            ids = torch.tensor([row["input_ids"]], device=trainer.args.device)
            logits = trainer.model(input_ids=ids).logits[0, :-1].float()
            target = torch.tensor(row["labels"], device=ids.device)[1:]
            total += torch.nn.functional.cross_entropy(
                logits, target, ignore_index=-100, reduction="sum"
            ).item()
            correct += (logits.argmax(-1) == target).sum().item()
            tokens += (target != -100).sum().item()
    assert metrics["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(correct / tokens, abs=1e-6)


@pytest.mark.promise("B1", "F11")
def test_embeddings_have_a_learning_rate_of_their_own(load, arguments):
    model, tokenizer = load()
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])
    args = arguments(
        embedding_learning_rate=1e-5, learning_rate=1e-3, lr_scheduler_type="constant", max_steps=1
    )
    trainer = PantheraMLTrainer(model, args, train_dataset=ALPACA, tokenizer=tokenizer)
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    trainer.train()
    rates = {group["lr"]: sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups}
    assert set(rates) == {1e-5, 1e-3} and rates[1e-5] == 2 * embedding.numel()
    # Adam's first step moves a weight by the learning rate, whatever the gradient.
    moved = (embedding - before).abs().max().item()
    assert moved == pytest.approx(1e-5, rel=0.2)

    model, tokenizer = load()
    trainer = PantheraMLTrainer(model, args, train_dataset=ALPACA, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="no embedding or head is trained"):
        trainer.train()
    with pytest.raises(ConfigError, match="more than 0"):
        arguments(embedding_learning_rate=0.0)


def test_adapters_of_quantised_models_stay_in_float32(load, arguments):
    model, tokenizer = load(load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = PantheraMLTrainer(model, arguments(), train_dataset=ALPACA, tokenizer=tokenizer)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, values[name])
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))


@pytest.mark.promise("A11")
def test_memory_is_reported(load, arguments, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    model, tokenizer = load()
    trainer = PantheraMLTrainer(model, arguments(), train_dataset=ALPACA, tokenizer=tokenizer)
    usage = trainer.get_model_memory_usage()
    assert all(stats["total"] > 0 for stats in usage.values())
    trainer.print_memory_stats()
    assert next(iter(usage)) in caplog.text


@pytest.mark.promise("A10")
def test_precision_is_chosen_by_hardware_only_when_left_open(arguments):
    on_gpu = torch.cuda.is_available()
    assert (arguments().bf16, arguments().fp16) == (on_gpu and torch.cuda.is_bf16_supported(), False)
    assert arguments(bf16=True).bf16 and not arguments(bf16=False).bf16
