"""Saves that fail before or while they are written; what was there before stays."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.errors.workshop import Workshop, case, disk_of


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Whatever happens inside, ``folder`` is afterwards what it was, bit for bit."""
    before = _tree(folder)
    assert "model.safetensors" in before
    try:
        yield
    finally:
        assert _tree(folder) == before


@case
def misspelt_save_method(shop: Workshop) -> None:
    shop.adapted().save_pretrained_merged(shop.root / "out", shop.tokenizer, save_method="merged_16bits")


@case
def unknown_save_method(shop: Workshop) -> None:
    shop.adapted().save_pretrained_merged(shop.root / "out", shop.tokenizer, save_method="onnx")


@case
def gguf(shop: Workshop) -> None:
    shop.adapted().save_pretrained_gguf(shop.root / "out", shop.tokenizer, quantization_method="q4_k_m")


@case
def no_adapter_to_save(shop: Workshop) -> None:
    shop.load().save_pretrained_merged(shop.root / "out", shop.tokenizer, save_method="lora")


@case
def unknown_dtype_of_a_save(shop: Workshop) -> None:
    shop.adapted().save_pretrained_merged(shop.root / "out", shop.tokenizer, dtype="bfloat")


@case
def shards_without_a_size(shop: Workshop) -> None:
    shop.adapted().save_pretrained_merged(shop.root / "out", shop.tokenizer, max_shard_size="big")


@case
def full_disk(shop: Workshop) -> None:
    with disk_of(shop, "450k") as disk:
        model = shop.adapted()
        model.save_pretrained_merged(disk / "out", shop.tokenizer)
        with _kept(disk / "out"):
            model.save_pretrained_merged(disk / "out", shop.tokenizer)


@case
def disk_that_fills_up(shop: Workshop) -> None:
    with disk_of(shop, "700k") as disk:
        model = shop.adapted()
        model.save_pretrained_merged(disk / "out", shop.tokenizer)
        # Room for the weights, which are counted beforehand, and not for the tokenizer after them.
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        weights = (disk / "out" / "model.safetensors").stat().st_size
        (disk / "other").write_bytes(b"0" * (free - weights - 16_000))
        with _kept(disk / "out"):
            model.save_pretrained_merged(disk / "out", shop.tokenizer)


@case
def file_size_limit(shop: Workshop) -> None:
    model, folder = shop.adapted(), shop.folder("out")
    model.save_pretrained_merged(folder, shop.tokenizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with _kept(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            model.save_pretrained_merged(folder, shop.tokenizer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@case
def no_permission(shop: Workshop) -> None:
    model, folder = shop.adapted(), shop.folder("out")
    model.save_pretrained_merged(folder, shop.tokenizer)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    with _kept(folder):
        if root:  # whom no permission stops
            os.seteuid(65534)
        try:
            model.save_pretrained_merged(folder, shop.tokenizer)
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


@case
def folder_that_is_a_file(shop: Workshop) -> None:
    shop.adapted().save_pretrained_merged(shop.file("notes", "kept") / "out", shop.tokenizer)
