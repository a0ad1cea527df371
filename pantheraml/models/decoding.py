"""Fast generation: ``model.generate`` as it is, with a recorded step for every token.

Launching the thousand kernels of one decoding step takes the host several times as long as running them takes the GPU.
transformers' way out is ``cache_implementation="static"``, which compiles the step for tens of seconds, and again for
other lengths. Here the step is recorded as a CUDA graph instead (``recorded_step``), which takes about as long as one
plain step and needs no compiler. Three methods of the model are changed, all undone by one ``revert``:

- ``generate`` passes a cache that keeps its addresses from call to call;
- ``_valid_auto_compile_criteria`` says that a step with this cache may be replaced;
- ``get_compiled_call`` gives the recorded step.

What it does not cover (beams, assistants, a cache of the user's, returned caches, sliding windows) is generated as
before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from pantheraml.devices.memory import free_gpu_bytes
from pantheraml.models.fused.decoder_layer import FusedDecoderLayer
from pantheraml.models.fused.decoding_layer import apply_decoding_layers
from pantheraml.models.patching import PatchSet
from pantheraml.models.recorded_step import RecordedStep, Step, record_cuda_graph
from pantheraml.models.sharded_linear import tensor_group_of
from pantheraml.models.sharding import is_sharded
from pantheraml.models.split import is_split
from pantheraml.models.state import get_state
from pantheraml.models.zero3 import is_partitioned

# Lengths of caches are multiples of this, so that calls of similar lengths share one cache and one recording.
LENGTH_STEP = 256
# Of the free memory, what a cache may take.
_MEMORY_SHARE = 0.5
# Settings of generate that ask for another loop, or for what outlives the call.
_OTHER_LOOPS = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "custom_generate",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "prefill_chunk_size",
    "cache_implementation",
    "compile_config",
    "past_key_values",
    "inputs_embeds",
    "synced_gpus",
    "return_dict_in_generate",
)
_METHODS = ("generate", "_valid_auto_compile_criteria", "get_compiled_call")


class KeptLayer(StaticLayer):
    """A static layer that can be emptied and filled again at the same addresses."""

    is_kept = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, the first time; (B, K, T, D) each."""
        if self.keys is None or self.keys.dtype != key_states.dtype:
            with torch.inference_mode(False):  # so that a later call may write to it outside of that mode
                super().lazy_initialization(key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, K, S, D) behind the earlier ones; one token in three kernels.

        Under autocast float32 angles make keys float32, beside values of 16 bits; both are kept in the dtype of those,
        in which attention computes.
        """
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized or key_states.shape[-2] != 1:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = cast("tuple[Tensor, Tensor]", (self.keys, self.values))
        position = self.cumulative_length.view(1)
        keys.index_copy_(2, position, key_states)
        values.index_copy_(2, position, value_states)
        self.cumulative_length.add_(1)
        return keys, values

    def empty(self) -> None:
        """As new, without giving the memory back."""
        self.reset()
        self.is_initialized = False


class KeptCache(StaticCache):
    """A static cache whose layers keep their addresses.

    Args:
        model: what it is for.
        batch: rows.
        length: tokens a row can have.
    """

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        super().__init__(config=model.config, max_cache_len=length)
        self.layers = [KeptLayer(max_cache_len=length) for _ in self.layers]
        self.batch, self.length = batch, length

    def empty(self) -> None:
        """As new, without giving the memory back."""
        for layer in self.layers:
            if isinstance(layer, KeptLayer):
                layer.empty()


def set_decoding(model: Any, on: bool) -> None:
    """Switch fast generation of a model that PantheraML loaded; a plain transformers model stays as it is."""
    state = get_state(model)
    if state is None or state.kernels != "auto":
        return
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not on:
        state.decoding.revert()
        for module in base.modules():
            if isinstance(module, FusedDecoderLayer):
                module.reader.release(trained_only=True)
        return
    for module in base.modules():
        if isinstance(module, FusedDecoderLayer):
            module.reader.keep_unpacked(False)  # training asks for it again; the cache needs the memory
    if not state.decoding.report() and apply_decoding(base, state.decoding) is not None:
        apply_decoding_layers(base, state.decoding)


def is_recording(model: Any) -> bool:
    """Whether ``generate`` replays recorded steps now, as ``set_decoding`` has switched it."""
    state = get_state(model)
    return state is not None and any(change.what != "skipped" for change in state.decoding.report())


def why_not_recorded(model: PreTrainedModel, *, on_cpu: bool = False) -> str | None:
    """Why steps of ``model`` are not recorded, or None when they are."""
    if model.device.type != "cuda" and not on_cpu:
        return "CUDA graphs need a GPU"
    if is_split(model):
        return "its layers are on several devices"
    if is_sharded(model) or is_partitioned(model):
        return "ranks share out its weights"
    if tensor_group_of(model) is not None:
        return "its layers are cut between ranks"
    missing = [name for name in _METHODS if not hasattr(model, name)]
    if missing:
        return f"this transformers has no {missing[0]}"
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"{type(model).__name__} runs Python that depends on its data"
    layers = StaticCache(config=model.config, max_cache_len=1).layers
    if any(type(layer) is not StaticLayer for layer in layers):
        return "its cache counts on the host (a sliding window, say)"
    return None


class Decoding:
    """What generation keeps between calls: one cache and one recording.

    Args:
        record: as for ``RecordedStep``.
    """

    def __init__(self, record: Callable[[Step], Step] = record_cuda_graph) -> None:
        self._record = record
        self.step = RecordedStep(record)
        self.cache: KeptCache | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model has a cache of its own.
        return type(self), (self._record,)

    def cache_for(self, model: PreTrainedModel, batch: int, length: int) -> KeptCache | None:
        """An empty cache of at least this size, or None where it would take too much memory."""
        cache = self.cache
        if cache is not None and cache.batch == batch and length <= cache.length <= 4 * length + LENGTH_STEP:
            cache.empty()
            return cache
        self.forget()
        rounded = -(-length // LENGTH_STEP) * LENGTH_STEP
        if model.device.type == "cuda":
            need = cache_bytes(model, batch, rounded)
            if need > _MEMORY_SHARE * free_gpu_bytes(model.device):
                return None
        with torch.inference_mode(False):
            self.cache = KeptCache(model, batch, rounded)
        return self.cache

    def forget(self) -> None:
        """Give the memory back."""
        self.cache = None
        self.step.forget()


def cache_bytes(model: PreTrainedModel, batch: int, length: int) -> int:
    """Bytes of keys and values of ``batch`` rows of ``length`` tokens."""
    config: Any = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * batch * length * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize


def apply_decoding(
    model: PreTrainedModel,
    patches: PatchSet,
    *,
    on_cpu: bool = False,
    record: Callable[[Step], Step] = record_cuda_graph,
) -> Decoding | None:
    """Let ``model.generate`` replay recorded steps where it can.

    Args:
        model: the base model, on its device.
        patches: the ledger; ``revert`` undoes it all.
        on_cpu: do it on a CPU too, with a ``record`` that works there.
        record: as for ``RecordedStep``.

    Returns:
        What is kept between calls, or None where nothing was changed (``patches`` says why).
    """
    reason = why_not_recorded(model, on_cpu=on_cpu)
    if reason is not None:
        patches.skip("generate", reason)
        return None
    decoding = Decoding(record)
    changed: Any = model  # so that its methods are not taken for modules
    ways = {
        "generate": partial(_generate, decoding, changed.generate),
        "_valid_auto_compile_criteria": partial(_may_replace, changed._valid_auto_compile_criteria),
        "get_compiled_call": partial(_step_of, decoding, changed.get_compiled_call),
    }
    for name, way in ways.items():
        patches.bind(model, name, way, "one CUDA graph a token")
    return decoding


def _generate(
    decoding: Decoding, before: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any
) -> Any:
    """``generate`` with a kept cache where the plain loop over tokens is asked for."""
    size = _size_asked(model, args, kwargs)
    cache = None if size is None else decoding.cache_for(model, *size)
    if cache is None:
        return before(*args, **kwargs)
    try:
        return before(*args, **kwargs, past_key_values=cache)
    except BaseException:
        decoding.forget()  # whatever state the step was left in
        raise


def _size_asked(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int] | None:
    """Rows and tokens per row that a call may produce, or None when it is not the plain loop."""
    settings = kwargs.get("generation_config") or model.generation_config

    def read(name: str) -> Any:
        given = kwargs.get(name)
        return getattr(settings, name, None) if given is None else given

    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if len(args) > 1 or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] == 0:
        return None
    if any(read(name) for name in _OTHER_LOOPS) or (read("num_beams") or 1) > 1 or read("use_cache") is False:
        return None
    new, most = read("max_new_tokens"), read("max_length")
    length = ids.shape[1] + new if new is not None else most
    if not isinstance(length, int) or length <= ids.shape[1]:
        return None
    return ids.shape[0] * (read("num_return_sequences") or 1), length


def _may_replace(before: Callable[..., bool], model: PreTrainedModel, model_kwargs: Any, config: Any) -> bool:
    kept = isinstance(model_kwargs.get("past_key_values"), KeptCache)
    return (kept and not config.disable_compile) or before(model_kwargs, config)


def _step_of(
    decoding: Decoding, before: Callable[..., Any], model: PreTrainedModel, compile_config: Any = None
) -> Any:
    """The recorded step, or the compiled one where a user asks for that."""
    if compile_config is not None or decoding.cache is None:
        return before(compile_config)
    decoding.step.begin()
    return partial(decoding.step, model)
