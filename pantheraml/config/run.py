"""The settings of one training run, as they stand in a YAML file.

``RunConfig`` is the one schema: the command line, the YAML file and Python code all end here. Read a file
with :func:`pantheraml.config.load.load_config`, which reports every problem at once with its line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field, model_validator

from pantheraml.config.conflicts import Conflicts, find_conflicts
from pantheraml.config.devices import device_names, num_ranks
from pantheraml.config.multi_gpu import Recompute
from pantheraml.config.multi_gpu_section import MaxMemory, MultiGPU, MultiGPUSettings
from pantheraml.config.names import SECTION_ALIASES
from pantheraml.config.section import (
    Count,
    CountOrZero,
    OpenShare,
    PositiveNumber,
    Section,
    Share,
)
from pantheraml.config.trainer import TrainerSettings

DEFAULT_SEED = 3407

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

DtypeName = Annotated[
    Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"],
    AfterValidator(lambda name: _DTYPES.get(name, name)),
]
DeviceName = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$", examples=["cpu", "cuda:0"])]
LoaderName = Annotated[
    str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", examples=["package.module:function"])
]
SaveFormat = Literal["adapter", "model", "merged_16bit", "merged_4bit"]


class ModelSettings(Section):
    """Which model to load and how: the arguments of ``FastLanguageModel.from_pretrained``."""

    model_name: str = Field(min_length=1, description="Hub id or folder of the model.")
    max_seq_length: Count = Field(default=2048, description="Longest sequence in tokens.")
    dtype: DtypeName | None = Field(
        default=None, description="Compute dtype; chosen by the hardware when null."
    )
    load_in_4bit: bool | None = Field(
        default=None, description="4-bit weights; null means yes, unless another precision is chosen."
    )
    load_in_8bit: bool = Field(default=False, description="8-bit weights.")
    load_in_fp8: bool = Field(
        default=False, description="FP8 weights and products; needs a GPU of compute capability 8.9 or newer."
    )
    load_in_16bit: bool = Field(default=False, description="16-bit weights, as the checkpoint has them.")
    full_finetuning: bool = Field(default=False, description="Train all weights instead of a LoRA adapter.")
    token: str | None = Field(
        default=None,
        exclude=True,
        repr=False,
        description="Hub token; the HF_TOKEN variable is the safer place.",
    )
    device_map: str | dict[str, CountOrZero | str] | None = Field(
        default=None, description="Placement of the model; use devices instead where one device is meant."
    )
    max_memory: MaxMemory | None = Field(
        default=None, description="Bytes that may be taken of each GPU, such as {0: 20GB, 1: 10GiB}."
    )
    auto_device_map: bool = Field(
        default=False, description="Same as device_map: auto, which splits a model that needs several GPUs."
    )
    rope_scaling: dict[str, Any] | None = Field(
        default=None, description="RoPE parameters that replace the model's."
    )
    fix_tokenizer: bool = Field(default=True, description="Repair known faults, such as a missing pad token.")
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the checkpoint."
    )
    use_gradient_checkpointing: bool | Recompute = Field(
        default="auto", description="Recompute activations in the backward pass to save memory."
    )
    keep_dequantized: bool = Field(
        default=False, description="Hold 4-bit weights in 16 bits, too, where memory is free."
    )
    resize_model_vocab: Count | None = Field(default=None, description="New number of rows of the embedding.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    random_state: CountOrZero | None = Field(
        default=None, description="Seed of new weights; by default the run's."
    )
    kernels: Literal["auto", "off"] = Field(default="auto", description="Fused kernels, or the plain model.")
    attn_implementation: str | None = Field(
        default=None, description="Attention implementation of transformers."
    )
    chat_template: str | None = Field(
        default=None, description="Name of the chat template to put on the tokenizer."
    )


class LoraSettings(Section):
    """The adapter to train: the arguments of ``FastLanguageModel.get_peft_model``."""

    r: Count = Field(default=16, description="Rank.")
    target_modules: list[str] | Literal["all-linear"] | None = Field(
        default=None,
        description="Linear layers that get an adapter; null means those usual in the model's family.",
    )
    lora_alpha: Count | PositiveNumber = Field(
        default=16, description="Scale: the update is multiplied by lora_alpha / r."
    )
    lora_dropout: Share = Field(default=0.0, description="Dropout in front of the adapter.")
    bias: Literal["none", "all", "lora_only"] = Field(default="none", description="Which biases are trained.")
    layers_to_transform: list[CountOrZero] | CountOrZero | None = Field(
        default=None, description="Indices of the decoder layers that get an adapter; null means all."
    )
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(r).")
    use_dora: bool = Field(default=False, description="Weight-decomposed LoRA.")
    modules_to_save: list[str] | None = Field(
        default=None, description="Modules trained in full, such as embed_tokens and lm_head."
    )
    init_lora_weights: bool | str = Field(default=True, description="How adapter weights start; as in PEFT.")
    random_state: CountOrZero | None = Field(
        default=None, description="Seed of the adapter; by default the run's."
    )


class DataSettings(Section):
    """Where the rows come from: one of ``path``, ``use_debug_dataset`` and ``loader``."""

    path: str | None = Field(default=None, min_length=1, description="Hub id, folder or file.")
    use_debug_dataset: bool = Field(default=False, description="Use the small data set inside the package.")
    loader: LoaderName | None = Field(
        default=None,
        description="package.module:function, called with (data settings, tokenizer); "
        "returns a Dataset or a DatasetDict.",
    )
    split: str = Field(default="train", min_length=1, description="Split to train on.")
    name: str | None = Field(default=None, description="Configuration of a Hub data set.")
    eval_path: str | None = Field(default=None, min_length=1, description="As path, for evaluation rows.")
    eval_split: str | None = Field(default=None, min_length=1, description="Split to evaluate on.")
    validation_fraction: OpenShare | None = Field(
        default=None, description="Share of the training rows held out for evaluation."
    )
    text_field: str = Field(
        default="text", min_length=1, description="Column with the text of plain-text rows."
    )
    max_rows: Count | None = Field(default=None, description="Train on the first so many rows.")

    @property
    def has_eval(self) -> bool:
        """Whether the settings name evaluation rows (a loader may still return some)."""
        return any(value is not None for value in (self.eval_path, self.eval_split, self.validation_fraction))


class SaveSettings(Section):
    """What to write when training has ended; each format gets a folder of its own name."""

    formats: list[SaveFormat] | None = Field(
        default=None,
        description="Null means the adapter, or the model after full fine-tuning; [] writes nothing.",
    )
    folder: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of the formats' folders; trainer.output_dir when null.",
    )


class ResponseMarks(Section):
    """The text in front of a user's and of an assistant's turn."""

    instruction_part: str = Field(min_length=1, description="Text that begins a user's turn.")
    response_part: str = Field(min_length=1, description="Text that begins an assistant's turn.")


class RunConfig(Section):
    """All settings of a run.

    Building it checks each setting and how they fit together. ``random_state``, ``trainer.seed``,
    ``lora``, ``data.eval_split``, ``save.formats`` and ``multi_gpu`` are filled in where they follow from other
    settings.

    Raises:
        pydantic.ValidationError: when a setting is wrong. ``parse_config`` and ``load_config`` raise a
            ``ConfigError`` that lists all problems instead.
    """

    model: ModelSettings = Field(description="Which model to load, and how.")
    lora: LoraSettings | None = Field(
        default=None, description="The adapter; its defaults when not given, none with model.full_finetuning."
    )
    data: DataSettings = Field(default_factory=DataSettings, description="Where the rows come from.")
    trainer: TrainerSettings = Field(default_factory=TrainerSettings, description="How to train.")
    save: SaveSettings = Field(default_factory=SaveSettings, description="What to write at the end.")
    devices: list[CountOrZero | DeviceName] | CountOrZero | DeviceName | None = Field(
        default=None,
        description="The device to train on: a GPU's index, cuda:0 or cpu; chosen when null. [0, 1] is two ranks.",
    )
    multi_gpu: MultiGPU = Field(
        default=None, description="How to train on several GPUs; true or {} for all that are visible."
    )
    train_on_responses: bool | ResponseMarks = Field(
        default=False, description="Loss on the assistant's turns alone; the marks are found when true."
    )
    seed: CountOrZero = Field(default=DEFAULT_SEED, description="Seed of everything that is random.")

    @model_validator(mode="before")
    @classmethod
    def _accept_aliases(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        data = cast("dict[str, Any]", given)
        for name, alias in sections_named_twice(data):
            raise ValueError(f"{name} and {alias} are two names of one section; keep one of them.")
        return rename_sections(data)

    @model_validator(mode="after")
    def _check_and_resolve(self) -> RunConfig:
        conflicts = find_conflicts(self)
        if conflicts:
            raise Conflicts(conflicts)
        if self.lora is None and not self.model.full_finetuning:
            self.lora = LoraSettings()
        if self.save.formats is None:
            self.save.formats = ["model" if self.model.full_finetuning else "adapter"]
        if self.trainer.seed is None:
            self.trainer.seed = self.seed
        for section in (self.model, self.lora):
            if section is not None and section.random_state is None:
                section.random_state = self.seed
        if self.data.use_debug_dataset and not self.data.has_eval:
            self.data.eval_split = "validation"  # as a loader's validation rows are, without being asked for
        ranks = num_ranks(self.devices)
        if ranks is not None:
            self.multi_gpu = self.multi_gpu or MultiGPUSettings()
            self.multi_gpu.num_processes = ranks
            self.multi_gpu.auto_device_map = False  # a split would take all visible GPUs
        return self

    @property
    def device(self) -> str | None:
        """The one device to train on (``"cpu"``, ``"cuda:1"``), None when the library chooses, and for several."""
        named = device_names(self.devices)
        return named[0] if len(named) == 1 else None


def rename_sections(data: dict[str, Any]) -> dict[str, Any]:
    """``data`` with today's names of the sections; where two names of one stand, the first is kept."""
    renamed: dict[str, Any] = {}
    for key, value in data.items():
        renamed.setdefault(SECTION_ALIASES.get(key, key), value)
    return renamed


def sections_named_twice(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of names in ``data`` that mean one section, such as ``("lora", "peft_config")``."""
    return [(name, alias) for alias, name in SECTION_ALIASES.items() if name in data and alias in data]
