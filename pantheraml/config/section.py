"""What every section of a run's settings is made of: strict keys, and number types that refuse ``true``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _refuse_bool(value: object) -> object:
    # bool is an int in Python: without this, ``r: true`` would quietly mean a rank of 1.
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


_NotBool = BeforeValidator(_refuse_bool)

Whole = Annotated[int, _NotBool]
Count = Annotated[int, Field(ge=1), _NotBool]
CountOrZero = Annotated[int, Field(ge=0), _NotBool]
PositiveNumber = Annotated[float, Field(gt=0), _NotBool]
NumberOrZero = Annotated[float, Field(ge=0), _NotBool]
Share = Annotated[float, Field(ge=0, lt=1), _NotBool]
OpenShare = Annotated[float, Field(gt=0, lt=1), _NotBool]


class Section(BaseModel):
    """Base of all sections: an unknown key is an error, and so are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


def unset(description: str) -> Any:
    """A setting that is left to the library below when it is not given."""
    return Field(default=None, description=description)
