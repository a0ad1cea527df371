"""Find the files of a model: a local folder or a hub id, a base model or a saved adapter.

Only safetensors weights are used; a folder or repository that offers nothing but pickles is refused.
Files of a hub model are fetched by name (configuration, tokenizer, the weight shards the index lists),
so copies in other formats are neither downloaded nor opened.
"""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pantheraml.errors import ModelLoadError
from pantheraml.models.hub_patience import patiently
from pantheraml.models.tensor_header import BadHeader, read_header

_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*", "*.tiktoken"]
# Folders of a repository hold the same model in other formats.
_NESTED = ["*/*.json", "*/*.txt", "*/*.model", "*/*.tiktoken"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        name: what the user wrote, and what saved adapters will name as their base.
        folder: local folder of the base model (``config.json`` and safetensors).
        adapter: local folder of the adapter (``adapter_config.json``), or None.
    """

    name: str
    folder: Path
    adapter: Path | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's folder when a tokenizer was saved with it, else the base model's."""
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").exists():
            return self.adapter
        return self.folder


def resolve_source(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> ModelSource:
    """Locate ``name`` and check that its weight files are whole.

    Args:
        name: local folder or hub id, of a base model or of a saved adapter.
        revision: branch, tag or commit on the hub.
        token: hub access token.
        trust_remote_code: also fetch the Python files of a hub repository.

    Raises:
        ModelLoadError: nothing there, weights missing, cut short or pickled, or the hub cannot be reached.
    """
    folder = _local_folder(str(name), revision, token, trust_remote_code)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not base:
            raise ModelLoadError(
                got=f"The adapter in '{name}' does not say which model it belongs to.",
                need="Its adapter_config.json must name the base model in 'base_model_name_or_path'.",
                fix="Add that entry, or load the base model and attach the adapter with peft.PeftModel.",
            )
        check_weights(folder, "adapter_model")
        try:
            inner = resolve_source(base, token=token, trust_remote_code=trust_remote_code)
        except ModelLoadError as error:
            raise ModelLoadError(
                got=f"The adapter in '{name}' was trained on '{base}', which cannot be loaded: {error.got}",
                need=error.need,
                fix=f"Put that model back, or change 'base_model_name_or_path' in {folder}/adapter_config.json.",
            ) from error
        return ModelSource(inner.name, inner.folder, folder)
    if not (folder / "config.json").exists():
        raise ModelLoadError(
            got=f"The folder '{folder}' holds no config.json and no adapter_config.json.",
            need="A model folder as written by save_pretrained is needed.",
            fix="Check the path; a checkpoint of a run is one level deeper, in checkpoint-<step>.",
        )
    read_json(folder / "config.json")
    check_weights(folder, "model")
    return ModelSource(str(name), folder)


def resolve_config(name: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of the configuration of a base model, or of that of an adapter; weights need not be there, and of a
    hub model the configuration alone is fetched.

    Raises:
        ModelLoadError: as ``resolve_source``.
    """
    if Path(name).expanduser().is_dir() or _looks_like_path(name):
        folder = _local_folder(name, revision, token, False)
    else:
        folder = _fetch_config(name, revision, token)
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not (folder / "config.json").exists():
        base = read_json(adapter).get("base_model_name_or_path")
        if base:
            return resolve_config(base, token=token)
    if not (folder / "config.json").exists():
        raise ModelLoadError(
            got=f"The folder '{folder}' holds no config.json.",
            need="A base model's configuration says how large it is.",
            fix="Give a model folder as written by save_pretrained, or the base model of an adapter.",
        )
    read_json(folder / "config.json")
    return folder


def check_weights(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of ``folder``, each checked to be complete.

    Args:
        folder: a model or adapter folder.
        stem: ``"model"`` or ``"adapter_model"``.

    Returns:
        The shards, in the order of the index.

    Raises:
        ModelLoadError: no safetensors, a shard of the index is missing, or a file is cut short.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        shards = [single]
    elif index.exists():
        shards = [folder / file for file in dict.fromkeys(read_json(index).get("weight_map", {}).values())]
    else:
        shards = []
    if not shards:
        raise _no_weights(folder, stem, [file.name for file in folder.iterdir()])
    missing = [file.name for file in shards if not file.exists()]
    if missing:
        raise ModelLoadError(
            got=f"'{folder}' lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing[:4])}.",
            need=f"All files that {index.name} lists are needed.",
            fix="Copy the missing files, or download the model again.",
        )
    for file in shards:
        try:
            read_header(file)
        except BadHeader as error:
            raise ModelLoadError(
                got=f"'{file}' {error}.",
                need="The file is damaged, was cut short, or is not a safetensors file (a Git LFS pointer, perhaps).",
                fix="Copy or download this file again.",
            ) from None
    return shards


def _no_weights(place: str | Path, stem: str, names: list[str]) -> ModelLoadError:
    """The error for a folder or repository with the files ``names`` and no safetensors among them."""
    pickles = sorted({name for pattern in _PICKLES for name in fnmatch.filter(names, pattern)})
    if pickles:
        return ModelLoadError(
            got=f"'{place}' offers its weights as pickles only ({', '.join(pickles[:3])}).",
            need="Pickles can run code when they are opened, so only safetensors are read.",
            fix="Convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER) writes safetensors.",
        )
    return ModelLoadError(
        got=f"'{place}' holds no weights.",
        need=f"{stem}.safetensors or {stem}.safetensors.index.json with its shards is needed.",
        fix="Copy the missing files, or download the model again.",
    )


def _local_folder(name: str, revision: str | None, token: str | None, trust_remote_code: bool) -> Path:
    """The local folder of ``name``, fetched from the hub when it is not a path."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if _looks_like_path(name):
        raise ModelLoadError(
            got=f"There is no folder '{name}' (looked in {Path.cwd()}).",
            need="A model is given as a local folder or as a hub id such as 'org/name'.",
            fix="Check the path.",
        )
    return _fetch(name, revision, token, trust_remote_code)


def _looks_like_path(name: str) -> bool:
    marked = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    return marked or not name or Path(name).expanduser().exists()


def _fetch(repo_id: str, revision: str | None, token: str | None, trust_remote_code: bool) -> Path:
    """Download configuration and tokenizer, then exactly the weight files the index names."""
    from huggingface_hub import snapshot_download

    def download(patterns: list[str]) -> Path:
        fetch = partial(
            snapshot_download, repo_id, revision=revision, token=token, allow_patterns=patterns,
            ignore_patterns=_NESTED,
        )  # fmt: skip
        return Path(patiently(fetch, f"fetching {repo_id}"))

    try:
        folder = download([*_SMALL_FILES, *(["*.py"] if trust_remote_code else [])])
        stem = "model" if (folder / "config.json").exists() else "adapter_model"
        index = folder / f"{stem}.safetensors.index.json"
        shards = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else []
        folder = download(shards or [f"{stem}.safetensors"])
    except Exception as error:
        raise _explain_hub_error(repo_id, revision, error) from error
    if not any(folder.glob("*.safetensors")):
        raise _no_weights(repo_id, stem, _list_repository(repo_id, revision, token))
    return folder


def _list_repository(repo_id: str, revision: str | None, token: str | None) -> list[str]:
    """Names of all files there; none when the hub does not say, since they only make an error clearer."""
    from huggingface_hub import HfApi

    try:
        return HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except Exception:
        return []


def _fetch_config(repo_id: str, revision: str | None, token: str | None) -> Path:
    """The folder of the configuration of a model on the hub, or else of that of an adapter."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(file: str) -> Path:
        download = partial(hf_hub_download, repo_id, file, revision=revision, token=token)
        return Path(patiently(download, f"fetching the configuration of {repo_id}")).parent

    try:
        return fetch("config.json")
    except EntryNotFoundError as error:
        try:
            return fetch("adapter_config.json")
        except Exception:
            raise _explain_hub_error(repo_id, revision, error) from error
    except Exception as error:
        raise _explain_hub_error(repo_id, revision, error) from error


def _explain_hub_error(repo_id: str, revision: str | None, error: Exception) -> ModelLoadError:
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return ModelLoadError(
            got=f"The model '{repo_id}' is gated and this account may not read it.",
            need="Its owner must grant access first.",
            fix=f"Ask for access on the page of {repo_id}, then pass token='hf_...' or run `hf auth login`.",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return ModelLoadError(
            got=f"'{repo_id}' has no revision '{revision}'.",
            need="A branch, tag or commit of that repository is needed.",
            fix="Leave revision=None for the main branch.",
        )
    if isinstance(error, hub.RepositoryNotFoundError | hub.HFValidationError):
        return ModelLoadError(
            got=f"'{repo_id}' is neither a folder here nor a model on the hub that this account can see.",
            need="A local folder or a hub id such as 'org/name' is needed; private models need a token.",
            fix="Check the spelling, or pass token='hf_...'.",
        )
    at = f" at revision '{revision}'" if revision else ""
    return ModelLoadError(
        got=f"'{repo_id}' is neither a folder here nor whole in the local cache{at}, and {_why_not(error)}.",
        need="The files must be on this machine before a run without the hub.",
        fix=f"Give a local folder, or run `hf download {repo_id}` once where the hub can be reached"
        " (and HF_HUB_OFFLINE is not set).",
    )


def _why_not(error: BaseException | None) -> str:
    """Why the hub gave nothing, as the end of a sentence."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE keeps this process from the hub"
    while error is not None:
        if isinstance(error, hub.HfHubHTTPError) and error.response is not None:
            return f"the hub answered with status {error.response.status_code}"
        error = error.__cause__
    return "the hub cannot be reached"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        ModelLoadError: the file holds none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(
            got=f"'{file}' is not valid JSON ({error}).",
            need="The file is damaged or was cut short.",
            fix="Copy or download it again.",
        ) from error
    if not isinstance(content, dict):
        raise ModelLoadError(
            got=f"'{file}' holds no JSON object but a {type(content).__name__}.",
            need="Its settings are name and value, in braces.",
            fix="Copy or download it again.",
        )
    return content
