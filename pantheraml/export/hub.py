"""Uploads to the Hugging Face hub: the whole folder is built here first, and kept if the network fails."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from pantheraml.errors import SaveError
from pantheraml.export.adapter import save_adapter
from pantheraml.export.gguf.save import GgufContents, write_gguf
from pantheraml.export.merge import Merged, check_mergeable_model, parse_method, write_merged
from pantheraml.log import say
from pantheraml.models.hub_patience import patiently

# Weights of an earlier upload that the new one lacks would be loaded instead of it, or beside it.
_SUPERSEDED = {
    "model*.safetensors": ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"],
    "adapter_model*.safetensors": ["adapter_model.safetensors"],
}


def push_folder(
    folder: str | Path,
    repo_id: str | None,
    token: str | bool | None = None,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload all files of ``folder`` to a model repository, which is made if it does not exist.

    Args:
        folder: a saved model or adapter.
        repo_id: "user/name"; "name" alone is put under the user of the token; None for the folder's name.
        token: an access token; None for the one that ``hf auth login`` stored.
        private: whether a new repository is private; None for the account's default.
        commit_message: what the commit is called.
        revision: branch to commit to, made if missing; None for the main one.

    Returns:
        Address of the repository.

    Raises:
        SaveError: there is no such folder, or the hub refused or could not be reached.
    """
    if not Path(folder).is_dir():
        raise SaveError(
            got=f"There is no folder {folder}.",
            need="An upload takes all files of a folder that was saved before.",
            fix="Give the folder that save_pretrained or save_pretrained_merged wrote.",
        )
    api = HfApi(token=token)
    repo_id = _open_repo(api, repo_id or Path(folder).name, private, revision, kept=Path(folder))
    return _upload(api, Path(folder), repo_id, commit_message, revision)


def push_adapter(
    model: nn.Module,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    token: str | bool | None = None,
    **upload: Any,
) -> str:
    """Save the adapter of ``model`` to a temporary folder and upload it.

    Args:
        model: a PEFT model.
        repo_id: "user/name".
        tokenizer: tokenizer or processor to upload with it.
        token: an access token; None for the stored one.
        **upload: ``private``, ``commit_message`` and ``revision`` of ``push_folder``.

    Returns:
        Address of the repository.

    Raises:
        AdapterError: ``model`` has no adapter.
        SaveError: the disk or the hub failed; after a failed upload the files stay and the error says where.
    """
    return push_built(lambda folder: save_adapter(model, folder, tokenizer), repo_id, token, **upload)


def push_merged(
    model: nn.Module,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    save_method: str = "merged_16bit",
    token: str | bool | None = None,
    *,
    max_shard_size: int | str = "5GB",
    dtype: str | None = None,
    **upload: Any,
) -> str:
    """Save ``model`` as ``save_merged`` does to a temporary folder and upload it.

    Args:
        model: a transformers model, or a PEFT model around one.
        repo_id: "user/name".
        tokenizer: tokenizer or processor to upload with it.
        save_method: "lora", "merged_16bit" or "merged_4bit".
        token: an access token; None for the stored one.
        max_shard_size: limit of one weight file.
        dtype: of the merged weights, see ``save_merged``.
        **upload: ``private``, ``commit_message`` and ``revision`` of ``push_folder``.

    Returns:
        Address of the repository.

    Raises:
        ConfigError, AdapterError: as ``save_merged``.
        SaveError: the disk or the hub failed; after a failed upload the files stay and the error says where.
    """
    check_mergeable_model(model, save_method, max_shard_size)
    method = parse_method(save_method)
    if method == "lora":
        return push_adapter(model, repo_id, tokenizer, token, **upload)
    merged = Merged(model, method, dtype)
    try:
        return push_built(
            lambda folder: write_merged(merged, folder, tokenizer, max_shard_size), repo_id, token, **upload
        )
    finally:
        merged.gather_rest()


def push_gguf(
    model: nn.Module,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    quantization_method: str | Iterable[str] = "q8_0",
    token: str | bool | None = None,
    **upload: Any,
) -> str:
    """Save ``model`` as ``save_gguf`` does to a temporary folder and upload it.

    Args:
        model: a transformers model, or a PEFT model around one.
        repo_id: "user/name".
        tokenizer: its tokenizer or processor.
        quantization_method: one format or several.
        token: an access token; None for the stored one.
        **upload: ``private``, ``commit_message`` and ``revision`` of ``push_folder``.

    Returns:
        Address of the repository.

    Raises:
        ConfigError, NotYetError, AdapterError: as ``save_gguf``.
        SaveError: the disk or the hub failed; after a failed upload the files stay and the error says where.
    """
    contents = GgufContents(model, tokenizer, quantization_method)  # before a repository is made
    try:
        return push_built(lambda folder: write_gguf(contents, folder), repo_id, token, **upload)
    finally:
        contents.gather_rest()


def push_built(
    build: Callable[[Path], object],
    repo_id: str,
    token: str | bool | None = None,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> str:
    """Make the repository, let ``build`` write a temporary folder, and upload that.

    The repository comes first: a wrong token or name shows before the expensive work.
    """
    api = HfApi(token=token)
    repo_id = _open_repo(api, repo_id, private, revision)
    workshop = Path(tempfile.mkdtemp(prefix="pantheraml-upload-"))
    folder = workshop / repo_id.rpartition("/")[2]
    try:
        build(folder)
    except BaseException:
        shutil.rmtree(workshop, ignore_errors=True)
        raise
    address = _upload(api, folder, repo_id, commit_message, revision)
    shutil.rmtree(workshop, ignore_errors=True)
    return address


def _open_repo(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, kept: Path | None = None
) -> str:
    """Make the repository and the branch if they are missing; the full name of the repository."""
    try:
        opening = f"opening {repo_id}"
        create = partial(api.create_repo, repo_id, private=private, exist_ok=True)
        repo_id = patiently(create, opening).repo_id
        if revision is not None:
            patiently(partial(api.create_branch, repo_id, branch=revision, exist_ok=True), opening)
    except Exception as error:
        raise _hub_error(f"The hub repository {repo_id} cannot be opened", error, kept, repo_id) from error
    return repo_id


def _upload(api: HfApi, folder: Path, repo_id: str, commit_message: str | None, revision: str | None) -> str:
    superseded = [name for new, names in _SUPERSEDED.items() if any(folder.glob(new)) for name in names]
    try:
        upload = partial(
            api.upload_folder,
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload a model trained with PantheraML",
            revision=revision,
            delete_patterns=superseded or None,
            ignore_patterns=["checkpoint-*/**", ".pantheraml-*"],
        )
        commit = patiently(upload, f"uploading to {repo_id}")
    except Exception as error:  # hub, network and Xet errors share no base; each must name the local copy
        raise _hub_error(f"The upload to {repo_id} stopped", error, folder, repo_id) from error
    say(f"Uploaded {folder.name} to {commit.repo_url}.")
    return str(commit.repo_url)


def _hub_error(what: str, error: Exception, kept: Path | None, repo_id: str) -> SaveError:
    """The failure in our words: the hub's own, then where the files are."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [str(one).strip().split("\n")[0].rstrip(".") for one in (error, root)]
    reason = " - ".join(dict.fromkeys(line for line in lines if line)) or "no message"
    copy = f" All files are kept in {kept}." if kept else " Nothing was saved yet."
    again = f"then type `hf upload {repo_id} {kept}`" if kept else "then save again"
    return SaveError(
        got=f"{what}: {type(error).__name__}: {reason}.",
        need=f"An upload needs the network and a token with write access to {repo_id}.{copy}",
        fix=f"Type `hf auth login` or pass token='hf_…', {again}.",
    )
