"""Shared fixtures: tiny checkpoints, made once per test process."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

# Tests never touch the network; set before any Hugging Face library is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As in the Makefile: left out, accelerate warns on ranks, and a warning is an error here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A suite that a shell started in the background ignores Ctrl-C, and so would the programs that it sends one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from tests import tiny


def pytest_collection_finish():
    """Libraries live as long as the process: looking through them for garbage was a third of each training's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """``checkpoints("llama")`` -> folder of a tiny checkpoint with a tokenizer; read-only."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str = "llama") -> Path:
        folder = root / family
        if not folder.exists():
            tiny.save_checkpoint(folder, family)
        return folder

    return get


@pytest.fixture(scope="session")
def llama(checkpoints) -> Path:
    """A tiny Llama checkpoint folder; read-only."""
    return checkpoints("llama")


@pytest.fixture
def tokenizer():
    """A fresh tiny tokenizer with a ChatML template."""
    return tiny.build_tokenizer()


@pytest.fixture(autouse=True)
def settings_end_with_their_test():
    """What a test says of its run is not said to the next one, which may be of any file."""
    yield
    group = sys.modules.get("pantheraml.distributed.process_group")
    if group is not None:
        group._settings = group.MultiGPUConfig()
