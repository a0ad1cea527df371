"""The facade: load a model, attach LoRA, switch between training and generating.

The names and arguments are the ones people know; what happens is in ``models/`` (loading, adapters,
families, patches) and ``export/`` (saving).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.checkpoint.publish import recover
from pantheraml.errors import AdapterError, ConfigError, NotYetError, did_you_mean
from pantheraml.log import say

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from pantheraml.config.multi_gpu import MultiGPUConfig
    from pantheraml.models.request import LoadRequest

# Arguments of other frameworks' from_pretrained, and what to do here instead.
_ELSEWHERE = {
    "fast_inference": "Call FastLanguageModel.for_inference(model) and model.generate(...).",
    "gpu_memory_utilization": "It belongs to a vLLM engine, which is not started here.",
    "max_lora_rank": "Any rank can be given to get_peft_model(r=...).",
    "offload_embedding": "Leave it out; the embedding stays on the device.",
    "float32_mixed_precision": "full_finetuning=True with dtype=None trains float32 masters in mixed precision.",
    "unsloth_tiled_mlp": "Leave it out.",
}


class FastLanguageModel:
    """Load and adapt a language model; all methods are static."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = 2048,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        load_in_fp8: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: str | int | dict[str, Any] | None = None,
        max_memory: dict[Any, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "auto",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        random_state: int = 3407,
        use_multi_gpu: bool | MultiGPUConfig | None = None,
        auto_device_map: bool = False,
        kernels: str = "auto",
        attn_implementation: str | None = None,
        num_labels: int | None = None,
        keep_dequantized: bool = False,
        **unknown: Any,
    ) -> tuple[Any, PreTrainedTokenizerBase]:
        """Load a model and its tokenizer.

        Args:
            model_name: local folder or hub id; a base model, or an adapter saved by ``save_pretrained``
                (its base model is loaded and the adapter attached, trainable).
            max_seq_length: longest training row in tokens; longer rows are cut by the trainer.
            dtype: ``"bfloat16"``, ``"float16"``, ``"float32"`` or a torch dtype; None picks bfloat16 where the GPU
                has it, else float16, and float32 on a CPU.
            load_in_4bit: NF4 with double quantisation. None means yes, unless another precision, full
                fine-tuning or an already quantised checkpoint is chosen.
            load_in_8bit: LLM.int8 weights.
            load_in_16bit: bfloat16 or float16 weights.
            load_in_fp8: weights in FP8 (e4m3), multiplied in FP8 forward and backward; lossy, and fast on GPUs of
                compute capability 8.9 or newer.
            full_finetuning: train all weights; they are held in float32 unless ``dtype`` says otherwise.
            token: hub access token.
            device_map: None, ``"cpu"``, ``"cuda:1"`` or an index: one device. ``"balanced"``: the layers are split over
                all GPUs so that these are equally fast; ``"sequential"``: the first GPU is filled, then the next;
                ``"auto"``: one GPU (or, with ``use_multi_gpu``, a copy on each) if the model fits there, else as
                ``"balanced"``. A mapping from modules to GPUs says it in detail.
            max_memory: bytes that may be taken of each GPU, ``{0: "20GB", 1: "10GiB"}``; others are not used.
            rope_scaling: stretch rotary positions, for example ``{"rope_type": "linear", "factor": 2.0}``.
            fix_tokenizer: give the tokenizer a padding token that is not the end-of-text token.
            trust_remote_code: run Python code that comes with the model.
            use_gradient_checkpointing: recompute activations: True, False, ``"auto"`` (in as few layers as the
                GPU's free memory asks for), or ``"offload"`` (True, with what layers keep in host memory;
                ``"unsloth"`` is a synonym).
            resize_model_vocab: number of embedding rows to grow or shrink to.
            revision: branch, tag or commit on the hub.
            random_state: seed of whatever starts random (new embedding rows, a classification head).
            use_multi_gpu: True, or a ``MultiGPUConfig``, trains on every visible GPU: a script that was started by
                plain ``python`` starts one rank for each, which run it from the beginning. None joins ranks that
                torchrun, accelerate or srun started, and else uses one GPU. False keeps this process to itself.
            auto_device_map: same as ``device_map="auto"``; a ``MultiGPUConfig`` has it on.
            kernels: ``"auto"`` swaps in fused parts where they run; ``"off"`` gives the plain transformers model.
            attn_implementation: transformers' name of an attention, or None.
            num_labels: build a sequence classifier (for reward models: 1) instead of a language model; None
                builds what was saved.
            keep_dequantized: hold 4-bit weights in 16 bits, too, in as many layers as there is memory for, so that
                a step does not unpack them.
            unknown: anything else is an error that says what to use.

        Returns:
            The model on its device, in evaluation mode as loaded, and its tokenizer.

        Raises:
            ConfigError: a flag or a combination that cannot be.
            ModelLoadError: files that are missing, damaged, pickled or out of reach.
            AdapterError: an adapter of another base model.
            HardwareError: FP8 on a GPU that cannot multiply it.
            NotYetError: a promised flag that this version does not have.
        """
        _refuse_unknown(unknown)
        _check_length(max_seq_length)
        _check_kernels(kernels)
        _check_device_map(auto_device_map, device_map)
        from pantheraml.distributed.joining import join
        from pantheraml.models.precision import PrecisionFlags
        from pantheraml.models.request import LoadRequest, check_policy

        request = LoadRequest(
            model_name=model_name,
            max_seq_length=max_seq_length,
            dtype=dtype,
            flags=PrecisionFlags(load_in_4bit, load_in_8bit, load_in_16bit, load_in_fp8, full_finetuning),
            token=token,
            device_map=device_map,
            max_memory=max_memory,
            is_alone=True,
            rope_scaling=rope_scaling,
            fix_tokenizer=fix_tokenizer,
            trust_remote_code=trust_remote_code,
            recompute=check_policy(use_gradient_checkpointing),
            keep_dequantized=keep_dequantized,
            resize_model_vocab=resize_model_vocab,
            revision=revision,
            random_state=random_state,
            kernels=kernels,
            attn_implementation=attn_implementation,
            num_labels=num_labels,
        )
        # Before the heavy libraries are loaded: a process that starts ranks needs none of them.
        request = join(request, use_multi_gpu, auto_device_map)
        from pantheraml.export.adapter import check_adapter_matches
        from pantheraml.export.binding import bind_saving
        from pantheraml.models.assembly import assemble
        from pantheraml.models.saved_adapters import load_adapter

        if Path(model_name).is_dir():
            recover(model_name)  # a save there that was killed between two renames is finished first
        _download_once(request)
        model, tokenizer, state = assemble(request)
        bind_saving(model, state.patches)
        if state.source.adapter is None:
            return model, tokenizer
        check_adapter_matches(state.source.adapter, model)
        adapted = load_adapter(model, state.source.adapter)
        bind_saving(adapted, state.patches)
        return adapted, tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Sequence[str] | None = None,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | None = None,
        use_gradient_checkpointing: bool | str | None = None,
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
        use_dora: bool = False,
        **lora_settings: Any,
    ) -> PeftModel:
        """Attach a LoRA adapter; only its weights are trained.

        Args:
            model: what ``from_pretrained`` returned (any transformers model will do).
            r: rank of the two factors.
            target_modules: names of the projections, ``"all-linear"``, a regular expression, or None for
                q, k, v, o, gate, up and down. ``embed_tokens`` and ``lm_head`` among them are trained in full.
            lora_alpha: scale; the update is multiplied by ``lora_alpha / r`` (``/ sqrt(r)`` with ``use_rslora``).
            lora_dropout: share of the adapter's input that is dropped in training.
            bias: which biases are trained: ``"none"``, ``"all"`` or ``"lora_only"``.
            layers_to_transform: layers to adapt, or None for all.
            layers_pattern: PEFT's name of the layer list, with ``layers_to_transform``.
            use_gradient_checkpointing: as in ``from_pretrained``; None keeps what was said there.
            random_state: seed of the adapter's random start.
            max_seq_length: a new longest row in tokens; None keeps the one of ``from_pretrained``.
            use_rslora: rank-stabilised scale.
            modules_to_save: modules trained in full beside the adapter.
            init_lora_weights: PEFT's choice of start: True, ``"gaussian"``, ``"pissa"``, ``"olora"``, ``"loftq"``, …
            loftq_config: settings of ``init_lora_weights="loftq"``.
            use_dora: weight-decomposed LoRA.
            lora_settings: any other field of ``peft.LoraConfig``.

        Returns:
            The PEFT model around ``model``.

        Raises:
            AdapterError: a target the model does not have, an adapter that is there already, or a combination
                that PEFT refuses.
            ConfigError: an unknown or impossible setting.
        """
        from pantheraml.export.binding import bind_saving
        from pantheraml.models.adapters import (
            attach_adapter,
            build_lora_config,
            count_parameters,
            has_adapter,
        )
        from pantheraml.models.families import find_family
        from pantheraml.models.request import check_policy
        from pantheraml.models.state import get_state

        state = get_state(model)
        if has_adapter(model):
            raise AdapterError(
                got="get_peft_model was called on a model that has an adapter.",
                need="One adapter is trained at a time; a loaded adapter is trainable already.",
                fix="Train what the first call returned, or merge it with save_pretrained_merged and load the merged "
                "folder.",
            )
        if state is not None and state.full_finetuning:
            raise ConfigError(
                got="get_peft_model was called on a model loaded with full_finetuning=True.",
                need="Either all weights are trained or an adapter is.",
                fix="Drop full_finetuning=True to train an adapter, or drop get_peft_model to train all weights.",
            )
        if max_seq_length is not None:
            _check_length(max_seq_length)
        policy = None if use_gradient_checkpointing is None else check_policy(use_gradient_checkpointing)
        config = build_lora_config(
            model,
            state.family if state else find_family(model.config),
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            use_dora=use_dora,
            **lora_settings,
        )
        adapted = attach_adapter(model, config, seed=random_state)
        if state is not None:
            state.recompute = state.recompute if policy is None else policy
            state.max_seq_length = max_seq_length or state.max_seq_length
            state.with_adapter = adapted
            bind_saving(adapted, state.patches)
        trainable, total = count_parameters(adapted)
        say(
            f"LoRA r={r}: {trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %)."
        )
        return adapted

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Put the model in training mode, recompute as its policy (or the argument) says; returns the model."""
        from pantheraml.models.decoding import set_decoding
        from pantheraml.models.recompute import is_recompute_forced, set_recompute
        from pantheraml.models.request import check_policy
        from pantheraml.models.state import get_state

        state = get_state(model)
        policy = state.recompute if state else "auto"
        if use_gradient_checkpointing is not None:
            policy = check_policy(use_gradient_checkpointing)
            if state is not None:
                state.recompute = policy
        set_decoding(model, False)
        model.train()
        set_recompute(model, is_recompute_forced(policy))
        return model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Put the model in evaluation mode with its cache on and recompute off; returns the model.

        On a GPU, ``generate`` then replays one CUDA graph a token. The graph is recorded at the fourth new token of a
        first call, which takes about as long as one plain step, and again when the adapter or the number of rows
        changes, or a call needs a longer cache. ``for_training`` undoes it and frees the cache.
        """
        from pantheraml.models.decoding import set_decoding
        from pantheraml.models.recompute import set_recompute

        set_recompute(model, False)
        model.eval()
        model.config.use_cache = True
        set_decoding(model, True)
        return model


FastModel = FastLanguageModel


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    import inspect

    for name, value in unknown.items():
        if name in _ELSEWHERE:
            raise NotYetError(
                got=f"from_pretrained got {name}={value!r}.",
                need="PantheraML has no such argument and does not ignore what it cannot do.",
                fix=_ELSEWHERE[name],
            )
        known = inspect.signature(FastLanguageModel.from_pretrained).parameters
        raise ConfigError(
            got=f"from_pretrained got {name}={value!r}.",
            need=f"It is not one of its arguments. {did_you_mean(name, known)}",
            fix="Remove it or correct the name.",
        )


def _check_length(max_seq_length: object) -> None:
    if not isinstance(max_seq_length, int) or isinstance(max_seq_length, bool) or max_seq_length < 1:
        raise ConfigError(
            got=f"max_seq_length={max_seq_length!r} was given.",
            need="It is the longest training row in tokens, a whole number of 1 or more.",
            fix="Use max_seq_length=2048, or the length of your longest row.",
        )


def _check_kernels(kernels: str) -> None:
    if kernels not in ("auto", "off"):
        raise ConfigError(
            got=f"kernels={kernels!r} was given.",
            need="It is 'auto' (fused parts where they run) or 'off' (the plain transformers model).",
            fix='Leave it out for "auto".',
        )


def _check_device_map(auto_device_map: bool, device_map: Any) -> None:
    if auto_device_map and device_map not in (None, "auto"):
        raise ConfigError(
            got=f"auto_device_map=True and device_map={device_map!r} were given together.",
            need="One of them decides where the model goes.",
            fix="Keep device_map.",
        )


def _download_once(request: LoadRequest) -> None:
    """Let one rank of each machine fetch the files before the others look for them."""
    from pantheraml.distributed.process_group import is_distributed_available, main_process_first
    from pantheraml.models.assembly import find_source

    if is_distributed_available():
        with main_process_first():
            find_source(request)
