"""Generation by recorded steps equals plain generation, token by token, whatever happens between two calls.

A CUDA graph needs a GPU. Its stand-in here is a trace of the step's tensor operations: it reads and writes the tensors
it was recorded with and runs nothing of the model's Python, as a graph does.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.fx.experimental.proxy_tensor import make_fx

from pantheraml import FastLanguageModel
from pantheraml.models.decoding import KeptCache, apply_decoding, why_not_recorded
from pantheraml.models.families import find_family
from pantheraml.models.fused import apply_fused_parts, apply_layers, decoding_layer
from pantheraml.models.fused.decoding_layer import apply_decoding_layers, attend_one
from pantheraml.models.fused.functions import AttentionInput
from pantheraml.models.fused.read_layer import LayerReader
from pantheraml.models.patching import PatchSet
from pantheraml.models.recorded_step import fingerprint, sort_inputs
from pantheraml.models.state import get_state
from tests import tiny

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Families whose cache counts on the device alone.
RECORDED = ("llama", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe")


def trace(step):
    """A replay of the operations of ``step`` on the very tensors it used."""
    outputs = []

    def run():
        outputs.append(step())
        return outputs[0].logits

    # Tracing runs the step, which a graph's recording does not; what it wrote to the cache is taken back.
    cache = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, dict))
    layers = cache["past_key_values"].layers
    state = [t for layer in layers for t in (layer.keys, layer.values, layer.cumulative_length)]
    before = [t.clone() for t in state]
    graph = make_fx(run)()
    for tensor, old in zip(state, before, strict=True):
        tensor.copy_(old)

    def replay():
        outputs[0].logits = graph()
        return outputs[0]

    return replay


def again(step):
    """A replay that runs the step's Python too: quicker than ``trace``, for what does not depend on it."""
    return step


def prompt(rows=2, tokens=9, padded=True):
    ids = torch.randint(5, tiny.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    if padded and rows > 1:
        mask[1, :3] = 0  # on the left, as generation wants it
        ids[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def noisy_adapter(model, name="default", seed=0):
    for index, (path, parameter) in enumerate(model.named_parameters()):
        if f".{name}." in path:
            noise = torch.Generator().manual_seed(seed + index)
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=noise))


class Pair:
    """The same model twice: plain, and generating by recorded steps."""

    def __init__(self, family="llama", adapter=True, record=again, **sizes):
        self.plain, model = tiny.build_model(family, **sizes), tiny.build_model(family, **sizes)
        self.patches = PatchSet()
        apply_fused_parts(model, find_family(model.config), PatchSet())
        apply_layers(model, find_family(model.config), PatchSet(), on_cpu=True)
        self.ours = model
        if adapter:
            config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM")
            self.plain, self.ours = (
                get_peft_model(m, copy.deepcopy(config)) for m in (self.plain, self.ours)
            )
            for model in (self.plain, self.ours):
                noisy_adapter(model.eval())
        self.decoding = apply_decoding(self.base, self.patches, on_cpu=True, record=record)
        apply_decoding_layers(self.base, self.patches)

    @property
    def base(self):
        return self.ours.get_base_model() if hasattr(self.ours, "get_base_model") else self.ours

    def check(self, replays=None, **settings):
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **prompt(), **settings}
        outputs = []
        for model in (self.ours, self.plain):
            torch.manual_seed(7)
            outputs.append(model.generate(**settings))
        assert torch.equal(*outputs)
        if replays is not None:
            assert self.decoding.step.replays == replays
        return outputs[0]


@pytest.fixture(scope="module")
def shared():
    return Pair()


@pytest.mark.parametrize(
    ("family", "adapter", "record"),
    [
        *((family, False, again) for family in RECORDED),
        *((family, True, again) for family in ("llama", "qwen2", "qwen3")),
        *((family, True, trace) for family in ("llama", "qwen3")),
        ("mixtral", False, trace),
    ],
)
def test_it_equals_plain_generation(family, adapter, record):
    pair = Pair(family, adapter, record)
    assert {change.what for change in pair.patches.report()} >= {
        "generate() added",
        "get_compiled_call() added",
    }
    # One token by the prompt, two plain steps, then replays; the next call replays from its first step.
    pair.check(replays=12 - 1 - 2)
    pair.check(replays=9 + 11)


def test_float32_weights_under_autocast():
    """As after training in full with bf16=True: float32 angles make keys float32, beside values of 16 bits."""
    pair = Pair(adapter=False)
    with torch.autocast("cpu", torch.bfloat16):
        pair.check()
    assert {t.dtype for layer in pair.decoding.cache.layers for t in (layer.keys, layer.values)} == {
        torch.bfloat16
    }


def test_sampling_streams_and_several_answers(shared):
    shared.check(do_sample=True, temperature=0.9, top_k=40)
    shared.check(do_sample=True, num_return_sequences=3)
    shared.check(repetition_penalty=1.3, max_new_tokens=20)
    shared.check(eos_token_id=[5, 9, 77, 120, 300], pad_token_id=0)
    shared.check(**prompt(rows=1))
    shared.check(max_new_tokens=None, max_length=25)


def test_a_short_answer_is_never_recorded():
    pair = Pair()
    for new in (1, 2, 3):
        pair.decoding.forget()
        pair.check(max_new_tokens=new, replays=0)
    pair.check(max_new_tokens=30)
    assert pair.decoding.step.replays > 0


def test_caches_grow_and_are_kept():
    pair = Pair(max_position_embeddings=1024)
    pair.check()
    first = pair.decoding.cache
    keys = first.layers[0].keys.data_ptr()
    pair.check(max_new_tokens=40, **prompt(tokens=17))
    assert pair.decoding.cache is first and first.layers[0].keys.data_ptr() == keys and first.length == 256
    pair.check(max_new_tokens=12, **prompt(tokens=300), replays=9)
    assert pair.decoding.cache.length == 512
    pair.check(**prompt(rows=3), replays=9)
    assert pair.decoding.cache.batch == 3 and pair.decoding.cache.length == 256


@pytest.mark.parametrize(
    "change", ["weights", "data", "scale", "disabled", "other adapter", "merged", "base"]
)
def test_what_changes_between_two_calls_acts_at_once(change):
    pair = Pair(record=trace)
    before = pair.check()
    for model in (pair.ours, pair.plain):
        if change == "weights":  # as an optimizer does: in place
            with torch.no_grad():
                for path, parameter in model.named_parameters():
                    if "lora_" in path:
                        parameter.mul_(-3.0)
        elif change == "data":  # as a checkpoint is loaded: no version counter sees it
            for path, parameter in model.named_parameters():
                if "lora_" in path:
                    parameter.data.mul_(-3.0)
        elif change == "scale":
            model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 40.0
        elif change == "disabled":
            model.base_model.disable_adapter_layers()
        elif change == "other adapter":
            model.add_adapter("second", LoraConfig(r=2, lora_alpha=20, target_modules=ALL))
            noisy_adapter(model, "second", seed=100)
            model.set_adapter("second")
        elif change == "merged":
            model.merge_adapter()
        else:
            with torch.no_grad():
                model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.mul_(-5.0)
    # A recording that only reads other numbers is kept.
    after = pair.check(replays=9 + 11 if change in ("weights", "data", "base") else 9)
    assert change == "merged" or not torch.equal(before, after)


def test_adapters_chosen_per_row_run_python_in_every_step():
    pair = Pair()
    for model in (pair.ours, pair.plain):
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=20, target_modules=ALL))
        noisy_adapter(model, "second", seed=100)
        model.eval()
    both = pair.check(adapter_names=["default", "second"], replays=0)
    assert not torch.equal(both, pair.check())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2, **prompt(rows=1)},
    ],
)
def test_other_ways_of_generating_stay_as_they_are(settings, shared):
    shared.decoding.forget()
    shared.check(replays=0, **settings)
    assert shared.decoding.cache is None


def test_returned_figures_and_caches_are_transformers_own(shared):
    shared.decoding.forget()
    settings = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    ours, plain = (model.generate(**prompt(), **settings) for model in (shared.ours, shared.plain))
    assert not isinstance(ours.past_key_values, KeptCache) and shared.decoding.cache is None
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)


def test_inference_mode_before_and_after():
    pair = Pair(record=trace)
    with torch.inference_mode():
        pair.check()
    pair.check()
    with torch.inference_mode():
        pair.check(replays=9 + 11 + 11)


def test_a_step_that_cannot_be_recorded_runs_as_it_is(caplog):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    caplog.set_level("INFO", logger="pantheraml")
    pair = Pair()
    pair.patches.revert()
    pair.decoding = apply_decoding(pair.base, pair.patches, on_cpu=True, record=refuse)
    pair.check(replays=0)
    pair.check(replays=0)
    assert caplog.text.count("operation not permitted when stream is capturing") == 1
    assert "\nmore" not in caplog.text


def test_an_error_inside_a_call_leaves_nothing_behind():
    pair = Pair()
    pair.check()

    class Stop(Exception):
        pass

    def stop(ids, scores, **kwargs):
        raise Stop

    with pytest.raises(Stop):
        pair.ours.generate(**prompt(), max_new_tokens=5, stopping_criteria=[stop])
    assert pair.decoding.cache is None
    pair.check(replays=9)


@pytest.mark.parametrize("few", [0, 8, 64])
def test_the_fused_functions_generate_and_training_is_not_touched(few, monkeypatch):
    monkeypatch.setattr(decoding_layer, "FEW_ROWS", few)
    pair = Pair()
    rows, original = [], AttentionInput.apply
    monkeypatch.setattr(
        AttentionInput, "apply", lambda *a: rows.append(a[0].shape[:2].numel()) or original(*a)
    )
    pair.check()
    assert {0: {18, 2}, 8: {18}, 64: set()}[few] == set(rows)
    losses = []
    for model in (pair.ours, pair.plain):
        loss = model(**prompt(padded=False), labels=prompt()["input_ids"]).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        losses.append((loss.detach(), torch.cat([g.flatten() for g in gradients])))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-4)


def test_undoing_gives_the_model_back():
    pair = Pair(adapter=False)
    pair.check()
    pair.patches.revert()
    assert "generate" not in vars(pair.ours) and "get_compiled_call" not in vars(pair.ours)
    assert all("forward" not in vars(layer) for layer in pair.ours.model.layers)
    pair.decoding.forget()
    pair.check(replays=0)


def test_weights_that_would_be_trained_generate_by_fused_functions_too(monkeypatch):
    """A model without an adapter is not frozen; its weights lie in stacks until it trains again."""
    seen, few_rows = [], decoding_layer._few_rows
    monkeypatch.setattr(decoding_layer, "_few_rows", lambda *a, **k: seen.append(a[0]) or few_rows(*a, **k))
    pair = Pair(adapter=False)
    assert pair.ours.lm_head.weight.requires_grad
    pair.check()
    assert len(set(seen)) == pair.ours.config.num_hidden_layers
    projection = pair.ours.model.layers[0].self_attn.k_proj
    assert projection.weight.untyped_storage().nbytes() > projection.weight.nbytes
    pair.patches.revert()
    for layer in pair.ours.model.layers:
        layer.reader.release(trained_only=True)
    assert projection.weight.untyped_storage().nbytes() == projection.weight.nbytes


def test_copies_and_pickles_generate():
    pair = Pair(adapter=False)
    expected = pair.check()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **prompt()}
    twin = copy.deepcopy(pair.ours)
    assert torch.equal(twin.generate(**settings), expected)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.mul_(-5.0)
    assert not torch.equal(twin.generate(**settings), expected)
    pair.check()


def test_mistral_without_a_window():
    Pair("mistral", sliding_window=None).check(replays=9)


def test_packed_weights_are_multiplied_packed(llama, monkeypatch):
    flags = dict(max_seq_length=64, load_in_4bit=True, device_map="cpu")
    plain, model = (FastLanguageModel.from_pretrained(str(llama), **flags)[0].eval() for _ in range(2))
    apply_layers(model, find_family(model.config), PatchSet(), on_cpu=True)
    monkeypatch.setattr(AttentionInput, "apply", None)
    decoding = apply_decoding(model, PatchSet(), on_cpu=True, record=again)
    apply_decoding_layers(model, PatchSet())
    settings = {"max_new_tokens": 8, "do_sample": False, **prompt()}
    for _ in range(2):
        assert torch.equal(model.generate(**settings), plain.generate(**settings))
    assert decoding.step.replays > 0


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_caches_that_count_on_the_host_are_left_to_transformers(family):
    pair = Pair(family, adapter=False)
    assert pair.decoding is None
    assert "a sliding window" in next(c.why for c in pair.patches.report() if c.path == "generate")
    assert "generate" not in vars(pair.ours)


def test_what_a_recording_takes():
    model = tiny.build_model()
    cache = KeptCache(model, 1, 256)
    assert sort_inputs({"input_ids": torch.ones(1, 1), "use_cache": True, "x": None}).constants == (
        ("use_cache", True),
        ("x", None),
    )
    masks = sort_inputs({"attention_mask": {"full_attention": torch.ones(2)}})
    assert list(masks.tensors) == ["attention_mask.full_attention"]
    assert sort_inputs({"streamer": object()}) is None and sort_inputs({"mask": {"a": None}}) is None
    for layer in cache.layers:
        layer.lazy_initialization(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    one, again = sort_inputs({"c": cache}).key, sort_inputs({"c": cache}).key
    cache.layers[1].keys = cache.layers[1].keys.clone()
    assert one == again != sort_inputs({"c": cache}).key
    handle = model.register_forward_hook(lambda *a: None)
    assert fingerprint(model) is None
    handle.remove()
    assert fingerprint(model) == fingerprint(model)


def test_attention_of_one_token():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 8, 1, 16), torch.randn(3, 2, 20, 16), torch.randn(3, 2, 20, 16)
    mask = torch.rand(3, 1, 1, 20) > 0.3
    ours = attend_one(q, k, v, mask, 0.2)
    wide = (t.repeat_interleave(4, dim=1) for t in (k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=mask, scale=0.2)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_the_facade_switches(llama, monkeypatch):
    from pantheraml.models import decoding

    monkeypatch.setattr(decoding, "why_not_recorded", lambda model, on_cpu: None)
    model, _ = FastLanguageModel.from_pretrained(
        str(llama), max_seq_length=64, load_in_4bit=False, device_map="cpu"
    )
    adapted = FastLanguageModel.get_peft_model(model, r=2)
    for _ in range(2):
        assert FastLanguageModel.for_inference(adapted) is adapted and "generate" in vars(model)
    assert len([c for c in get_state(adapted).decoding.report() if c.what == "generate() added"]) == 1
    pickle.loads(pickle.dumps(get_state(adapted).source))
    released = []
    apply_layers(model, find_family(model.config), PatchSet(), on_cpu=True)
    monkeypatch.setattr(LayerReader, "release", lambda reader, **how: released.append(how))
    FastLanguageModel.for_training(adapted)
    assert released == model.config.num_hidden_layers * [{"trained_only": True}]
    assert "generate" not in vars(model) and get_state(adapted).decoding.report() == []
    off, _ = FastLanguageModel.from_pretrained(
        str(llama), max_seq_length=64, load_in_4bit=False, device_map="cpu", kernels="off"
    )
    assert "generate" not in vars(FastLanguageModel.for_inference(off))


def test_a_gpu_is_needed():
    assert why_not_recorded(tiny.build_model()) == "CUDA graphs need a GPU"
