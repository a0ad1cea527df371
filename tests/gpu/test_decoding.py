"""Generation by CUDA graphs on a GPU: the tokens of plain generation, and what happens between calls."""

from __future__ import annotations

import pytest
import torch

from pantheraml import FastLanguageModel
from pantheraml.models import recorded_step
from pantheraml.models.decoding import KeptCache, apply_decoding
from pantheraml.models.patching import PatchSet
from pantheraml.models.recorded_step import RecordedStep, record_cuda_graph
from pantheraml.models.state import get_state
from tests import tiny

pytestmark = pytest.mark.gpu

FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe")


def prompt(rows=2, tokens=9):
    ids = torch.randint(5, tiny.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :3] = 0
        ids[1, :3] = 0
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def generate(model, **settings):
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, **prompt(), **settings}
    return model.generate(**settings)


def step_of(model) -> RecordedStep:
    """The recorded step that ``for_inference`` put behind the model's generate."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return vars(base)["generate"].args[0].step


def load(folder, adapter=True, **flags):
    flags = {"load_in_4bit": False, "dtype": "float32", **flags}
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, **flags)
    if adapter:
        model = FastLanguageModel.get_peft_model(model, r=16)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                noise = torch.Generator().manual_seed(index)
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=noise))
    return model


def both(folder, **flags):
    """Tokens of our generation, twice, and of plain transformers' over the same weights."""
    ours = FastLanguageModel.for_inference(load(folder, **flags))
    plain = FastLanguageModel.for_inference(load(folder, kernels="off", **flags))
    assert "generate" not in vars(plain)
    return ours, [generate(ours), generate(ours)], generate(plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_give_the_tokens_of_plain_steps(checkpoints, family):
    # Experts are adapted through parameters that PEFT computes anew at every call; their base is enough here.
    ours, answers, expected = both(checkpoints(family), adapter=family in ("llama", "qwen2", "qwen3"))
    assert all(torch.equal(answer, expected) for answer in answers)
    # The prompt gives a token, two steps run as they are; the second call replays from its first step.
    assert step_of(ours).replays == (40 - 3) + (40 - 1)


@pytest.mark.parametrize("flags", [dict(dtype="bfloat16"), dict(load_in_4bit=True, dtype="bfloat16")])
def test_half_precision_and_packed_weights_replay_what_steps_compute(tmp_path, flags, monkeypatch):
    # bitsandbytes' fast 4-bit product wants widths that are multiples of 64.
    folder = tiny.save_checkpoint(tmp_path / "base", intermediate_size=128)
    model = FastLanguageModel.for_inference(load(folder, **flags))
    replayed = [generate(model) for _ in range(2)]
    assert step_of(model).replays > 70
    monkeypatch.setattr(recorded_step, "EAGER_STEPS", 10**9)
    step_of(model).forget()
    plain = generate(model)
    assert step_of(model).replays == 0
    assert torch.equal(replayed[0], plain) and torch.equal(replayed[1], plain)


def test_training_between_two_calls_acts_at_once(llama):
    model = load(llama)
    FastLanguageModel.for_inference(model)
    before = generate(model)
    FastLanguageModel.for_training(model)
    assert get_state(model).decoding.report() == []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = prompt()["input_ids"]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    FastLanguageModel.for_inference(model)
    after = generate(model)
    with torch.no_grad():  # and without for_training, in place
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-2.0)
    third = generate(model)
    with model.disable_adapter():
        bare = generate(model)
    plain = FastLanguageModel.for_inference(load(llama, kernels="off", adapter=False))
    assert torch.equal(bare, generate(plain))
    assert not torch.equal(before, after) and not torch.equal(after, third) and not torch.equal(third, bare)


def test_sampling_follows_the_seed_and_lengths_change(llama):
    ours = FastLanguageModel.for_inference(load(llama))
    plain = FastLanguageModel.for_inference(load(llama, kernels="off"))
    for settings in (
        dict(do_sample=True, temperature=0.8),
        dict(max_new_tokens=5),
        dict(max_new_tokens=100),
        dict(do_sample=True, num_return_sequences=3),
        prompt(rows=1),
        dict(num_beams=2),
    ):
        answers = []
        for model in (ours, plain):
            torch.manual_seed(3)
            answers.append(generate(model, **settings))
        assert torch.equal(*answers), settings


def test_a_step_that_waits_for_the_device_is_not_recorded(llama, caplog):
    caplog.set_level("INFO", logger="pantheraml")
    model = load(llama, adapter=False, kernels="off")
    forward = model.model.forward

    def waiting(*args, **kwargs):
        out = forward(*args, **kwargs)
        float(out.last_hidden_state.sum())  # a sync, which no graph can hold
        return out

    expected = generate(model)
    model.model.forward = waiting
    decoding = apply_decoding(model, PatchSet())
    for _ in range(2):
        assert torch.equal(generate(model), expected)
    assert decoding.step.replays == 0 and "synchronizing CUDA operation" in caplog.text
    assert torch.cuda.get_sync_debug_mode() == 0


def test_a_recording_that_fails_leaves_generation_working(llama, caplog):
    def fail(step):
        def partly():
            step()
            raise RuntimeError("half way")

        return record_cuda_graph(partly)

    caplog.set_level("INFO", logger="pantheraml")
    model = load(llama, adapter=False, kernels="off")
    expected = generate(model)
    decoding = apply_decoding(model, PatchSet(), record=fail)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        assert torch.equal(generate(model), expected)
    assert decoding.step.replays == 0 and "half way" in caplog.text
    assert torch.cuda.current_stream() == stream
    generate(model, do_sample=True)


def test_memory_is_given_back(llama):
    model = load(llama)
    FastLanguageModel.for_inference(model)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    generate(model, **prompt(rows=8), max_new_tokens=200)
    assert torch.cuda.memory_allocated() > before
    FastLanguageModel.for_training(model)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2**20


def test_the_graph_reads_the_cache_it_was_given():
    model = tiny.build_model().cuda()
    cache = KeptCache(model, 1, 256)
    ids = torch.arange(5, 12, device="cuda")[None]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        token = torch.full((1, 1), 77, device="cuda")
        for _ in range(2):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        length = int(cache.layers[0].cumulative_length)
        replay = record_cuda_graph(lambda: model(input_ids=token, past_key_values=cache, use_cache=True))
        assert int(cache.layers[0].cumulative_length) == length  # recording runs nothing
        token.fill_(99)
        logits = replay().logits.clone()
        assert int(cache.layers[0].cumulative_length) == length + 1
        whole = torch.cat([ids, torch.tensor([[77, 77, 99]], device="cuda")], dim=1)
        expected = model(input_ids=whole, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
