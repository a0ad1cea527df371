"""Ranks that compute each layer together: the figures, the tokens and the files of one process."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
)
from pantheraml.errors import ConfigError, SaveError
from pantheraml.models.adapters import count_parameters
from pantheraml.training.telemetry import operations_per_token
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parity import rows
from tests.export.gguf_files import assert_same_model

STEPS, SAVED = 4, 2


def load(folder, degree):
    config = MultiGPUConfig(tensor_parallel=degree) if degree > 1 else None
    return FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu", use_multi_gpu=config
    )


def train(folder, output, degree, resume=None, save=True, targets="all-linear", **settings):
    """8 rows a step with dropout; what is logged, an evaluation, and some tokens."""
    model, tokenizer = load(folder, degree)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.3, target_modules=targets)
    args = PantheraMLTrainingArguments(
        output_dir=str(output / "run"),
        **{
            **dict(per_device_train_batch_size=3, global_batch_size=8, max_steps=STEPS, learning_rate=1e-2),
            **dict(logging_steps=1, save_strategy="steps" if save else "no", save_steps=SAVED, report_to="none"),
            **dict(disable_tqdm=True, max_grad_norm=0.5, gradient_checkpointing=True),
            **settings,
        },
    )  # fmt: skip
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer
    )
    trainer.train(resume_from_checkpoint=resume)
    logs = [
        {name: entry[name] for name in ("loss", "grad_norm", "entropy", "num_tokens")}
        for entry in trainer.state.log_history
        if "grad_norm" in entry
    ]
    figures = trainer.evaluate()
    FastLanguageModel.for_inference(model)
    ids = torch.arange(5, 25).view(2, 10)
    tokens = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist()
    if save:
        model.save_pretrained(str(output / "adapter"))
        model.save_pretrained_merged(str(output / "merged"), tokenizer, dtype="float32")
        model.save_pretrained_gguf(output / "gguf", tokenizer, "f32")
    return {
        "logs": logs,
        "eval": [figures["eval_loss"], figures["eval_mean_token_accuracy"]],
        "tokens": tokens,
        "held": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "counted": (count_parameters(model), operations_per_token(model)),
    }


def assert_same(found, wanted, tolerance=1e-5):
    for mine, theirs in zip(found["logs"], wanted["logs"], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    assert found["eval"] == pytest.approx(wanted["eval"], rel=tolerance)
    assert found["tokens"] == wanted["tokens"]
    assert found["counted"] == wanted["counted"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(
        tmp_path_factory.mktemp("llama"), "llama", attention_bias=True, attention_dropout=0.2
    )


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    """One process's run, and where its files are."""
    output = tmp_path_factory.mktemp("one")
    return train(folder, output, 1), output


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """The same by two ranks that compute each layer together."""
    output = tmp_path_factory.mktemp("two")
    return run_ranks(2, train, folder, output, 2), output


@pytest.mark.promise("A7")
def test_two_ranks_train_evaluate_and_generate_as_one_process(one, two):
    for found in two[0]:
        assert_same(found, one[0])
        # Embedding and head (2 x 512 x 64) and three norms stay whole, and so do biases of row layers.
        whole = 2 * 512 * 64 + 5 * 64 + 2 * 64
        assert found["held"] - whole == (one[0]["held"] - whole) / 2


def test_two_groups_of_two_share_the_rows(folder, one, tmp_path):
    for found in run_ranks(4, train, folder, tmp_path, 2, None, False):
        assert_same(found, one[0])


def test_the_adapter_is_saved_whole(one, two, folder):
    mine, theirs = (load_file(output / "adapter" / "adapter_model.safetensors") for _, output in (two, one))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5)
    ids = torch.arange(5, 25).view(2, 10)
    model, _ = load(two[1] / "adapter", 1)
    alone = model.eval()(input_ids=ids).logits.detach()
    for found in run_ranks(2, logits_of, two[1] / "adapter", ids.numpy()):
        torch.testing.assert_close(torch.from_numpy(found), alone, rtol=1e-5, atol=1e-5)


def logits_of(folder, ids):
    model, _ = load(folder, 2)
    return model.eval()(input_ids=torch.from_numpy(ids)).logits.detach().numpy()


def test_the_merged_model_is_whole(one, two):
    mine, theirs = (load_file(output / "merged" / "model.safetensors") for _, output in (two, one))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5)
    assert_same_model(two[1] / "gguf/model-F32.gguf", two[1] / "merged")
    config = json.loads((two[1] / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_with_any_number_of_ranks(folder, one, two, tmp_path, ranks):
    checkpoint = str(two[1] / "run" / f"checkpoint-{SAVED}")
    for found in run_ranks(ranks, train, folder, tmp_path, ranks, checkpoint, False):
        assert_same(found, one[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"])
def test_families(family, tmp_path):
    """Without recompute; for llama head and embedding are trained in full, too, for qwen2 the loss is TRL's own."""
    folder = tiny.save_checkpoint(tmp_path / "model", family)
    settings = dict(gradient_checkpointing=False, learning_rate=1e-3)
    if family == "llama":
        settings["targets"] = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    if family == "qwen2":
        settings["loss_type"] = "dft"
    wanted = train(folder, tmp_path, 1, None, False, **settings)
    for found in run_ranks(2, train_with, folder, tmp_path, settings):
        assert_same(found, wanted)


def train_with(folder, output, settings):
    return train(folder, output, 2, None, False, **settings)


def refusals(folders):
    """What is said to things that cannot be, by name."""
    found = {}

    def refused(name, act, kind=ConfigError):
        with pytest.raises(kind) as error:
            act()
        found[name] = str(error.value)

    def get(name, degree=2, **settings):
        return FastLanguageModel.from_pretrained(
            str(folders[name]),
            max_seq_length=64,
            use_multi_gpu=MultiGPUConfig(tensor_parallel=degree),
            **{"device_map": "cpu", "load_in_4bit": False, **settings},
        )

    refused("heads", lambda: get("heads"))
    refused("ranks", lambda: get("plain", degree=4))
    refused("4bit", lambda: get("plain", load_in_4bit=True))
    refused("full", lambda: get("plain", full_finetuning=True))
    refused("map", lambda: get("plain", device_map={"model": 0, "lm_head": 1}))
    refused("experts", lambda: get("mixtral"))
    refused("gathered", lambda: get("phi3"))
    model, tokenizer = get("plain", degree=True)
    for name, setting in {
        "use_dora": True, "init_lora_weights": "pissa", "bias": "all", "lora_bias": True,
        "modules_to_save": ["self_attn"], "target_parameters": ["q_proj.weight"],
    }.items():  # fmt: skip
        refused(name, lambda setting={name: setting}: FastLanguageModel.get_peft_model(model, **setting))
    refused(
        "save", lambda: model.save_pretrained(folders["plain"] / "again"), SaveError
    ) if not is_second() else None
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["lm_head"])
    args = PantheraMLTrainingArguments(
        output_dir=str(folders["plain"] / "run"), report_to="none", max_steps=1
    )
    given = dict(args=args, train_dataset=rows(), tokenizer=tokenizer)
    ddp = MultiGPUConfig(strategy="ddp")
    refused("ddp", lambda: PantheraMLDistributedTrainer(model, multi_gpu_config=ddp, **given))
    whole, _ = FastLanguageModel.from_pretrained(
        str(folders["plain"]), load_in_4bit=False, device_map="cpu", use_multi_gpu=False
    )
    tensor = MultiGPUConfig(strategy="tensor")
    refused("whole", lambda: PantheraMLDistributedTrainer(whole, multi_gpu_config=tensor, **given))
    return found


def is_second():
    return torch.distributed.get_rank() == 1


def test_what_cannot_be_combined_is_refused_with_the_nearest_that_works(tmp_path):
    odd = dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    folders = {
        "plain": tiny.save_checkpoint(tmp_path / "plain", "llama"),
        "heads": tiny.save_checkpoint(tmp_path / "heads", "llama", **odd),
        "mixtral": tiny.save_checkpoint(tmp_path / "mixtral", "mixtral"),
        "phi3": tiny.save_checkpoint(tmp_path / "phi3", "phi3"),
    }  # fmt: skip
    found = run_ranks(2, refusals, folders)
    assert found[0] | found[1] == found[0], "every rank says the same"
    said = found[0]
    assert "num_attention_heads=6, num_key_value_heads=3 and intermediate_size=96" in said["heads"]
    assert "tensor_parallel=3, the only valid degree" in said["heads"]
    assert "2 ranks" in said["ranks"] and "Write tensor_parallel=2." in said["ranks"]
    assert "load_in_16bit=True" in said["4bit"]
    assert 'strategy="fsdp"' in said["full"] and 'strategy="fsdp"' in said["experts"]
    assert "Leave device_map out." in said["map"]
    assert "colwise_gather_output" in said["gathered"]
    assert "lora_bias=True" in said["lora_bias"] and "bias='all'" in said["bias"]
    assert "save_pretrained_merged" in said["save"]
    assert "strategy='ddp' was given for a model of tensor_parallel=2" in said["ddp"]
    assert "use_multi_gpu" in said["whole"]
