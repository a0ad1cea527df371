"""Checkpoints of a run that are damaged or missing, and saves of them that fail."""

from __future__ import annotations

import os

from tests.errors.workshop import Workshop, case, disk_of


def _saved(shop: Workshop, name: str):
    from tests.checkpoint.runs import save

    return save(shop.folder(name), 3)


@case
def checkpoint_without_a_manifest(shop: Workshop) -> None:
    from pantheraml.checkpoint.manifest import read_manifest

    folder = _saved(shop, "run")
    (folder / "manifest.json").unlink()
    read_manifest(folder)


@case
def manifest_that_was_cut_short(shop: Workshop) -> None:
    from pantheraml.checkpoint.manifest import read_manifest

    folder = _saved(shop, "run")
    os.truncate(folder / "manifest.json", 200)
    read_manifest(folder)


@case
def link_in_a_checkpoint(shop: Workshop) -> None:
    from pantheraml.checkpoint.manifest import write_manifest

    folder = _saved(shop, "run")
    (folder / "base").symlink_to(shop.root)
    write_manifest(folder, {})


@case
def pointer_to_a_checkpoint_that_is_gone(shop: Workshop) -> None:
    from pantheraml.checkpoint.pointers import point

    point(_saved(shop, "run").parent, "best", 5, metric="eval_loss", value=0.5)


@case
def pointer_that_was_cut_short(shop: Workshop) -> None:
    from pantheraml.checkpoint.pointers import read_pointer

    run = _saved(shop, "run").parent
    os.truncate(run / "latest.json", 20)
    read_pointer(run, "latest")


@case
def checkpoint_on_a_full_disk(shop: Workshop) -> None:
    from tests.checkpoint.runs import save

    with disk_of(shop, "40k") as disk:
        save(disk, 3)
        save(disk, 5)


@case
def nothing_to_verify(shop: Workshop) -> None:
    from pantheraml.cli.verify import verify_folder

    verify_folder(shop.root / "no-such-folder")
