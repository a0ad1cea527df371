"""The settings of a run: a YAML file, and words like ``train_steps=100``. It loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from pantheraml.config.section import Count, CountOrZero, PositiveNumber, Section
from pantheraml.config.source import parse_value, read_yaml
from pantheraml.errors import ConfigError, did_you_mean


class Settings(Section):
    """What a run is made of; the defaults are those of ``config/darkroom.yaml``."""

    # How it is computed.
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_accumulation_steps: Count = Field(1, description="micro-batches of each rank in a step")
    train_batch_size: Count = Field(32, description="histories of a micro-batch on each rank")
    test_batch_size: Count = Field(2048, description="rooms that each rank enters at once to evaluate")
    num_workers: CountOrZero = Field(0, description="processes that read histories, on each rank")
    # The room, and those who learn it.
    grid_size: Count = Field(9, description="cells along a wall")
    episode_length: Count = 20
    unseen_goals: Count = Field(16, description="cells that are no goal in training")
    learners_per_goal: Count = 100
    learner_episodes: Count = Field(200, description="episodes of a learner's life")
    # The model.
    tf_n_embd: Count = Field(64, description="width of the tokens")
    tf_n_layer: Count = 2
    tf_n_head: Count = 4
    n_transit: Count = Field(240, description="steps of a history, over all its episodes")
    # The training.
    train_steps: Count = 1000
    learning_rate: PositiveNumber = 3e-3
    warmup_steps: CountOrZero = 50
    seed: CountOrZero = 0
    log_every: Count = 20
    eval_every: CountOrZero = Field(250, description="0: at the end alone")
    save_every: CountOrZero = Field(250, description="0: at the end alone")
    rooms_per_unseen_goal: Count = Field(
        8, description="how often each unseen goal is looked for in an evaluation"
    )

    @property
    def context_episodes(self) -> int:
        """Episodes of a history."""
        return self.n_transit // self.episode_length

    def what_decides(self) -> dict[str, Any]:
        """The settings that a run which goes on must share with the one before."""
        how = {
            "mixed_precision",
            "gradient_accumulation_steps",
            "train_batch_size",
            "test_batch_size",
            "num_workers",
        }
        when = {"log_every", "eval_every", "save_every", "rooms_per_unseen_goal"}
        return self.model_dump(exclude=how | when)


def load_settings(file: Path, words: Iterable[str] = ()) -> Settings:
    """Read ``file``, let ``words`` (``key=value``, values in YAML) replace some of it, and check the outcome.

    Raises:
        ConfigError: with everything that is wrong, and where it stands.
    """
    source = read_yaml(file)
    problems = [f"{problem.place.label}: {problem.text}" for problem in source.problems]
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            problems.append(f"{word}: settings are written key=value, such as train_steps=100.")
            continue
        source.places.pop((key,), None)
        try:
            source.data[key] = parse_value(text)
        except ValueError as error:
            problems.append(f"override {key}: {error}")
    try:
        settings = Settings.model_validate(source.data)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            name = str(one["loc"][0])
            place = source.places.get((name,))
            label = place.label if place else f"override {name}"
            problems.append(f"{label}: {_in_words(name, one['type'], one['msg'])}")
    else:
        problems += _misfits(settings)
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  ".join([f"{len(problems)} settings are wrong:", *problems]))
    return settings


def _in_words(name: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        known = list(Settings.model_fields)
        return f"there is no setting {name}. {did_you_mean(name, known) or f'There are {known}.'}"
    return f"{name}: {message}."


def _misfits(settings: Settings) -> list[str]:
    """Settings that are right one by one and wrong together."""
    found: list[str] = []
    if settings.n_transit % settings.episode_length or settings.n_transit == 0:
        found.append(
            f"n_transit={settings.n_transit} is no whole number of episodes of {settings.episode_length} steps: write "
            f"n_transit={max(1, settings.context_episodes) * settings.episode_length}."
        )
    if settings.context_episodes > settings.learner_episodes:
        found.append(
            f"a history of {settings.context_episodes} episodes is taken from {settings.learner_episodes}: write a "
            f"learner_episodes of {settings.context_episodes} or more."
        )
    if settings.tf_n_embd % settings.tf_n_head:
        found.append(f"tf_n_embd={settings.tf_n_embd} is not shared evenly by {settings.tf_n_head} heads.")
    if settings.unseen_goals >= settings.grid_size**2:
        found.append(
            f"unseen_goals={settings.unseen_goals} leaves none of {settings.grid_size**2} cells to train with."
        )
    return found
