"""Split models train as whole ones do; here the stages share the CPU, which has one device only."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import masking_utils

from pantheraml import (
    FastLanguageModel,
    MultiGPUConfig,
    PantheraMLDistributedTrainer,
    PantheraMLTrainingArguments,
)
from pantheraml.distributed.pipeline import step
from pantheraml.distributed.pipeline.link import Link
from pantheraml.errors import ConfigError
from pantheraml.kernels.attention import layout
from pantheraml.models.fused import attention as fused_attention
from pantheraml.models.fused.attention import apply_attention
from pantheraml.models.fused.decoder_layer import apply_layers
from pantheraml.models.fused.read_layer import LayerReader
from pantheraml.models.patching import PatchSet
from pantheraml.models.split import Split, StagePlace, carry_between
from pantheraml.models.state import get_state
from pantheraml.training.head import score
from pantheraml.training.pipelining import cut, settle_masks
from tests import tiny
from tests.distributed.pipelined import count_micro_batches
from tests.distributed.test_parity import rows

CPU = torch.device("cpu")
LAYERS = 4


def split_at(*bounds, rounds=1):
    return Split(tuple(StagePlace(first, stop, CPU) for first, stop in pairwise(bounds)), CPU, CPU, rounds)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def batch_of(kind):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 400, (6, 12), generator=generator)
    labels = ids.clone()
    labels[:, :3], labels[4] = -100, -100
    mask = torch.ones_like(ids)
    if kind == "packed":
        positions = torch.arange(12).remainder(5)[None].expand(6, -1).contiguous()
        return dict(input_ids=ids, labels=labels, position_ids=positions)
    padded = slice(7, None) if kind == "padded behind" else slice(0, 5)
    mask[1, padded], labels[1, padded] = 0, -100
    return dict(input_ids=ids, labels=labels, attention_mask=mask)


def loss_of(model, hidden, labels, count):
    index = (labels[:, 1:] != -100).flatten().nonzero()[:, 0]
    if not index.numel():
        return 0.0 * hidden.sum()
    found = score(model, hidden[:, :-1].flatten(0, 1)[index], labels[:, 1:].flatten()[index])
    return -found.log_probs.sum() / count


@pytest.mark.promise("A6")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["padded behind", "padded in front", "packed"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_losses_and_gradients_are_those_of_the_whole_model(family, kind, fused):
    from pantheraml.models.families import find_family

    model = tiny.build_model(family, num_hidden_layers=LAYERS).train()
    found = find_family(model.config)
    if fused:
        apply_layers(model, found, PatchSet(), on_cpu=True)
        apply_attention(model, found, PatchSet())
    batch = batch_of(kind)
    inputs = {name: one for name, one in batch.items() if name != "labels"}
    count = (batch["labels"][:, 1:] != -100).sum()
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    want = loss_of(model, hidden, batch["labels"], count)
    want.backward()
    expected = gradients(model)
    for bounds, rounds in (((0, 2, 4), 1), ((0, 1, 2, 3, 4), 1), ((0, 1, 2, 3, 4), 2)):
        pipeline = step.Pipeline(model, found, split_at(*bounds, rounds=rounds))
        pieces = cut(batch, 3)
        settle_masks(pieces)
        assert ("attention_mask" in pieces[0]) is (kind == "padded in front")
        loss = pipeline.step(
            pieces, lambda h, i, _, pieces=pieces: loss_of(model, h, pieces[i]["labels"], count)
        )
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
        mine = gradients(model)
        assert mine.keys() == expected.keys()
        for name, gradient in mine.items():
            scale = expected[name].abs().max() + 1e-6
            assert (gradient - expected[name]).abs().max() <= 1e-5 * scale, name


def test_layers_are_read_once_a_step(monkeypatch):
    """What changes between steps acts at once; within a step nothing changes."""
    model = tiny.build_model("llama", num_hidden_layers=LAYERS).train()
    family = find(model)
    apply_layers(model, family, PatchSet(), on_cpu=True)
    apply_attention(model, family, PatchSet())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0))
    reads, read = [], LayerReader._read

    def counted(self, *arguments):
        reads.append(self)
        return read(self, *arguments)

    monkeypatch.setattr(LayerReader, "_read", counted)
    pipeline = step.Pipeline(model, family, split_at(0, 2, 4))
    batch = {name: one for name, one in batch_of("padded behind").items() if name != "attention_mask"}
    count = (batch["labels"][:, 1:] != -100).sum()

    def run():
        reads.clear()
        pieces = cut(batch, 3)
        settle_masks(pieces)
        found = pipeline.step(pieces, lambda h, i, _: loss_of(model, h, pieces[i]["labels"], count))
        return found, len(reads)

    first, times = run()
    assert times == LAYERS
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data.normal_()  # which no version counter sees
    second, times = run()
    assert times == LAYERS and abs(first - second) > 1e-3
    want = loss_of(model, model.base_model(batch["input_ids"]).last_hidden_state, batch["labels"], count)
    torch.testing.assert_close(second, want.detach(), rtol=1e-5, atol=1e-6)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    assert run()[1] == 3 * LAYERS, "each micro-batch drops values of its own"


def test_hooks_bring_tensors_and_change_nothing():
    model = tiny.build_model("gemma3_text", num_hidden_layers=LAYERS)
    ids = torch.arange(5, 29)[None]
    want = model(ids, labels=ids)
    carry_between(model, find(model), split_at(0, 2, 4))
    found = model(ids, labels=ids)
    assert torch.equal(found.logits, want.logits) and torch.equal(found.loss, want.loss)
    assert torch.equal(
        model.generate(ids, max_new_tokens=5),
        tiny.build_model("gemma3_text", num_hidden_layers=LAYERS).generate(ids, max_new_tokens=5),
    )


def find(model):
    from pantheraml.models.families import find_family

    return find_family(model.config)


def train(
    folder, tmp_path, bounds, *, per_device=8, accumulation=1, config=None, targets=None, rounds=1, **settings
):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    get_state(model).split = split_at(*bounds, rounds=rounds) if bounds else None
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=targets)
    args = PantheraMLTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation, num_train_epochs=2, learning_rate=1e-3, logging_steps=1,
        report_to="none", disable_tqdm=True, max_grad_norm=0.5, **{"save_strategy": "no"} | settings,
    )  # fmt: skip
    trainer = PantheraMLDistributedTrainer(
        model, args, train_dataset=rows(), eval_dataset=rows(), tokenizer=tokenizer, multi_gpu_config=config
    )
    trainer.train()
    return trainer


def logs_of(trainer):
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("split"), "llama", num_hidden_layers=LAYERS)


@pytest.fixture
def calls(monkeypatch):
    """The numbers of micro-batches of each pipelined step."""
    return count_micro_batches(monkeypatch)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    trainer = train(folder, tmp_path_factory.mktemp("whole"), None)
    return logs_of(trainer), trainer.evaluate()


@pytest.mark.parametrize(
    ("bounds", "rounds", "per_device", "accumulation", "config", "count"),
    [
        ((0, 2, 4), 1, 8, 1, None, 8),
        ((0, 2, 4), 1, 2, 4, None, 8),
        ((0, 1, 3, 4), 1, 4, 2, MultiGPUConfig(micro_batches=4), 4),
        ((0, 1, 2, 3, 4), 1, 1, 8, MultiGPUConfig(micro_batches=8), 8),
        ((0, 1, 2, 3, 4), 2, 4, 2, None, 8),
    ],
)
def test_the_trainer_gives_the_numbers_of_the_whole_model(
    folder, tmp_path, whole, calls, bounds, rounds, per_device, accumulation, config, count
):
    batch = dict(per_device=per_device, accumulation=accumulation)
    trainer = train(folder, tmp_path, bounds, config=config, rounds=rounds, **batch)
    for mine, theirs in zip(logs_of(trainer), whole[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert len(calls) == len(whole[0]) and max(calls) == count
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole[1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_routers_of_all_stages_have_one_loss(tmp_path, calls, family):
    """Mixtures of experts: what balances the routers is summed up from stage to stage."""
    folder = tiny.save_checkpoint(tmp_path / family, family, num_hidden_layers=LAYERS)
    settings = dict(per_device=2, accumulation=4, router_aux_loss_coef=0.5)
    whole, split, rounds = (
        train(folder, tmp_path / str(index), bounds, rounds=turns, **settings)
        for index, (bounds, turns) in enumerate([(None, 1), ((0, 2, 4), 1), ((0, 1, 2, 3, 4), 2)])
    )
    assert max(calls) == 4 and len(calls) == 2 * len(logs_of(whole))
    for trainer in (split, rounds):
        for mine, theirs in zip(logs_of(trainer), logs_of(whole), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
        balance = [[e["aux_loss"] for e in t.state.log_history if "aux_loss" in e] for t in (trainer, whole)]
        assert balance[0] == pytest.approx(balance[1], rel=1e-5)
    # What transformers hooks into layers is there once, for the views of the model and for itself.
    output = whole.model(torch.arange(5, 9)[None], output_router_logits=True)
    again = split.model(torch.arange(5, 9)[None], output_router_logits=True)
    assert len(output.router_logits) == len(again.router_logits) == LAYERS


def test_a_trained_embedding_gets_its_gradient(folder, tmp_path, calls):
    targets = ["q_proj", "embed_tokens", "lm_head"]
    split, one = (
        train(folder, tmp_path / str(bounds), bounds, targets=targets) for bounds in ((0, 3, 4), None)
    )
    assert calls
    for mine, theirs in zip(logs_of(split), logs_of(one), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    weights = [dict(trainer.model.named_parameters()) for trainer in (split, one)]
    name = next(name for name in weights[0] if "embed_tokens.modules_to_save" in name)
    torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=2e-5)


def test_saved_and_resumed(folder, tmp_path, whole):
    first = train(folder, tmp_path, (0, 2, 4), save_strategy="steps", save_steps=4)
    assert logs_of(first) == [pytest.approx(entry, rel=1e-5, abs=1e-7) for entry in whole[0]]
    second = train(folder, tmp_path / "other", (0, 2, 4), max_steps=1)
    second.args.max_steps = -1
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    # TRL counts tokens from where it resumes.
    for mine, theirs in zip(logs_of(second)[-4:], whole[0][-4:], strict=True):
        assert mine[:-1] == pytest.approx(theirs[:-1], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("config", "bounds", "words"),
    [
        (MultiGPUConfig(micro_batches=3), (0, 2, 4), "is cut into 4 to 8 micro-batches"),
        (MultiGPUConfig(micro_batches=9), (0, 2, 4), "is cut into 4 to 8 micro-batches"),
        (MultiGPUConfig(micro_batches=8), None, "here the model is whole on one device"),
    ],
)
def test_micro_batches_that_cannot_be(folder, tmp_path, config, bounds, words):
    with pytest.raises(ConfigError, match=words):
        train(folder, tmp_path, bounds, per_device=2, accumulation=4, config=config)


def test_what_cannot_be_pipelined_goes_through_the_stages_in_turn(folder, tmp_path, calls, caplog):
    with caplog.at_level("INFO", "pantheraml"):
        trainer = train(folder, tmp_path, (0, 2, 4), loss_type="dft")
    assert not calls and "one after the other: the loss is not the plain one" in caplog.text
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_the_host_asks_no_device_within_a_step(folder, tmp_path, monkeypatch):
    """What transformers and our attention ask of tensors would let the host wait for all that a device has to do."""

    def asked(*_, **__):
        raise AssertionError("the host waits")

    run = step.Pipeline.step

    def watched(self, *args, **kwargs):
        with monkeypatch.context() as during:
            during.setattr(layout, "_find_documents", asked)
            during.setattr(fused_attention, "_all_real", asked)
            during.setattr(masking_utils, "find_packed_sequence_indices", asked)
            for name in ("item", "tolist", "__bool__", "cpu", "nonzero"):
                during.setattr(torch.Tensor, name, asked)
            return run(self, *args, **kwargs)

    # Between devices, what arrives is another tensor than what was sent.
    send = Link.send
    monkeypatch.setattr(Link, "send", lambda self, tensor: send(self, tensor.clone()))
    monkeypatch.setattr(step.Pipeline, "step", watched)
    trainer = train(folder, tmp_path, (0, 2, 4), max_steps=2)
    assert trainer.model.config._attn_implementation == fused_attention.NAME
    for per_device in (1, 2):  # one document in a row, and several
        packed = train(
            folder, tmp_path / "packed", (0, 2, 4), max_steps=2, padding_free=True, per_device=per_device,
            accumulation=4,
        )  # fmt: skip
        assert packed.state.global_step == 2


@pytest.mark.parametrize(("positions", "offsets"), [([0, 1, 2, 3], [0, 4]), ([0, 1, 0, 1], [0, 2, 4])])
def test_documents_of_a_row_are_known_before_the_step(positions, offsets):
    """Also to a collator that does not say (TRL 1.15): on a stage's device, positions would have to be looked at."""
    batch = dict(input_ids=torch.zeros(1, 4, dtype=torch.int64), position_ids=torch.tensor([positions]))
    settle_masks([batch])
    assert batch["cu_seq_lens_q"].tolist() == offsets and batch["max_length_q"] == max(positions) + 1


def test_a_batch_is_cut_along_its_rows():
    batch = dict(input_ids=torch.arange(10).view(5, 2), labels=torch.zeros(5, 2), max_length_q=2, none=None)
    parts = cut(batch, 3)
    assert [part["input_ids"].shape[0] for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
    assert all(part["max_length_q"] == 2 and part["none"] is None for part in parts)
    assert len(cut(batch, 9)) == 5
    packed = dict(input_ids=torch.zeros(1, 8), cu_seq_lens_q=torch.tensor([0, 3, 8]))
    assert len(cut(packed, 4)) == 1


def test_a_link_within_a_device_hands_tensors_on():
    tensor = torch.ones(3)
    assert Link(CPU, CPU).send(tensor).open() is tensor


def test_neighbouring_layers_on_a_device_are_a_stage():
    a, b = torch.device("cuda", 0), torch.device("cuda", 1)
    split = Split.of_layers([a, a, b, a], a, b)
    assert [(stage.first, stage.stop, stage.device) for stage in split.stages] == [
        (0, 2, a),
        (2, 3, b),
        (3, 4, a),
    ]
    assert split.num_layers == 4 and split.devices == (a, b)
    turns = Split.of_layers([a, b, a, b], a, b)
    assert (turns.rounds, turns.num_gpus) == (2, 2)
    assert split.describe() == (
        "embedding on cuda:0, layers 0-1 on cuda:0, layers 2-2 on cuda:1, layers 3-3 on cuda:0, head on cuda:1"
    )


def test_a_split_model_leaves_no_gpu_for_ranks(folder, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    settings = dict(
        args=PantheraMLTrainingArguments(output_dir=str(tmp_path), report_to="none"), train_dataset=rows(),
        tokenizer=tokenizer, multi_gpu_config=MultiGPUConfig(num_processes=2),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="2 ranks were asked for"):
        PantheraMLDistributedTrainer(model, **settings)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert PantheraMLDistributedTrainer(model, **settings).args.world_size == 1
