"""Run files: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import dataclasses

import pytest

from pantheraml.config.load import dump_config, json_schema, load_config, parse_config
from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.config.multi_gpu_section import MultiGPUSettings
from pantheraml.errors import ConfigError

GUIDE = """\
devices: [0]  # GPU IDs to use
train_on_responses: true
trainer_config:
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 1
  max_steps: 3
  learning_rate: 2e-4
  output_dir: ./debug_output
pretrained_model_config:
  model_name: unsloth/Llama-3.2-1B-Instruct
  max_seq_length: 512
dataset_config:
  use_debug_dataset: true  # Use built-in debug dataset
"""
SMALL = "model: {model_name: m}\ndata: {path: rows.jsonl}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """``write(text)`` -> the name of a run file with that text in the current folder."""
    monkeypatch.chdir(tmp_path)

    def put(text: str | bytes) -> str:
        (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "run.yaml"

    return put


def refusal(path: str, *overrides: str) -> list[str]:
    """The lines of the error for a run file; the heading of a list is left out."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    lines = str(caught.value).split("\n  ")
    if len(lines) > 1:
        assert lines[0] == f"{path} has {len(lines) - 1} problems:"
    return lines[1:] or lines


@pytest.mark.promise("D3")
def test_the_older_names_of_sections_are_read(write):
    config = load_config(write(GUIDE))
    assert config.device == "cuda:0"
    assert config.train_on_responses is True
    assert config.trainer.given() == {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 2e-4,
        "output_dir": "./debug_output",
        "seed": 3407,
    }
    assert (config.model.model_name, config.model.max_seq_length) == ("unsloth/Llama-3.2-1B-Instruct", 512)
    assert config.data.use_debug_dataset is True
    assert config.lora is not None
    assert config.lora.r == 16
    assert config.save.formats == ["adapter"]


def test_both_names_of_a_section_are_an_error(write):
    lines = refusal(write(SMALL + "dataset_config: {path: other}\n"))
    assert lines == [
        "run.yaml:2 and run.yaml:3: data and dataset_config are two names of one section. Keep one of them."
    ]


def test_full_finetuning_has_no_adapter_and_saves_the_model(write):
    config = load_config(write(SMALL), ["model.full_finetuning=true"])
    assert config.lora is None
    assert config.save.formats == ["model"]


def test_one_seed_reaches_every_part(write):
    config = load_config(write(SMALL), ["seed=11", "lora.random_state=5"])
    assert (config.model.random_state, config.lora.random_state, config.trainer.seed) == (11, 5, 11)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("1e-4", "learning_rate", 1e-4),
        ("2E-5", "learning_rate", 2e-5),
        ("1", "learning_rate", 1.0),
        (".5", "learning_rate", 0.5),
        ("null", "learning_rate", None),
        ("~", "learning_rate", None),
        ("", "learning_rate", None),
        ("0x10", "max_steps", 16),
        ("010", "max_steps", 10),
        ("no", "eval_strategy", "no"),
        ("off", "packing", False),
        ("yes", "packing", True),
        ("2026-01-02", "run_name", "2026-01-02"),
        ("'5'", "run_name", "5"),
        ("1:30", "run_name", "1:30"),
        ("[a, b]", "report_to", ["a", "b"]),
        ("true", "resume_from_checkpoint", True),
        ("out/checkpoint-3", "resume_from_checkpoint", "out/checkpoint-3"),
        ("{num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
    ],
)
def test_values_mean_what_they_say(write, text, name, value):
    by_override = load_config(write(SMALL), [f"trainer.{name}={text}"])
    by_file = load_config(write(f"{SMALL}trainer:\n  {name}: {text}\n"))
    for config in (by_override, by_file):
        read = getattr(config.trainer, name)
        assert read == value
        assert type(read) is type(value)


def test_an_override_can_open_a_section_or_replace_one(write):
    config = load_config(write(SMALL), ["lora={r: 4, lora_alpha: 8}", "lora.r=2", "peft_config.bias=all"])
    assert (config.lora.r, config.lora.lora_alpha, config.lora.bias) == (2, 8, "all")


@pytest.mark.parametrize(("short", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_short_dtype_names(write, short, name):
    assert load_config(write(SMALL), [f"model.dtype={short}"]).model.dtype == name
    assert load_config(write(SMALL), [f"model.dtype={name}"]).model.dtype == name


@pytest.mark.parametrize(
    ("devices", "device"),
    [
        ("0", "cuda:0"),
        ("cuda", "cuda:0"),
        ("[2]", "cuda:2"),
        ("cuda:1", "cuda:1"),
        ("cpu", "cpu"),
        ("null", None),
    ],
)
def test_one_device(write, devices, device):
    assert load_config(write(SMALL), [f"devices={devices}"]).device == device


@pytest.mark.parametrize("written", ["[0, 1, 2]", "[cuda, 1, 'cuda:2']"])
def test_several_devices_are_ranks(write, written):
    config = load_config(write(SMALL), [f"devices={written}", "multi_gpu.timeout_minutes=5"])
    assert config.device is None
    assert config.multi_gpu.to_config() == MultiGPUConfig(
        num_processes=3, timeout_minutes=5, auto_device_map=False
    )
    assert load_config(write(SMALL), ["devices=[3]"]).multi_gpu is None


@pytest.mark.parametrize(
    ("written", "config"),
    [
        ("true", MultiGPUConfig()),
        ("{}", MultiGPUConfig()),
        ("{strategy: ddp, max_memory: {0: 10GB}}", MultiGPUConfig(strategy="ddp", max_memory={"0": "10GB"})),
        ("null", None),
    ],
)
def test_the_section_of_several_gpus(write, written, config):
    section = load_config(write(SMALL), [f"multi_gpu={written}"]).multi_gpu
    assert (section and section.to_config()) == config
    assert config is None or load_config(write(f"{SMALL}multi_gpu: {written}\n")).multi_gpu == section


def test_the_section_has_every_field_of_the_dataclass():
    fields = {field.name: field.default for field in dataclasses.fields(MultiGPUConfig)}
    assert {name: field.default for name, field in MultiGPUSettings.model_fields.items()} == fields


@pytest.mark.promise("D3")
def test_every_problem_is_listed_with_its_place(write):
    path = write("""\
devices: [0, 2]
trainer_config:
  lr: 1e-4
  learning_rte: 2e-4
  max_seq_length: 5
  per_device_train_batch_size: 0
  fp16: true
  bf16: true
lora:
  r: 8
  r: 9
model:
  load_in_4bit: true
  load_in_8bit: true
learning_rate: 3
flavour: 1
multi_gpu:
  backend: ncll
  num_processes: 0
  cpu_offload: optimizer
  gpus: 2
""")
    assert refusal(path, "trainer.max_steps=ten", "trainer.packing", "seed.a=1") == [
        "run.yaml: No training rows are named. Give one of data.path (a Hub id, a folder or a file), "
        "data.use_debug_dataset: true and data.loader (package.module:function).",
        "run.yaml:1: devices names cuda:0, cuda:2. Several devices are GPUs, counted from 0 on. "
        "Type CUDA_VISIBLE_DEVICES=0,2 pantheraml train ... with multi_gpu: true and without devices.",
        "run.yaml:3: there is no setting trainer.lr. Write trainer.learning_rate.",
        "run.yaml:4: there is no setting trainer.learning_rte. Did you mean 'learning_rate'?",
        "run.yaml:5: there is no setting trainer.max_seq_length. "
        "It belongs elsewhere: write model.max_seq_length.",
        "run.yaml:6: trainer.per_device_train_batch_size is 0; "
        "it takes a whole number of at least 1 or null.",
        "run.yaml:7 and run.yaml:8: trainer.fp16 and trainer.bf16 are both true; mixed precision has one "
        "dtype. Keep one, or none: the hardware then decides.",
        "run.yaml:11: lora.r is given twice (first at run.yaml:10). Keep one of them.",
        "run.yaml:12: model.model_name is missing; it takes text.",
        "run.yaml:13 and run.yaml:14: model.load_in_4bit and model.load_in_8bit are true together; "
        "weights have one precision. Keep one.",
        "run.yaml:15: there is no setting learning_rate. It belongs elsewhere: write trainer.learning_rate.",
        "run.yaml:16: there is no setting flavour. `pantheraml schema` prints all settings.",
        'run.yaml:18: multi_gpu.backend is "ncll"; it takes "nccl", "gloo", "mpi".',
        "run.yaml:19: multi_gpu.num_processes is 0; it takes a whole number of at least 1 or null.",
        "run.yaml:20: MultiGPUConfig(strategy='auto', cpu_offload='optimizer') was given. cpu_offload is a setting "
        "of strategy='fsdp' and strategy='deepspeed'. Write strategy='deepspeed', or leave cpu_offload out.",
        "run.yaml:21: there is no setting multi_gpu.gpus. `pantheraml schema` prints all settings.",
        "override trainer.packing: it is written key=value, such as trainer.learning_rate=1e-4.",
        'override trainer.max_steps: trainer.max_steps is "ten"; it takes a whole number or null.',
        'override seed.a: seed is {"a": 1}; it takes a whole number of at least 0.',
    ]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lora.r=0", "lora.r is 0; it takes a whole number of at least 1."),
        ("lora.r=true", "lora.r is true; it takes a whole number of at least 1."),
        ("lora.r=1.5", "lora.r is 1.5; it takes a whole number of at least 1."),
        ("lora.lora_dropout=1", "lora.lora_dropout is 1; it takes a number of at least 0 below 1."),
        ("lora.bias=some", 'lora.bias is "some"; it takes "none", "all", "lora_only".'),
        ("model.max_seq_length=0", "model.max_seq_length is 0; it takes a whole number of at least 1."),
        ("model.kernels=on", 'model.kernels is "on"; it takes "auto", "off".'),
        ("model.revision=5", "model.revision is 5; it takes text or null."),
        ("model.token=[hf_secret]", "model.token is not text; it takes text or null."),
        ("trainer.learning_rate=.nan", "trainer.learning_rate is NaN; it takes a number above 0 or null."),
        ("trainer=5", "trainer is 5; it takes a mapping of settings."),
        ("devices=gpu1", 'devices is "gpu1"; it takes a list (each item a whole number of at least 0 or '
         "text such as cpu, cuda:0) or a whole number of at least 0 or text such as cpu, cuda:0 or null."),
        ("data.loader=rows", 'data.loader is "rows"; it takes text such as package.module:function or null.'),
        ("train_on_responses={instruction_part: a}", "train_on_responses.response_part is missing; it takes"),
        ("train_on_responses={user: a}", "there is no setting train_on_responses.user."),
        ("trainer.max_stepz=1", "no setting trainer.max_stepz. Did you mean 'max_steps'?"),
        ("lora.learning_ratee=1", "no setting lora.learning_ratee. Did you mean 'trainer.learning_rate'?"),
        ("lora.seed=1", "there is no setting lora.seed. It belongs elsewhere: write seed or trainer.seed."),
        ("trainer.optim=[", "expected the node content"),
        ("=1", "it is written key=value"),
        ("trainer..optim=1", "it is written key=value"),
        ("multi_gpu=5", "multi_gpu is 5; it takes a mapping of settings or true or null."),
        ("multi_gpu.gpus=2", "there is no setting multi_gpu.gpus."),
        ("num_gpus=2", "there is no setting num_gpus. Write multi_gpu.num_processes."),
        ("model.max_memory=5", "model.max_memory is 5; it takes a mapping or null."),
        ("seed.a.b=1", 'seed is {"a": {"b": 1}}; it takes a whole number of at least 0.'),
        ("data.path.x=1", "data.path is not a mapping; give its whole value."),
    ],
)  # fmt: skip
def test_one_wrong_setting(write, override, says):
    lines = refusal(write(SMALL), override)
    assert says in "\n".join(lines)
    assert "hf_secret" not in "\n".join(lines)
    assert any(line.startswith(f"override {override.partition('=')[0] or override}:") for line in lines)


@pytest.mark.parametrize("policy", ["auto", "offload", "unsloth", True, False])
def test_every_way_to_recompute_can_be_written(write, policy):
    config = load_config(write(SMALL), overrides=[f"model.use_gradient_checkpointing={str(policy).lower()}"])
    assert config.model.use_gradient_checkpointing == policy


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.load_in_4bit=true", "model.load_in_16bit=true"], "model.load_in_16bit are true"),
        (["model.full_finetuning=true", "lora.r=8"], "trains all weights, and lora asks"),
        (["model.full_finetuning=true", "model.load_in_8bit=true"], "model.load_in_8bit would quantise"),
        (["model.full_finetuning=true", "model.load_in_fp8=true"], "model.load_in_fp8 would quantise"),
        (["model.load_in_16bit=true", "model.dtype=fp32"], "is true and model.dtype is float32"),
        (["model.keep_dequantized=true", "model.load_in_16bit=true"], "model.load_in_16bit leaves none"),
        (["model.keep_dequantized=true", "model.load_in_4bit=false"], "model.load_in_4bit leaves none"),
        (["model.keep_dequantized=true", "model.kernels=off"], "model.kernels leaves none"),
        (["lora=null"], "nothing would be trained"),
        (["trainer.fp16=true", "trainer.bf16=true"], "trainer.fp16 and trainer.bf16 are both true"),
        (["trainer.max_length=4096"], "longer than model.max_seq_length, which is 2048"),
        (["data.use_debug_dataset=true"], "data.path and data.use_debug_dataset each name"),
        (["data.loader=a:b"], "data.path and data.loader each name"),
        (["data.path=null"], "No training rows are named"),
        (["data.path=null", "data.use_debug_dataset=true", "data.name=x"], "data.name is a configuration"),
        (["trainer.eval_strategy=epoch"], "there are no evaluation rows"),
        (["data.validation_fraction=0.1", "data.eval_path=b"], "data.validation_fraction holds out"),
        (["data.eval_path=b", "trainer.eval_steps=5"], "needs trainer.eval_strategy: steps"),
        (["train_on_responses=true", "trainer.assistant_only_loss=true"], "both decide which tokens"),
        (["train_on_responses=true", "trainer.completion_only_loss=true"], "both decide which tokens"),
        (["trainer.embedding_learning_rate=1e-5"], "neither embed_tokens nor lm_head is trained"),
        (["devices=[0, 2]"], "Type CUDA_VISIBLE_DEVICES=0,2 pantheraml train ... with multi_gpu: true"),
        (["devices=[1, 0]"], "Type CUDA_VISIBLE_DEVICES=1,0 pantheraml train"),
        (["devices=[0, 0]"], "Several devices are GPUs, counted from 0 on. Write [0, 1] for the first two"),
        (["devices=[cpu, cpu]"], "or cpu with multi_gpu.num_processes for ranks on the CPU"),
        (["devices=[0, 1]", "model.device_map=balanced"], "devices and model.device_map both place"),
        (["devices=[0, 1]", "model.auto_device_map=true"], "devices and model.auto_device_map both place"),
        (["devices=[0, 1]", "multi_gpu.num_processes=4"], "names 2 GPUs, and multi_gpu.num_processes is 4"),
        (["devices=[0, 1]", "multi_gpu.strategy=none"], "is none, which is one process"),
        (["devices=[0, 1]", "multi_gpu.auto_device_map=true"], "may split it between all visible GPUs"),
        (["devices=1", "multi_gpu=true"], "devices names cuda:1 alone, and multi_gpu trains on several"),
        (["devices=cpu", "multi_gpu={}"], "Write multi_gpu.num_processes for ranks on the CPU"),
        (["model.device_map=cuda:1", "multi_gpu=true"], "gives each rank a GPU of its own"),
        (["model.device_map={'': 0}", "multi_gpu=true"], "model.device_map places the model on cuda:0"),
        (["model.device_map=sequential", "multi_gpu.num_processes=2"], "splits the model in one process"),
        (["model.device_map={a: 0, b: 1}", "multi_gpu.num_processes=2"], "splits the model in one process"),
        (["model.auto_device_map=true", "model.device_map=balanced"], "both place the model"),
        (["model.max_memory={0: 1GB}", "multi_gpu.max_memory={0: 2GB}"], "multi_gpu.max_memory differ"),
        (
            ["model.use_gradient_checkpointing=true", "multi_gpu.use_gradient_checkpointing=offload"],
            "multi_gpu.use_gradient_checkpointing differ",
        ),
        (["multi_gpu.strategy=ddp", "multi_gpu.tensor_parallel=2"], "the degree of strategy='tensor'"),
        (["devices=[]"], "devices is empty"),
        (["devices=0", "model.device_map=auto"], "both place the model"),
        (["devices=0", "trainer.use_cpu=true"], "trainer.use_cpu asks for the CPU"),
        (["trainer.extra={max_steps: 3}"], "has max_steps. In its place, write trainer.max_steps."),
        (["trainer.extra={gradient_checkpointing: true}"], "write model.use_gradient_checkpointing"),
        (["save.formats=[model]"], "save.formats has model, which is for full fine-tuning"),
        (["model.full_finetuning=true", "save.formats=[adapter]"], "save.formats has adapter, but full"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_together(write, overrides, says):
    lines = refusal(write(SMALL), *overrides)
    assert len(lines) == 1
    assert says in lines[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.full_finetuning=true", "model.load_in_16bit=true"],
        ["trainer.max_length=1024"],
        ["trainer.padding_free=true", "trainer.packing=true", "trainer.max_length=64"],
        ["data.eval_split=test", "trainer.eval_strategy=steps", "trainer.eval_steps=5"],
        ["data.path=null", "data.loader=rows:load", "trainer.eval_strategy=epoch"],
        ["trainer.embedding_learning_rate=1e-5", "lora.modules_to_save=[lm_head]"],
        ["trainer.embedding_learning_rate=1e-5", "lora.target_modules=[q_proj, embed_tokens]"],
        ["trainer.embedding_learning_rate=1e-5", "model.full_finetuning=true"],
        ["train_on_responses={instruction_part: 'U:', response_part: 'A:'}"],
        ["trainer.extra={ddp_timeout: 60}"],
        ["save.formats=[]"],
        ["save.formats=[adapter, merged_16bit]"],
        ["devices=cpu", "trainer.use_cpu=true"],
        ["devices=cpu", "multi_gpu.num_processes=2"],
        ["devices=1", "multi_gpu.num_processes=1"],
        ["devices=1", "multi_gpu.strategy=none"],
        ["devices=[0, 1]", "multi_gpu={num_processes: 2, auto_device_map: false}"],
        ["model.device_map=balanced", "multi_gpu=true"],
        ["model.device_map=auto", "model.auto_device_map=true", "multi_gpu.num_processes=2"],
        ["model.max_memory={0: 1GB}", "multi_gpu.max_memory={0: 1GB}"],
    ],
)
def test_settings_that_do_fit_together(write, overrides):
    config = load_config(write(SMALL), overrides)
    assert config.model.model_name == "m"


def test_a_wrong_setting_does_not_bring_false_problems(write):
    lines = refusal(write(SMALL), "data.path=5", "model.full_finetuning=maybe", "lora=null")
    assert [line.split(":")[0] for line in lines] == ["override model.full_finetuning", "override data.path"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "The run file run.yaml is empty."),
        ("# only a comment\n", "The run file run.yaml is empty."),
        ("- a\n- b\n", "run.yaml:1: the run file is not a mapping."),
        ("hello", "run.yaml:1: the run file is not a mapping."),
        ("model:\n\tmodel_name: x\n", "run.yaml:2, column 1: this is not YAML: a tab is used"),
        ("model: {a: 1\ndata: 2\n", "run.yaml:2, column 5: this is not YAML: while parsing a flow mapping"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2, column 1: this is not YAML: expected a single document"),
        ("model: *x\n", "run.yaml:1, column 8: this is not YAML: found undefined alias"),
        ("a: \x07\n", "run.yaml:1: this is not YAML: character #x0007 is not allowed."),
        (b"model: \xff\xfe", "run.yaml is not a text in UTF-8 (byte 7)"),
        ("a: " + "[" * 5000, "this is not YAML: it is nested too deeply."),
    ],
)  # fmt: skip
def test_text_that_is_not_a_run_file(write, text, says):
    lines = refusal(write(text))
    assert len(lines) == 1
    assert says in lines[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("? [a]\n: 1\n", "run.yaml:3: A setting's name must be a word"),
        ("seed: !!python/object:os.system x\n", "run.yaml:3: The tag !!python/object:os.system does not"),
        ("seed: !!int x\n", "run.yaml:3: The tag !!int does not fit 'x'."),
        ("lora: &a {r: *a}\n", "run.yaml:3: The text is nested too deeply"),
        ("seed: " + "9" * 5000 + "\n", "run.yaml:3: seed is \"9999"),
        ("<<: {r: 1}\n", "run.yaml:3: there is no setting <<."),
    ],
)  # fmt: skip
def test_yaml_beyond_plain_settings(write, text, says):
    assert any(says in line for line in refusal(write(SMALL + text)))


def test_aliases_share_values_without_making_them_endless(write):
    config = load_config(write(SMALL + "lora: {target_modules: &names [q_proj], modules_to_save: *names}\n"))
    assert config.lora.modules_to_save == ["q_proj"]
    bomb = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 9))
    assert any("too large" in line for line in refusal(write(f"{SMALL}x0: &x0 [a]\n{bomb}")))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no run file .*nothing"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("a\0b")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.full_finetuning=true", "save.formats=[merged_16bit]"],
        ["devices=[0, 1]", "model.max_memory={0: 10GB, 1: 500}"],
    ],
)
def test_what_is_written_is_read_back(write, overrides):
    tricky = [
        "trainer.run_name='1e5'",
        "trainer.hub_model_id='no'",
        "trainer.optim='0o7'",
        "model.token=hf_secret",
    ]
    extra = ["trainer.extra={hub_token: hf_secret, ddp_timeout: 60}", "trainer.warmup_steps=3e-5"]
    config = load_config(write(SMALL), [*tricky, *extra, *overrides])
    text = dump_config(config)
    again = load_config(write(text))
    assert "hf_secret" not in text
    assert "hf_secret" not in repr(config.model)
    assert config.model.token == "hf_secret"
    config.model.token = None
    del config.trainer.extra["hub_token"]
    assert again == config
    assert dump_config(again) == text


def test_settings_from_memory_are_checked_alike():
    config = parse_config(
        {"pretrained_model_config": {"model_name": "m"}, "data": {"path": "p"}}, ["lora.r=4"]
    )
    assert config.lora.r == 4
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": None, 5: 1, "data": {"path": "p", 6: 2}})
    assert str(caught.value).split("\n  ") == [
        "settings has 3 problems:",
        "settings: model.model_name is missing; it takes text.",
        "settings: there is no setting data.6. `pantheraml schema` prints all settings.",
        "settings: there is no setting 5. `pantheraml schema` prints all settings.",
    ]


def test_the_schema_describes_every_section():
    schema = json_schema()
    assert schema["required"] == ["model"]
    assert set(schema["properties"]) == {
        "model", "lora", "data", "trainer", "save", "devices", "multi_gpu", "train_on_responses", "seed",
    }  # fmt: skip
    for name, part in {**schema["$defs"], "run": schema}.items():
        assert part["additionalProperties"] is False, name
        undescribed = [key for key, setting in part["properties"].items() if not setting.get("description")]
        assert not undescribed, name
