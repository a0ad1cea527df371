"""Which precision the weights are stored in and computed with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pantheraml.errors import ConfigError, HardwareError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

Storage = Literal["4bit", "8bit", "fp8", "plain"]


@dataclass(frozen=True)
class Precision:
    """How a model's weights are held.

    Attributes:
        storage: ``"4bit"`` (NF4, double quantisation), ``"8bit"`` (LLM.int8), ``"fp8"`` (e4m3, one scale per
            output), or ``"plain"`` (``dtype`` itself).
        dtype: dtype of plain weights, and of the computation on quantised ones.
    """

    storage: Storage
    dtype: torch.dtype

    def quantization_config(self) -> Any | None:
        """The quantisation for transformers (bitsandbytes', or ours for FP8), or None for plain weights."""
        if self.storage == "fp8":
            from pantheraml.models.fp8 import Fp8Config

            return Fp8Config()
        from transformers import BitsAndBytesConfig

        if self.storage == "4bit":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
            )
        if self.storage == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return None


@dataclass(frozen=True)
class PrecisionFlags:
    """The flags of ``from_pretrained`` that choose a precision; ``load_in_4bit=None`` was left to us."""

    load_in_4bit: bool | None = None
    load_in_8bit: bool = False
    load_in_16bit: bool = False
    load_in_fp8: bool = False
    full_finetuning: bool = False


def choose_precision(
    flags: PrecisionFlags,
    dtype: str | torch.dtype | None,
    device: torch.device,
    stored: dict[str, Any] | None,
) -> Precision:
    """Decide storage and dtype from the flags, the device and what the checkpoint holds.

    Args:
        flags: the user's flags.
        dtype: the user's dtype, or None to let the hardware decide.
        device: where the model will be.
        stored: the checkpoint's own ``quantization_config``, or None.

    Raises:
        ConfigError: flags that exclude each other, or a precision the checkpoint cannot give.
    """
    import torch

    from pantheraml.devices.inventory import pick_dtype

    chosen = [
        name
        for name in ("load_in_4bit", "load_in_8bit", "load_in_16bit", "load_in_fp8")
        if getattr(flags, name)
    ]
    if len(chosen) > 1:
        raise ConfigError(
            got=f"{' and '.join(f'{name}=True' for name in chosen)} were given together.",
            need="A model is loaded in one precision.",
            fix="Keep one of them.",
        )
    if flags.full_finetuning and (flags.load_in_4bit or flags.load_in_8bit or flags.load_in_fp8):
        raise ConfigError(
            got=f"full_finetuning=True and {chosen[0]}=True were given together.",
            need="Quantised weights cannot be trained, only adapters on top of them.",
            fix=f"Drop {chosen[0]} to train all weights, or drop full_finetuning to train a LoRA adapter.",
        )
    if stored is not None:
        return _stored_precision(flags, chosen, dtype, device, stored)

    picked = pick_dtype(dtype, device)
    if flags.full_finetuning:
        # Masters stay in float32 unless asked otherwise: a bf16 weight swallows updates smaller than 1/256 of itself.
        # The trainer still computes in bf16 or fp16 by autocast.
        if dtype is None and not flags.load_in_16bit:
            picked = torch.float32
        return Precision("plain", _at_most_16bit(picked, dtype) if flags.load_in_16bit else picked)
    if flags.load_in_8bit:
        return Precision("8bit", picked)
    if flags.load_in_fp8:
        return Precision("fp8", picked)
    if flags.load_in_16bit:
        return Precision("plain", _at_most_16bit(picked, dtype))
    if flags.load_in_4bit is False:
        return Precision("plain", picked)
    return Precision("4bit", picked)


def as_stored(precision: Precision, config: PretrainedConfig) -> Precision:
    """``precision`` with the 16-bit dtype that weights are stored in, where float32 is wanted of them in the end."""
    import torch

    stored = getattr(config, "dtype", None)
    if precision.dtype == torch.float32 and stored in (torch.bfloat16, torch.float16):
        return replace(precision, dtype=stored)
    return precision


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse FP8 where its products do not run.

    Raises:
        HardwareError: the GPU is older than Ada and Hopper, or a small product on it failed.
    """
    if precision.storage != "fp8":
        return
    from pantheraml.kernels.fp8_product import why_no_fp8

    reason = why_no_fp8(device)
    if reason is not None:
        raise HardwareError(
            got=f"load_in_fp8=True was given, and {reason}.",
            need="FP8 matrix products need a GPU of compute capability 8.9 or newer (RTX 40, L4, H100, H200, B200, …).",
            fix="Use load_in_8bit=True for the same size of weights, or load_in_16bit=True.",
        )


def check_dequantized(keep: bool, precision: Precision, kernels: str) -> None:
    """Refuse ``keep_dequantized`` where nothing is dequantised by us.

    Raises:
        ConfigError: weights that are not in 4 bits, or ``kernels="off"``.
    """
    if keep and precision.storage != "4bit":
        raise ConfigError(
            got=f"keep_dequantized=True was given for weights in {precision.storage} ({precision.dtype}).",
            need="It keeps 4-bit weights in 16 bits, too, where memory is free.",
            fix="Load with load_in_4bit=True, or drop keep_dequantized.",
        )
    if keep and kernels == "off":
        raise ConfigError(
            got='keep_dequantized=True and kernels="off" were given together.',
            need="Fused layers keep their weights; the plain transformers model dequantises them in every pass.",
            fix='Drop kernels="off", or drop keep_dequantized.',
        )


def _at_most_16bit(picked: torch.dtype, asked: str | torch.dtype | None) -> torch.dtype:
    """The 16-bit dtype for ``load_in_16bit=True``; bfloat16 where the hardware's own choice is float32."""
    import torch

    if picked.itemsize == 2:
        return picked
    if asked is not None:
        raise ConfigError(
            got=f"load_in_16bit=True and dtype={asked!r} were given together.",
            need="16-bit weights are bfloat16 or float16.",
            fix="Drop load_in_16bit (use load_in_4bit=False for float32 weights), or give dtype='bfloat16'.",
        )
    return torch.bfloat16


def _stored_precision(
    flags: PrecisionFlags,
    chosen: list[str],
    dtype: str | torch.dtype | None,
    device: torch.device,
    stored: dict[str, Any],
) -> Precision:
    """The precision of a checkpoint that was saved quantised; only flags that agree with it are accepted."""
    from pantheraml.devices.inventory import pick_dtype

    is_4bit = stored.get("load_in_4bit") or stored.get("_load_in_4bit")
    is_8bit = stored.get("load_in_8bit") or stored.get("_load_in_8bit")
    if not (is_4bit or is_8bit):
        raise ConfigError(
            got=f"The checkpoint is stored quantised by {stored.get('quant_method', 'an unnamed method')}.",
            need="Of quantised checkpoints, those of bitsandbytes are read; adapters of others are not trained here.",
            fix="Take the 16-bit version of this model; load_in_4bit=True quantises it while it is loaded.",
        )
    flag = "load_in_4bit" if is_4bit else "load_in_8bit"
    unwanted = [f"{name}=True" for name in chosen if name != flag]
    unwanted += ["full_finetuning=True"] if flags.full_finetuning else []
    unwanted += ["load_in_4bit=False"] if is_4bit and flags.load_in_4bit is False else []
    if unwanted:
        raise ConfigError(
            got=f"{unwanted[0]} was given for a checkpoint that is stored in {'4' if is_4bit else '8'}-bit.",
            need="Weights that were quantised keep their format.",
            fix=f"Drop {unwanted[0]} to load it as it is stored, or take the 16-bit version of this model.",
        )
    return Precision("4bit" if is_4bit else "8bit", pick_dtype(dtype, device))
