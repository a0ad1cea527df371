"""Dropout inside a model follows the sample: masks of a token are the same wherever it is, and when computed again."""

from __future__ import annotations

import copy
import hashlib
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from pantheraml.errors import ConfigError
from pantheraml.kernels.keyed_dropout import kept_values
from pantheraml.models.dropout_sites import checkpointed
from pantheraml.models.packed_rows import keep_documents_apart
from pantheraml.models.patching import PatchSet
from pantheraml.models.sample_dropout import Followed, follow_samples, keyed
from pantheraml.models.token_keys import TokenKeys, mixed
from tests.models.dropping import KINDS, build

SAMPLES, TOKENS = (7, 3, 9), 9
IDS = torch.randint(5, 500, (len(SAMPLES), TOKENS), generator=torch.Generator().manual_seed(0))
KEYS = (torch.tensor(SAMPLES)[:, None] << 32) | torch.arange(TOKENS)


def followed(model):
    found = follow_samples(model, PatchSet())
    assert found == Followed(adapters=False, inside=True)
    return model


def run(model, rows=(0, 1, 2), left=0, right=0, seed=5, packed=False):
    """Logits of the rows' own tokens, and all gradients."""
    rows = list(rows)
    ids, keys, mask = (
        nn.functional.pad(one[rows], (left, right), value=0) for one in (IDS, KEYS, torch.ones_like(IDS))
    )
    given = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    if packed:
        given = dict(input_ids=ids.view(1, -1), position_ids=given["position_ids"].view(1, -1))
        keys = keys.view(1, -1)
    if model.config.model_type == "bloom":  # which has no positions
        given.pop("position_ids")
    model.zero_grad()
    with keyed(TokenKeys(keys.reshape(-1), seed, len(keys), inside=True)):
        logits = model(**given, use_cache=False).logits.view(len(rows), left + TOKENS + right, -1)
        logits = logits[:, left : left + TOKENS]
        weight = torch.linspace(-1, 1, logits.shape[-1])
        (logits.log_softmax(-1) * weight).sum().backward()
    assert torch._C._len_torch_function_stack() == 0
    return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def assert_same(found, wanted, exactly=False):
    tolerance = dict(rtol=0, atol=0) if exactly else dict(rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_follow_tokens(kind, attention):
    model = build(kind, attn_implementation="eager" if kind == "bloom" else attention)
    plain = run(followed(model))
    state = torch.get_rng_state()
    order = (2, 0, 1)
    mixed_up, gradients = run(model, order)
    assert_same((mixed_up, gradients), (plain[0][list(order)], plain[1]))
    assert_same(run(model, left=4), plain)
    assert_same(run(model, right=5), plain)
    assert_same(run(model, (1,))[0], plain[0][1:2])
    if kind not in ("bloom", "opt"):  # whose documents cannot be told apart
        keep_documents_apart(model)
        assert_same(run(model, packed=True), plain)
    if kind != "opt":  # which asks it whether to leave layers out
        assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from torch's generator"
    assert not torch.allclose(run(model, seed=6)[0], plain[0], atol=1e-3)
    model.eval()
    assert not torch.allclose(run(model)[0], plain[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "phi3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_drops_the_same(kind, reentrant):
    model = followed(build(kind))
    plain = run(model)
    name = next(n for n in ("activation", "gradient") if hasattr(model, f"{n}_checkpointing_enable"))
    getattr(model, f"{name}_checkpointing_enable")(
        **{f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}}
    )
    model.enable_input_require_grads()
    assert_same(run(model), plain, exactly=True)
    assert_same(run(model), plain, exactly=True)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "phi", "falcon", "gpt_neox"])
def test_attention_by_torch_and_by_the_model_drop_the_same(kind):
    eager, sdpa = (followed(build(kind, attn_implementation=name)) for name in ("eager", "sdpa"))
    for left in (0, 3):
        assert_same(run(eager, left=left), run(sdpa, left=left))


class Layer(GradientCheckpointingLayer):
    """Drops one tensor twice, by one module, and once by a function."""

    def __init__(self, p):
        super().__init__()
        self.share, self.drop = p, nn.Dropout(p)
        self.weight = nn.Parameter(torch.ones(()))  # whose gradient needs what is dropped

    def forward(self, x):
        found = [self.drop(x), self.drop(x), nn.functional.dropout(x, self.share, self.training)]
        return torch.stack(found) * self.weight


class Toy(nn.Module):
    """Layers, of which one may serve twice, computed again by torch's own checkpoint or not."""

    def __init__(self, p=0.25, shared=False, again=None):
        super().__init__()
        first = Layer(p)
        self.layers = nn.ModuleList([first, first if shared else Layer(p)])
        self.again = again

    def forward(self, x):
        again = self.again or (lambda layer, x: layer(x))
        return torch.stack([again(layer, x) for layer in self.layers])


def number(path, index, drop):
    """Of a site: what the module's path, its call and the dropout within it come to."""
    of_path = int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest())
    return 2**63 | mixed(of_path, index, drop) >> 1


def test_values_are_those_of_the_definition():
    model, x = Toy().train(), torch.ones(*KEYS.shape, 40, requires_grad=True)
    found = follow_samples(model, PatchSet())
    keys = found.keys(KEYS, 5)
    with keyed(keys):
        out = model(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
    masks = []
    for layer in ("layers.0", "layers.1"):
        for site in ((f"{layer}.drop", 0, 1), (f"{layer}.drop", 1, 1), (layer, 0, 1)):
            kept = kept_values(keys.keys, 40, 0.25, keys.seed_of(number(*site)))
            masks.append(kept.view(x.shape) / 0.75)
    wanted = torch.stack(masks).view(out.shape)
    assert torch.equal(out, wanted)
    torch.testing.assert_close(gradient, wanted.sum((0, 1)))
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6, "each has a mask of its own"
    with keyed(keys):
        held = x.detach().clone()
        assert model.layers[0].drop.forward(held) is not None  # outside of the model: torch's
        model.layers[0].drop.inplace = True
        assert torch.equal(model.layers[0].drop(held), wanted[0, 0]) and torch.equal(held, wanted[0, 0])


@pytest.mark.parametrize("shared", [False, True])
def test_a_layer_that_serves_twice_is_told_apart_where_it_is_computed_again(shared):
    x, results = torch.ones(*KEYS.shape, 8, requires_grad=True), []
    for again in (None, checkpointed):
        model = Toy(shared=shared, again=again).train()
        with keyed(follow_samples(model, PatchSet()).keys(KEYS, 5)):
            out = model(x)
            assert not torch.equal(out[0], out[1])
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert_same(*results, exactly=True)


def test_it_is_refused_where_it_cannot_be():
    model = Toy(shared=True, again=lambda layer, x: checkpoint(layer, x, use_reentrant=False)).train()
    x = torch.ones(*KEYS.shape, 8, requires_grad=True)
    with (
        keyed(follow_samples(model, PatchSet()).keys(KEYS, 5)),
        pytest.raises(ConfigError, match="several times"),
    ):
        model(x).square().sum().backward()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_leaves_nothing(error):
    model = followed(build("gpt2"))
    plain = run(model)

    def fail(*_):
        raise error("on the way")

    for part in ("transformer.h.1.mlp.act", "transformer.h.0.attn.resid_dropout", "transformer.h.1"):
        handle = model.get_submodule(part).register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(error):
            run(model)
        handle.remove()
        assert torch._C._len_torch_function_stack() == 0
        assert_same(run(model), plain, exactly=True)


def test_threads_have_calls_of_their_own():
    """A pipeline's stages, and autograd's threads, one for each GPU, compute at the same time."""
    model = followed(build("gpt2"))
    _, wanted = run(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    copies, found = [model, copy.deepcopy(model)], {}
    with keyed(TokenKeys(KEYS.reshape(-1), 5, len(KEYS), inside=True)):
        mask = torch.ones_like(IDS)
        for one in copies:
            one.zero_grad()

        def forward(which):
            logits = copies[which](input_ids=IDS, attention_mask=mask, use_cache=False).logits
            found[which] = (logits.log_softmax(-1) * torch.linspace(-1, 1, logits.shape[-1])).sum()

        def backward(which):
            found[which].backward()

        for step in (forward, backward):  # the backward in a thread that has seen no forward
            threads = [threading.Thread(target=step, args=(which,)) for which in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    for one in copies:
        assert_same([p.grad for p in one.parameters() if p.grad is not None], wanted)


def test_it_can_be_undone_copied_and_pickled():
    model, patches = build("gpt2"), PatchSet()
    follow_samples(model, patches)
    plain, hooks = run(model), [len(module._forward_pre_hooks) for module in model.modules()]
    follow_samples(model, PatchSet())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks, "once is enough"
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(run(copied), plain, exactly=True)
    patches.revert()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not torch.allclose(run(model)[0], plain[0], atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "overrides", "inside"),
    [
        ("llama", dict(attention_dropout=0.0), False),
        ("gpt_neox", dict(hidden_dropout=0.0, attention_dropout=0.0), False),  # its classifier's is 0.1
        ("phi3", dict(resid_pdrop=0.0), False),
        ("opt", dict(dropout=0.0, attention_dropout=0.0), False),
        ("opt", dict(attention_dropout=0.0), True),
        ("opt", dict(dropout=0.0, attention_dropout=0.1), True),
        ("gpt2", dict(resid_pdrop=0.0, attn_pdrop=0.0), True),
    ],
)
def test_models_without_dropout_are_left_alone(kind, overrides, inside):
    kinds = {name: value for name, value in KINDS[kind].items() if name not in overrides}
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **kinds, **overrides))
    found = follow_samples(model, PatchSet())
    assert found.inside == inside
    assert any(module._forward_pre_hooks for module in model.modules()) == inside
    seen = []
    model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)))[
        0
    ].register_forward_hook(lambda *_: seen.append(torch._C._len_torch_function_stack()))
    with keyed(found.keys(KEYS, 5)):
        model.train()(input_ids=IDS)
    assert seen == [int(inside)], "torch asks nobody else where nothing drops"


def test_what_is_no_row_of_tokens_stays_torchs(caplog):
    model, x = Toy().train(), torch.ones(2, 40)
    with keyed(follow_samples(model, PatchSet()).keys(KEYS, 5)), caplog.at_level("INFO"):
        torch.manual_seed(3)
        found = model(x)
    torch.manual_seed(3)
    assert torch.equal(found, model(x))
    assert any("draws from torch's generator" in line for line in caplog.messages)


@pytest.mark.slow
def test_compiled_parts_stay_torchs():
    model = followed(build("gpt2"))
    run(model)
    compiled = torch.compile(model, backend="eager")
    with keyed(TokenKeys(KEYS.reshape(-1), 5, len(KEYS), inside=True)):
        compiled(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert follow_samples(build("gpt2"), PatchSet(), compiled=True) == Followed()


def test_attention_that_draws_masks_of_its_own_is_refused():
    model = build("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ConfigError, match="attn_implementation='flash_attention_2' draws masks of its own"):
        follow_samples(model, PatchSet())
    other = build("phi3")
    other.config._attn_implementation_internal = "flash_attention_2"
    assert follow_samples(other, PatchSet()).inside, "the residual's is followed whatever attends"
