"""Whatever a run file says, the answer is a RunConfig or a ConfigError."""

from __future__ import annotations

import random
import re
import string

from pantheraml.config.load import dump_config, load_config, parse_config
from pantheraml.config.run import RunConfig
from pantheraml.config.source import dump_yaml, parse_value
from pantheraml.config.trainer import TrainerSettings
from pantheraml.errors import ConfigError

GOOD = """\
model: {model_name: m, max_seq_length: 64, load_in_16bit: true, dtype: bf16}
lora: {r: 8, target_modules: [q_proj, v_proj], lora_dropout: 0.1}
data: {path: rows.jsonl, validation_fraction: 0.1}
trainer:
  learning_rate: 2e-4
  eval_strategy: steps
  eval_steps: 5
  lr_scheduler_kwargs: {num_cycles: 2}
  extra: {ddp_timeout: 60}
save: {formats: [adapter], folder: out}
devices: [0]
multi_gpu: {num_processes: 1, timeout_minutes: 5, max_memory: {0: 10GB}}
train_on_responses: {instruction_part: U, response_part: A}
seed: 1
"""
VALUES = [
    None, True, False, 0, -1, 3, 10**30, 0.5, 1e300, float("nan"), float("inf"), "", "yes", "text", "1e5",
    "no", "null", "a: b", "\n", "é", "\u2028", [], [1], ["a", None], {}, {"a": 1}, {"": {}}, [[[]]],
    {"r": {"r": []}},
]  # fmt: skip
KEYS = [
    "model", "multi_gpu", "lora", "trainer", "peft_config", "r", "lr", "seed", "extra", "model_name", "a.b", "", "zz",
]  # fmt: skip
SEED = 20


def outcome(read) -> RunConfig | ConfigError:
    try:
        return read()
    except ConfigError as error:
        first, *problems = str(error).split("\n")
        said = re.search(r" has (\d+) problems:$", first)
        assert len(problems) == (int(said[1]) if said else 0), error
        assert all(line.endswith((".", "?")) and len(line) > 15 for line in problems or [first]), error
        return error


def mutate(value, rng: random.Random):
    """A copy of ``value`` with something replaced, removed or added somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.15:
            return {name: item for name, item in value.items() if name != key}
        if action < 0.3:
            return {**value, rng.choice(KEYS): rng.choice(VALUES)}
        if action < 0.4:
            return {(rng.choice(KEYS) if name == key else name): item for name, item in value.items()}
        return {**value, key: mutate(value[key], rng)}
    return rng.choice(VALUES)


def test_mutated_run_files(tmp_path):
    rng = random.Random(SEED)
    good = parse_value(GOOD)
    path = tmp_path / "run.yaml"
    results = []
    for _ in range(220):
        data = good
        for _ in range(rng.randint(1, 4)):
            data = mutate(data, rng)
        by_memory = outcome(lambda data=data: parse_config(data)) if isinstance(data, dict) else None
        path.write_text(dump_yaml(data))
        by_file = outcome(lambda: load_config(path))
        results.append(by_file)
        if isinstance(by_file, RunConfig):
            assert by_memory == by_file
            assert parse_config(parse_value(dump_config(by_file))) == by_file
    assert sum(isinstance(result, RunConfig) for result in results) > 10
    assert sum(isinstance(result, ConfigError) for result in results) > 40


def test_garbage_in_the_text(tmp_path):
    rng = random.Random(SEED)
    path = tmp_path / "run.yaml"
    alphabet = string.printable + "\x00\xff€{}[]:&*!|>-?\t\n\n  "
    results = []
    for case in range(80):
        text = list(GOOD) if case % 2 else []
        for _ in range(rng.randint(1, 6) if text else rng.randint(1, 60)):
            text.insert(rng.randint(0, len(text)), rng.choice(alphabet))
        path.write_bytes("".join(text).encode(rng.choice(["utf-8", "utf-16"]) if case % 5 == 0 else "utf-8"))
        results.append(outcome(lambda: load_config(path)))
    assert sum(isinstance(result, ConfigError) for result in results) > 40


def test_garbage_in_overrides(tmp_path):
    rng = random.Random(SEED)
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    names = [
        *TrainerSettings.model_fields,
        "lora.r",
        "model",
        "devices.0",
        "",
        ".",
        "data.path.x",
        "peft_config",
    ]
    results = []
    for _ in range(60):
        name = rng.choice(names)
        text = rng.choice(
            ["{", "[1", "&a *a", "*b", "!!set {a}", "'", "a: b: c", "0o9", "\t", "{a: {b: [}]}", "3", "~"]
        )
        override = f"trainer.{name}={text}" if name in TrainerSettings.model_fields else f"{name}={text}"
        results.append(outcome(lambda override=override: load_config(path, [override])))
    assert sum(isinstance(result, ConfigError) for result in results) > 30
    assert sum(isinstance(result, RunConfig) for result in results) > 2
