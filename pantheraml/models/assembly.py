"""From a checked request to a model in its place: files, precision, weights, tokenizer, fused parts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pantheraml.devices.memory import limit_gpu
from pantheraml.devices.segments import grow_segments
from pantheraml.errors import ConfigError
from pantheraml.log import say
from pantheraml.models import loading
from pantheraml.models.families import find_family
from pantheraml.models.patching import PatchSet
from pantheraml.models.placement import Place, Unplaced, find_place, first_device
from pantheraml.models.positions import extend_positions
from pantheraml.models.precision import (
    Precision,
    as_stored,
    check_dequantized,
    check_precision,
    choose_precision,
)
from pantheraml.models.recompute import watch
from pantheraml.models.request import LoadRequest
from pantheraml.models.saved_adapters import saved_vocabulary
from pantheraml.models.source import ModelSource, resolve_config, resolve_source
from pantheraml.models.state import ModelState, set_state
from pantheraml.models.tokenizer import check_vocabulary, load_tokenizer
from pantheraml.models.zero3 import check_storage, loaded_whole

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from pantheraml.kernels.attention.backend import AttentionCall


def find_source(request: LoadRequest) -> ModelSource:
    """The files of ``request``, fetched if they are not on this machine."""
    return resolve_source(
        request.model_name,
        revision=request.revision,
        token=request.token,
        trust_remote_code=request.trust_remote_code,
    )


def before_loading(request: LoadRequest) -> Unplaced:
    """What is to be placed, without a look at any GPU; of a hub model only the configuration is fetched."""
    import torch

    if request.trust_remote_code:  # its code is among the other files
        folder = find_source(request).folder
    else:
        folder = resolve_config(request.model_name, revision=request.revision, token=request.token)
    config = loading.load_config(folder, trust_remote_code=request.trust_remote_code)
    # Bytes are asked for: which of the 16-bit types it will be does not matter.
    dtype = request.dtype if request.flags.full_finetuning else request.dtype or "bfloat16"
    stored = getattr(config, "quantization_config", None)
    precision = choose_precision(request.flags, dtype, torch.device("cpu"), stored)
    return _unplaced(request, config, precision)


def _unplaced(request: LoadRequest, config: PretrainedConfig, precision: Precision) -> Unplaced:
    full, fused = request.flags.full_finetuning, request.kernels == "auto"
    is_shared = request.sharding is not None or request.tensor_group is not None
    return Unplaced(config, precision, full, request.max_seq_length, fused, is_shared)


def assemble(request: LoadRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelState]:
    """Load the base model of ``request`` and its tokenizer; the model carries its ``ModelState``.

    The process's random state is left as it was; whatever starts random depends on ``random_state`` alone.

    Raises:
        ConfigError, ModelLoadError, NotYetError, HardwareError: as ``from_pretrained`` says.
    """
    from pantheraml.models.fused.early_attention import tried_beside
    from pantheraml.models.split import carry_between

    trust = request.trust_remote_code
    source = find_source(request)
    if source.adapter is not None and request.flags.full_finetuning:
        raise ConfigError(
            got=f"full_finetuning=True was given for the adapter '{request.model_name}'.",
            need="All weights are trained from a full model; an adapter is a few extra ones.",
            fix="Merge it first with save_pretrained_merged and load that folder, or drop full_finetuning.",
        )
    config = loading.load_config(source.folder, trust_remote_code=trust)
    stored = getattr(config, "quantization_config", None)
    device = first_device(request.device_map)
    precision = choose_precision(request.flags, request.dtype, device, stored)
    check_precision(precision, device)
    check_storage(precision.storage, request.zero_stage)
    check_dequantized(request.keep_dequantized, precision, request.kernels)
    place = find_place(
        _unplaced(request, config, precision),
        request.device_map,
        request.max_memory,
        is_alone=request.is_alone,
        pipeline=request.pipeline,
    )
    for gpu, limit in place.limits.items():
        limit_gpu(gpu, limit)
    grow_segments(place.device)
    extend_positions(config, request.max_seq_length, request.rope_scaling)
    tokenizer = load_tokenizer(source.tokenizer_folder, fix=request.fix_tokenizer, trust_remote_code=trust)
    with tried_beside(_coming_calls(request, config, precision, place)):
        model = _load_base(request, source, config, precision, place)
    check_vocabulary(model, tokenizer)
    text = model.config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = tokenizer.pad_token_id

    state = ModelState(
        source=source,
        max_seq_length=request.max_seq_length,
        precision=precision,
        recompute=request.recompute,
        keep_dequantized=request.keep_dequantized,
        full_finetuning=request.flags.full_finetuning,
        family=find_family(config),
        kernels=request.kernels,
        patches=PatchSet(),
    )
    set_state(model, state)
    if place.split is not None and state.family is not None:
        state.split = place.split
        carry_between(model, state.family, place.split)
    watch(model.base_model, state)
    _fuse(request, model, state, place.device)
    if request.sharding is not None:
        from pantheraml.models.sharding import shard_model

        state.sharding = request.sharding
        shard_model(model, request.sharding, precision.dtype if precision.storage == "plain" else None)
    return model, tokenizer, state


def _fuse(request: LoadRequest, model: PreTrainedModel, state: ModelState, device: torch.device) -> None:
    """Swap in the parts that are fused on ``device``, and say which."""
    from pantheraml.models.fused import apply_fused_parts

    if request.kernels != "auto":
        return
    apply_fused_parts(
        model,
        state.family,
        state.patches,
        keep_attention=request.attn_implementation is not None,
        device=device,
        is_cut=request.tensor_group is not None,
    )
    _say_patches(state.patches)


def _coming_calls(
    request: LoadRequest, config: PretrainedConfig, precision: Precision, place: Place
) -> list[AttentionCall]:
    """What attention will be asked for, on each device, if it is ours."""
    from pantheraml.models.fused.early_attention import coming_calls

    family = find_family(config)
    if (
        request.kernels != "auto"
        or request.attn_implementation is not None
        or family is None
        or family.not_text
    ):
        return []
    text, tokens = config.get_text_config(), request.max_seq_length
    devices = [place.device] if place.split is None else place.split.devices
    return [
        call for device in devices for call in coming_calls(text, family, precision.dtype, device, tokens)
    ]


def _load_base(
    request: LoadRequest, source: ModelSource, config: PretrainedConfig, precision: Precision, place: Place
) -> PreTrainedModel:
    """The model with its weights in their places, and as many rows of embeddings as are wanted."""
    import torch

    from pantheraml.models.split import drop_hooks

    trust = request.trust_remote_code
    num_labels = loading.choose_num_labels(request.num_labels, config, source.adapter)
    device_map, cut = place.device_map, None
    if request.sharding is not None:
        from pantheraml.models.quantised_shares import cut_of

        # Into a mapped file: ranks share its memory, and read what they keep.
        device_map, cut = {"": "cpu"}, cut_of(request.sharding)
        precision = as_stored(precision, config) if precision.storage == "plain" else precision
    options = loading.LoadOptions(
        device_map, precision, request.attn_implementation, num_labels, trust, place.limits,
        request.tensor_group, cut,
    )  # fmt: skip
    devices = [place.device] if place.split is None else place.split.devices
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        torch.manual_seed(request.random_state)
        with loaded_whole():
            model = loading.load_model(source.folder, config, options)
        if place.split is not None:
            drop_hooks(model)
        rows = request.resize_model_vocab
        if rows is None and source.adapter is not None:
            rows = saved_vocabulary(model, source.adapter)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
    model.config._name_or_path = model.name_or_path = source.name
    return model


def _say_patches(patches: PatchSet) -> None:
    """One line: how many parts of which kind were swapped, and what was left and why."""
    counts = Counter(change.what for change in patches.report() if change.what != "skipped")
    swapped = ", ".join(f"{count} x {what}" if count > 1 else what for what, count in counts.items())
    skipped = "; ".join(f"{path}: {why}" for path, what, why in patches.report() if what == "skipped")
    say(f"fused parts: {swapped or 'none'}{f' (left as they are: {skipped})' if skipped else ''}.")
