"""Numbers in environment variables, read with an error that names the variable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pantheraml.errors import ConfigError


def whole_number(variables: Mapping[str, str], name: str) -> int:
    """The value of a variable that holds a whole number of 0 or more.

    Raises:
        ConfigError: it holds anything else.
    """
    text = variables[name].strip()
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            got=f"The environment variable {name} is {variables[name]!r}.",
            need="It is a whole number of 0 or more.",
            fix=f"Remove it (unset {name}), or let torchrun, accelerate launch or srun set it.",
        )
    return int(text)


def missing(variables: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are not set, or set to nothing."""
    return [name for name in names if not variables.get(name, "").strip()]
