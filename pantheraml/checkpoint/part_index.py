"""The index of a part, which torch.distributed.checkpoint writes as a pickle, read without running what it may say."""

from __future__ import annotations

import pathlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata

_OWN = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")


class PartReader(FileSystemReader):
    """torch's, whose index may name nothing but what such an index is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            OSError: it cannot be read.
            pickle.UnpicklingError: it is damaged, or names something else.
        """
        with (pathlib.Path(self.path) / ".metadata").open("rb") as stream:
            try:
                return _Index(stream).load()
            except (EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
                raise pickle.UnpicklingError("the index is damaged") from error


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a pickle asks for; dots would lead through a module to what that has imported."""
        if module.startswith("pathlib") and name.endswith("Path"):  # the module is another one in Python 3.13
            return pathlib.PurePosixPath
        found = super().find_class(module, name) if module in ("torch", *_OWN) and "." not in name else None
        if isinstance(found, torch.dtype) or found is torch.Size:
            return found
        if isinstance(found, type) and found.__module__ == module and module in _OWN:
            return found
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}")
