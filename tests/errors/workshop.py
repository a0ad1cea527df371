"""Bad inputs for the golden error texts: each case makes one for real and hands it to the public API."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from tests import tiny
from tests.small_disk import small_disk

GOLDEN = Path(__file__).parent / "golden"

Case = Callable[["Workshop"], object]
CASES: dict[str, Case] = {}


class CannotHappenHere(Exception):
    """The case needs rights or a lack of hardware that this machine does not offer."""


def case(function: Case) -> Case:
    """Register ``function``: called with a workshop, it must raise one of our errors."""
    assert function.__name__ not in CASES, f"two cases are called {function.__name__}"
    CASES[function.__name__] = function
    return function


class Workshop:
    """A folder with good checkpoints to spoil copies of; everything in it goes with ``close``."""

    def __init__(self) -> None:
        # Not below a folder that only its owner may enter: one case writes as another user.
        self.root = Path(tempfile.mkdtemp(prefix="golden-")).resolve()
        self.root.chmod(0o755)

    def close(self) -> None:
        shutil.rmtree(self.root)

    @cached_property
    def llama(self) -> Path:
        """A tiny Llama checkpoint; read-only."""
        return tiny.save_checkpoint(self.root / "llama")

    @cached_property
    def tokenizer(self) -> Any:
        return tiny.build_tokenizer()

    def folder(self, name: str) -> Path:
        """A new empty folder."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def copy(self, name: str, source: Path | None = None) -> Path:
        """A copy of the tiny Llama (or of ``source``) that may be spoilt."""
        folder = self.folder(name)
        return Path(shutil.copytree(source or self.llama, folder, dirs_exist_ok=True))

    def file(self, name: str, text: str) -> Path:
        path = self.root / name
        path.write_text(text, encoding="utf-8")
        return path

    def load(self, name: str | Path | None = None, **flags: Any) -> Any:
        """The model of ``name`` (the tiny Llama) in float32 on the CPU, unless ``flags`` say otherwise."""
        from pantheraml import FastLanguageModel

        flags = {"max_seq_length": 64, "load_in_4bit": False, "device_map": "cpu", **flags}
        return FastLanguageModel.from_pretrained(str(name or self.llama), **flags)[0]

    def adapted(self, **settings: Any) -> Any:
        from pantheraml import FastLanguageModel

        return FastLanguageModel.get_peft_model(self.load(), **{"r": 2, **settings})

    def trainer(self, rows: Any, model: Any = None, **settings: Any) -> Any:
        """A trainer of ``model`` (a freshly adapted one) on ``rows``: a list, or a data set."""
        from datasets import Dataset

        from pantheraml import PantheraMLTrainer, PantheraMLTrainingArguments

        args = PantheraMLTrainingArguments(
            output_dir=str(self.root / "run"), report_to="none", disable_tqdm=True, use_cpu=True,
            **settings.pop("arguments", {}),
        )  # fmt: skip
        data = Dataset.from_list(rows) if isinstance(rows, list) else rows
        given = {"tokenizer": self.tokenizer, "args": args, "train_dataset": data, **settings}
        return PantheraMLTrainer(self.adapted() if model is None else model, **given)


def error_of(name: str, shop: Workshop) -> Exception:
    """The error that the case ``name`` raises; anything but one of ours goes through."""
    from pantheraml.errors import PantheraMLError

    try:
        CASES[name](shop)
    except PantheraMLError as error:
        return error
    raise AssertionError(f"{name} raised nothing")


def golden_text(error: Exception, shop: Workshop) -> str:
    """What the user reads, with everything replaced that another machine or version says otherwise."""
    import transformers

    text = f"{type(error).__name__}: {error}\n"
    for place, word in ((shop.root, "<tmp>"), (Path.cwd(), "<cwd>")):
        text = text.replace(str(place), word)
    text = text.replace(f"transformers {transformers.__version__}", "transformers <version>")
    text = re.sub(r"[\d.,]*\d (bytes|kB|MB|GB)\b", "<size>", text)
    return re.sub(r"\buser \d+", "user <id>", text)


def load_cases() -> None:
    """Import the modules that register cases."""
    from tests.errors import (
        cases_adapters,
        cases_checkpoints,
        cases_data,
        cases_loading,
        cases_placement,
        cases_saving,
        cases_training,
    )

    assert all(
        (
            cases_adapters,
            cases_checkpoints,
            cases_data,
            cases_loading,
            cases_placement,
            cases_saving,
            cases_training,
        )
    )


def disk_of(shop: Workshop, size: str) -> AbstractContextManager[Path]:
    """A real file system of ``size``."""
    return small_disk(shop.folder("disk"), size, otherwise=_cannot_happen)


def _cannot_happen(why: str) -> None:
    raise CannotHappenHere(why)


def offline() -> None:
    """What tests/conftest.py sets, for a process that pytest did not start."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
