"""Weights shared out between ranks (FSDP2): the same training as one process, in less memory; saved whole."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from pantheraml import FastLanguageModel, MultiGPUConfig, PantheraMLTrainer, PantheraMLTrainingArguments
from pantheraml.checkpoint import folder_files, state_parts
from pantheraml.checkpoint.manifest import problems, read_manifest
from pantheraml.distributed.strategies.fsdp import sharding_of
from pantheraml.errors import ConfigError, SaveError
from pantheraml.export import gathered as streaming
from pantheraml.export.quantized import is_4bit
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer, apply_layers
from pantheraml.models.fused.functions import AttentionInput
from pantheraml.models.fused.layer_function import FusedLayer
from pantheraml.models.recompute_plan import sizes_of
from pantheraml.models.saved_weights import load_weights
from pantheraml.models.sharding import bring_whole, is_sharded, let_go, shard_model
from pantheraml.models.shares import gathered_weights, local, whole
from pantheraml.models.state import get_state
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_parity import rows
from tests.export.gguf_files import assert_same_model
from tests.live_bytes import LiveBytes

LOADS = {
    "lora": dict(load_in_4bit=False),
    "qlora": dict(load_in_4bit=True),
    "fp8": dict(load_in_fp8=True),
    "full": dict(full_finetuning=True),
}
SHARED = MultiGPUConfig(strategy="fsdp", shard_frozen=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def as_older_torch():
    """Let this rank's torch make sharded parameters as 2.10 and 2.11 do: first as ones that take gradients."""
    made = FSDPParam.to_sharded_dtensor

    def strict(self, tensor):
        torch.nn.Parameter(made(self, tensor))  # refused for tensors that are not of a floating dtype
        return made(self, tensor)

    FSDPParam.to_sharded_dtensor = strict


def load(folder, kind, config):
    if config is not None:
        as_older_torch()
    where = {} if config is not None else {"device_map": "cpu"}
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, use_multi_gpu=config, **where, **LOADS[kind]
    )
    if kind != "full":
        model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1)
    return model, tokenizer


def trainer_of(folder, output, kind, config, per_device=4, accumulation=1, **settings):
    model, tokenizer = load(folder, kind, config)
    settings = {"num_train_epochs": 2, "save_strategy": "no"} | settings
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
        learning_rate=1e-3, logging_steps=1, report_to="none", disable_tqdm=True, max_grad_norm=0.5, **settings,
    )  # fmt: skip
    return PantheraMLTrainer(
        model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer
    ), tokenizer


def figures(trainer):
    return [[e["loss"], e["grad_norm"]] for e in trainer.state.log_history if "grad_norm" in e]


def train(folder, output, kind, config, *layout):
    trainer, _ = trainer_of(folder, output, kind, config, *layout)
    layers = [p for name, p in trainer.model.named_parameters() if ".layers." in name and "lora_" not in name]
    before = sum(local(p).nbytes for p in layers)
    if config is not None and kind == "full":
        trainer.evaluate()  # leaves the embedding gathered
    trainer.train()
    return {
        "figures": figures(trainer),
        "eval": trainer.evaluate()["eval_loss"],
        "bytes": before,
        "said": trainer._strategy.describe(),
    }


@functools.cache
def alone(folder, output, kind):
    return run_ranks(1, train, folder, output, kind, None, 8, 1)[0]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("lora", (2, 2)), ("qlora", (4, 1)), ("fp8", (4, 1)), ("full", (4, 1)), ("full", (2, 2))],
)
def test_equals_one_process(folder, tmp_path, kind, layout):
    found = run_ranks(2, train, folder, tmp_path, kind, SHARED, *layout)
    expected = alone(folder, tmp_path, kind)
    assert len(expected["figures"]) == 8
    # FP8 rows are rounded by their largest value, which may come to another number in a smaller batch.
    within = 5e-4 if kind == "fp8" else 2e-6
    np.testing.assert_allclose(found[0]["figures"], expected["figures"], rtol=within, atol=within)
    assert found[0]["eval"] == found[1]["eval"] == pytest.approx(expected["eval"], rel=within / 2)
    assert found[0]["bytes"] < 0.53 * expected["bytes"]  # norms stay whole beside an adapter
    assert "shared out" in found[0]["said"]


def gather_bytes(folder):
    """4-bit weights of all byte values, shared out and gathered: what there was, and what came."""
    as_older_torch()
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, use_multi_gpu=MultiGPUConfig(), **LOADS["qlora"]
    )
    layer = model.model.layers[0]
    packed = {name: weight for name, weight in layer.named_parameters() if is_4bit(weight)}
    for number, weight in enumerate(packed.values()):
        count = torch.arange(weight.numel(), dtype=torch.int32).add(number)
        weight.data = count.to(torch.uint8).view_as(weight)
    before = {name: weight.data.clone() for name, weight in packed.items()}
    shard_model(model, sharding_of(SHARED, trained=False))
    shared = {name: layer.get_parameter(name) for name in before}
    named = gathered_weights(model, keep=True)
    seen = {}

    def look(layer, *_):
        seen.update({name: layer.get_parameter(name).clone() for name in before})

    layer.register_forward_pre_hook(look)
    model(input_ids=torch.tensor([[1, 7, 30]]))
    return {
        name: [
            value.numpy(),
            local(shared[name]).dtype == torch.uint8 and local(shared[name]).numel() == value.numel() // 2,
            whole(shared[name]).numpy(),
            named[f"model.layers.0.{name}"].numpy(),
            seen[name].numpy(),
        ]
        for name, value in before.items()
    }


def test_4_bit_weights_keep_their_bits(folder):
    for found in run_ranks(2, gather_bytes, folder):
        assert len(found) == 7
        for value, is_half, *gathered in found.values():
            assert is_half and len(np.unique(value)) == 256
            for one in gathered:
                assert one.dtype == np.uint8
                np.testing.assert_array_equal(one, value)


# The loss falls: the first checkpoint is the "best" one, and the run ends with its weights.
BEST = dict(
    eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    greater_is_better=True,
)  # fmt: skip


def save_on_all(folder, output, kind):
    """Train four steps with a checkpoint after two, and save everything that can be saved, in small files."""
    streaming.LARGEST_FILE, state_parts._MOST = 200_000, 300_000
    hashed, measured = [], folder_files._measured
    folder_files._measured = lambda path, flushed: hashed.append(path.name) or measured(path, flushed)
    best = BEST if kind == "full" else {}
    trainer, tokenizer = trainer_of(
        folder, output / "run", kind, SHARED, max_steps=4, save_strategy="steps", save_steps=2, **best
    )
    trainer.train()
    model = trainer.model
    FastLanguageModel.for_inference(model)
    model.save_pretrained_merged(output / "merged", tokenizer, dtype="float32")
    model.save_pretrained_gguf(output / "gguf", tokenizer, "f32")
    model.save_pretrained(output / "saved", tokenizer)
    for push in (model.push_to_hub_merged, model.push_to_hub_gguf):
        try:  # no hub is asked here; rank 0 finds out, and the others do not wait for it
            assert push("someone/model", tokenizer) is None and dist.get_rank() == 1
        except SaveError:
            assert dist.get_rank() == 0
    with torch.no_grad():
        ids = torch.tensor([[1, 7, 30, 12, 99, 4]])
        logits = model(input_ids=ids).logits
        tokens = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    return {
        "figures": figures(trainer),
        "logits": logits.numpy(),
        "tokens": tokens.tolist(),
        "sharded": is_sharded(model),
        "hashed": {name for name in hashed if name.endswith(".distcp")},
    }


def go_on(folder, checkpoints, kind, config, max_steps=4):
    """The figures of runs that go on from each of ``checkpoints``."""
    found = []
    for checkpoint in checkpoints:
        trainer, _ = trainer_of(
            folder, checkpoint.parent, kind, config, 4 if config else 8, max_steps=max_steps
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))
        found.append(figures(trainer))
    return found


def check_parts(checkpoint):
    """Every rank has written its part of a checkpoint, each file of which the manifest knows."""
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert not problems(checkpoint) and read_manifest(checkpoint).files.keys() == names - {"manifest.json"}
    parts = [f"optimizer/part-0000{part}/__{rank}_0.distcp" for part in range(2) for rank in range(2)]
    assert {*parts, "optimizer/rest.pt", "optimizer/part-00001/.metadata"} <= names
    assert "optimizer.pt" not in names and "model-00003-of-00003.safetensors" in names
    one, other = (checkpoint / name for name in parts[:2])
    swapped = checkpoint / "swapped"
    for source, target in ((one, swapped), (other, one), (swapped, other)):
        source.rename(target)
    found = problems(checkpoint)
    assert len(found) == 2 and all(parts[rank] in found[rank] for rank in range(2))
    for source, target in ((one, swapped), (other, one), (swapped, other)):
        source.rename(target)
    other.rename(swapped)
    assert problems(checkpoint) == [f"{parts[1]} is missing."]
    swapped.rename(other)


def as_before(checkpoint, folder):
    """A copy of a checkpoint as it was when rank 0 wrote all of the optimizer's state."""
    old = shutil.copytree(checkpoint, folder / checkpoint.name)
    torch.save(state_parts.read_parts(old, [torch.empty(0)] * 21), old / "optimizer.pt")
    shutil.rmtree(old / "optimizer")
    (old / "manifest.json").unlink()
    return old


@pytest.mark.parametrize("kind", ["lora", pytest.param("qlora", marks=pytest.mark.slow), "full"])
def test_saved_whole_and_gone_on_with_by_any_number_of_ranks(folder, tmp_path, kind):
    found = run_ranks(2, save_on_all, folder, tmp_path, kind)
    assert all(one["sharded"] for one in found)
    assert found[0]["tokens"] == found[1]["tokens"]
    assert_same_model(tmp_path / "gguf/model-F32.gguf", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name in ("merged", "saved") if kind == "full" else ("merged",):
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == [
            "LlamaForCausalLM"
        ]
    ids = torch.tensor([[1, 7, 30, 12, 99, 4]])
    with torch.no_grad():
        np.testing.assert_allclose(
            merged(input_ids=ids).logits, found[0]["logits"], atol=2e-3 if kind == "qlora" else 1e-5
        )
    if kind != "qlora":
        assert (
            merged.generate(input_ids=ids, max_new_tokens=5, do_sample=False).tolist() == found[0]["tokens"]
        )
    saved, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "saved"),
        max_seq_length=64,
        device_map="cpu",
        load_in_4bit=kind == "qlora",
        dtype="float32",
    )
    with torch.no_grad():
        np.testing.assert_allclose(saved.eval()(input_ids=ids).logits, found[0]["logits"], atol=1e-5)
    checkpoints = [tmp_path / "run" / "checkpoint-2"]
    if kind == "full":
        check_parts(checkpoints[0])
        assert [one["hashed"] for one in found] == [{"__0_0.distcp"}, {"__1_0.distcp"}], (
            "by who has written it"
        )
        best = AutoModelForCausalLM.from_pretrained(checkpoints[0])
        with torch.no_grad():
            np.testing.assert_allclose(best(input_ids=ids).logits, found[0]["logits"], atol=1e-5)
        checkpoints.append(as_before(checkpoints[0], tmp_path))
    for after in run_ranks(2, go_on, folder, checkpoints, kind, SHARED)[0]:
        assert after == found[0]["figures"], "bit by bit"
    others = (2, MultiGPUConfig(strategy="ddp")), (1, None), (4, SHARED)
    for ranks, config in others if kind == "full" else ():
        (after,) = run_ranks(ranks, go_on, folder, checkpoints[:1], kind, config)[0]
        np.testing.assert_allclose(after, found[0]["figures"], rtol=3e-6)


def read_weights(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def save_both_ways(folders):
    """Save as the weights come, in small files, and all together by transformers; how much of tensors each way took."""
    took = []
    for folder in folders:
        model, _ = load(folder, "full", SHARED)
        model.eval()(input_ids=torch.tensor([[1, 7, 30]]))  # leaves embedding and head gathered
        for name, settings in (
            ("come", {"max_shard_size": 100_000}),
            ("together", {"save_original_format": True}),
        ):
            with LiveBytes() as live:
                model.save_pretrained(folder / name, **settings)
            took.append(live.most)
        let_go(model)
        before = {name: local(weight).clone() for name, weight in model.named_parameters()}
        with torch.no_grad():
            for weight in model.parameters():
                local(weight).zero_()
        load_weights(model, folder / "come")
        assert all(local(weight).equal(before[name]) for name, weight in model.named_parameters())
    return took


def test_weights_are_written_as_they_come(tmp_path):
    folders = [tiny.save_checkpoint(tmp_path / name, name) for name in ("qwen3_moe", "gemma3_text")]
    took = run_ranks(2, save_both_ways, folders)[0]
    for number, folder in enumerate(folders):
        come, together = (read_weights(folder / name) for name in ("come", "together"))
        assert len(list((folder / "come").glob("model-*.safetensors"))) > 2
        tied = {"lm_head.weight"} if folder.name == "gemma3_text" else set()  # gathered, these are two
        assert come.keys() == together.keys() - tied
        assert all(together[name].equal(value) for name, value in come.items())
        assert took[2 * number] < 0.6 * took[2 * number + 1]
        AutoModelForCausalLM.from_pretrained(folder / "come")


def refused(folder, load, adapter):
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, use_multi_gpu=SHARED, **load)
    try:
        FastLanguageModel.get_peft_model(model, r=4, **adapter)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    ("adapter", "instead"),
    [
        (dict(use_dora=True), "Drop use_dora=True"),
        (dict(init_lora_weights="pissa"), "Leave init_lora_weights out"),
        (dict(modules_to_save=["up_proj"]), "Leave layers to target_modules"),
    ],
)
def test_adapters_that_need_whole_weights_are_refused(folder, adapter, instead):
    for said in run_ranks(2, refused, folder, LOADS["lora"], adapter):
        assert "was given for weights that ranks share out" in said and instead in said


def load_8_bit(folder):
    with pytest.raises(ConfigError, match="The scales of 8-bit weights"):
        FastLanguageModel.from_pretrained(str(folder), use_multi_gpu=SHARED, load_in_8bit=True)
    with pytest.raises(ConfigError, match=r"shard_size=3\) was given to 2 ranks.*Write one of 1, 2"):
        FastLanguageModel.from_pretrained(
            str(folder), use_multi_gpu=MultiGPUConfig(strategy="fsdp", shard_size=3), full_finetuning=True
        )
    with pytest.raises(ConfigError, match="keep_dequantized=True was given"):
        FastLanguageModel.from_pretrained(
            str(folder), use_multi_gpu=SHARED, load_in_4bit=True, keep_dequantized=True
        )


def test_what_cannot_be_shared_out_is_refused(folder):
    run_ranks(2, load_8_bit, folder)


def two_copies(folder, output):
    config = MultiGPUConfig(strategy="fsdp", shard_size=2)
    saves = {"save_strategy": "steps", "save_steps": 5}
    trainer, _ = trainer_of(folder, output, "full", config, 2, 1, **saves)
    trainer.train()
    return {"figures": figures(trainer), "said": trainer._strategy.describe()}


@pytest.mark.slow
def test_copies_that_are_shared_out_each(folder, tmp_path):
    found = run_ranks(4, two_copies, folder, tmp_path)
    assert "2 copies of 2 ranks each" in found[0]["said"]
    expected = alone(folder, tmp_path, "full")
    np.testing.assert_allclose(found[0]["figures"], expected["figures"], rtol=2e-6, atol=2e-6)
    checkpoint = tmp_path / "checkpoint-5"
    written = sum(path.stat().st_size for path in checkpoint.rglob("*.distcp"))
    moments = 2 * (checkpoint / "model.safetensors").stat().st_size
    assert moments < written < 1.2 * moments, "one copy"
    (after,) = run_ranks(2, functools.partial(go_on, max_steps=8), folder, [checkpoint], "full", SHARED)[0]
    np.testing.assert_allclose(after, expected["figures"], rtol=3e-6)


def train_fused(folder, output, kind, per_device, shares_out):
    """Fused layers, as on a GPU, beside weights that are there only while a layer is computed."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, use_multi_gpu=MultiGPUConfig(), **LOADS[kind]
    )
    state = get_state(model)
    apply_layers(model, state.family, state.patches, on_cpu=True)
    if shares_out:
        state.sharding = sharding_of(SHARED, trained=False)
        shard_model(model, state.sharding)
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = PantheraMLTrainingArguments(
        output_dir=str(output), per_device_train_batch_size=per_device, learning_rate=1e-3, logging_steps=1,
        max_steps=4, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = PantheraMLTrainer(model, args, train_dataset=rows(), tokenizer=tokenizer)
    trainer.train()
    layer = next(module for module in model.modules() if isinstance(module, FusedDecoderLayer))
    return figures(trainer), {"is_passing": layer.reader.is_passing, "stacks": bool(layer.reader._stacks)}


@pytest.mark.parametrize("kind", ["lora", "fp8"])
def test_fused_layers_compute_from_what_is_gathered(folder, tmp_path, kind):
    shared, how = run_ranks(2, train_fused, folder, tmp_path, kind, 4, True)[0]
    expected, _ = run_ranks(1, train_fused, folder, tmp_path, kind, 8, False)[0]
    assert how == {"is_passing": True, "stacks": True}
    within = 5e-4 if kind == "fp8" else 2e-6
    np.testing.assert_allclose(shared, expected, rtol=within, atol=within)


# Whether layers recompute, whether rows are padded, and so what computes a step's layers, forward and again.
CASES = [
    (False, False, 2 * ["FusedLayer"]),
    (True, False, 2 * ["FusedLayer"]),
    (True, True, 4 * ["AttentionInput"]),
]


def watched_calls():
    """The names of the functions that compute layers, as they are called in this process from now on."""
    calls = []
    for function in (FusedLayer, AttentionInput):
        original, name = function.apply, function.__name__
        function.apply = lambda *a, original=original, name=name: calls.append(name) or original(*a)
    return calls


def share_out(model, *, fused, dtype=None):
    state = get_state(model)
    if fused:
        apply_layers(model, state.family, state.patches, on_cpu=True)
    state.sharding = replace(sharding_of(SHARED, trained=True), compute_dtype=dtype)
    shard_model(model, state.sharding)


def train_in_full(folder, output, per_device):
    """All weights after four steps, by fused layers from shares of every rank; in one process by transformers' own."""
    is_shared, found = dist.is_initialized(), []
    where = dict(use_multi_gpu=MultiGPUConfig()) if is_shared else dict(device_map="cpu")
    calls = watched_calls() if is_shared else []
    for recompute, padded, _ in CASES:
        load = dict(LOADS["full"], max_seq_length=64, use_gradient_checkpointing=recompute)
        model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **load, **where)
        if is_shared:
            share_out(model, fused=True)
        data = rows()
        if not padded:
            data = data.map(lambda row: {name: (4 * value)[:16] for name, value in row.items()})
        args = PantheraMLTrainingArguments(
            output_dir=str(output), per_device_train_batch_size=per_device, learning_rate=1.0, optim="sgd",
            max_grad_norm=0.5, max_steps=4, logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        PantheraMLTrainer(model, args, train_dataset=data, tokenizer=tokenizer).train()
        weights = {name: whole(weight).detach().numpy() for name, weight in model.named_parameters()}
        found.append((calls[:], weights))
        calls.clear()
    return found


def test_fused_layers_train_what_is_gathered(folder, tmp_path):
    (one,) = run_ranks(1, train_in_full, folder, tmp_path, 8)
    shared = run_ranks(2, train_in_full, folder, tmp_path, 4)[0]
    before = load(folder, "full", None)[0].state_dict()
    for (calls, weights), (_, expected), (*_, computed) in zip(shared, one, CASES, strict=True):
        assert calls == 4 * computed and len(weights) == 21
        for name, weight in expected.items():
            most = np.abs(weight).max()
            np.testing.assert_allclose(weights[name], weight, rtol=0, atol=1e-6 * most, err_msg=name)
            assert np.abs(weight - before[name].numpy()).max() > 1e-4 * most, name


def gradients_in_16_bits(folder):
    """Gradients of float32 masters that are gathered in bfloat16, by fused layers and by transformers' own."""
    calls, found = watched_calls(), []
    for fused in (True, False):
        model, _ = load(folder, "full", MultiGPUConfig())
        share_out(model, fused=fused, dtype=torch.bfloat16)
        ids = torch.arange(5, 53).reshape(2, 24)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: whole(weight.grad) for name, weight in model.named_parameters()})
        sizes = sizes_of(model)
        assert sizes.is_trained and (sizes.size, sizes.computed, sizes.computes_fused) == ((2, 2, fused))
    assert calls == 2 * ["FusedLayer"]
    return [{name: (one.dtype, one.numpy()) for name, one in gradients.items()} for gradients in found]


def test_masters_are_trained_in_16_bits_by_fused_layers(folder):
    fused, stock = run_ranks(2, gradients_in_16_bits, folder)[0]
    for name, (dtype, gradient) in fused.items():
        assert dtype == torch.float32
        np.testing.assert_allclose(
            gradient, stock[name][1], rtol=0, atol=0.03 * np.abs(gradient).max(), err_msg=name
        )


def train_away(folder, output, kind):
    """Train with layers in host memory; what of the shares somebody moved, and what is brought to the rank's device."""
    moved, apply = [], torch.nn.Module._apply

    def watched(module, *args, **kwargs):
        moved.extend(one for one in module._parameters.values() if isinstance(one, DTensor))
        return apply(module, *args, **kwargs)

    torch.nn.Module._apply = watched
    config = MultiGPUConfig(strategy="fsdp", shard_frozen=True, cpu_offload=True)
    trainer, _ = trainer_of(folder, output, kind, config, 4, 1)
    trainer.evaluate()  # accelerate prepares the model for that, too
    trainer.train()
    found = {"figures": figures(trainer), "said": trainer._strategy.describe(), "moved": len(moved)}
    bring_whole(trainer.model, torch.device("cpu"), torch.float64)  # there is no other device: by their dtype
    brought = {(isinstance(one, DTensor), one.dtype) for one in trainer.model.parameters()}
    return {**found, "brought": brought}


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_layers_kept_in_host_memory(folder, tmp_path, kind):
    for found in run_ranks(2, train_away, folder, tmp_path, kind):
        expected = alone(folder, tmp_path, kind)["figures"]
        np.testing.assert_allclose(found["figures"], expected, rtol=2e-6, atol=2e-6)
        assert "kept in host memory" in found["said"]
        assert not found["moved"]
        assert found["brought"] == {(True, torch.float32), *[(False, torch.float64)] * (kind == "lora")}
