"""What models get as methods: each function takes the model first and saves whole folders or nothing.

Scripts call them on every rank; rank 0 writes and returns something, and the others help to gather what ranks share
out.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from pantheraml.checkpoint.publish import publish_folder
from pantheraml.errors import SaveError
from pantheraml.export.adapter import save_adapter
from pantheraml.export.gathered import Gathered, write_gathered
from pantheraml.export.gguf.save import gather_gguf, save_gguf
from pantheraml.export.hub import push_built, push_folder, push_gguf, push_merged
from pantheraml.export.merge import gather_merged, save_merged
from pantheraml.export.one_rank import by_one_rank, merging_by_one_rank
from pantheraml.export.trained_model import of_what_is_trained
from pantheraml.models.sharded_linear import tensor_group_of

Processor = PreTrainedTokenizerBase | ProcessorMixin


def _gather_merged(model: nn.Module, options: dict[str, Any]) -> None:
    gather_merged(model, options["save_method"], options.get("dtype"))


def _gather_gguf(model: nn.Module, options: dict[str, Any]) -> None:
    gather_gguf(model, options["tokenizer"], options["quantization_method"])


@of_what_is_trained
@by_one_rank
def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    tokenizer: Processor | None = None,
    *,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> None:
    """The model's own ``save_pretrained`` (PEFT: the adapter), saved whole or not at all.

    Args:
        model: a PEFT or transformers model.
        save_directory: where to.
        tokenizer: tokenizer or processor to save with it.
        push_to_hub: also upload the folder.
        repo_id: hub name, by default the folder's.
        token: hub access token.
        private: whether a new hub repository is private.
        commit_message: of the upload.
        revision: branch of the upload.
        **kwargs: for the model's own method.

    Raises:
        SaveError: the disk or the hub failed; an older save is untouched.
    """
    own_method: Any = type(model).save_pretrained  # pyright: ignore[reportAttributeAccessIssue]
    if not kwargs.get("is_main_process", True):
        # Other ranks take part in gathering weights but own no files.
        own_method(model, save_directory, **kwargs)
        return
    if isinstance(model, PeftModel):
        save_adapter(model, save_directory, tokenizer, **kwargs)
    elif tensor_group_of(model) is not None:
        raise SaveError(
            got="save_pretrained was called on a model without an adapter, whose layers are cut between ranks.",
            need="transformers' own method would write the part that one rank has.",
            fix="Use save_pretrained_merged, which asks all ranks for their parts.",
        )
    else:
        size = sum(weight.nbytes for weight in model.parameters())
        with publish_folder(save_directory, size) as build:
            if isinstance(kwargs.get("state_dict"), Gathered):
                write_gathered(own_method, model, build, kwargs.pop("state_dict"), **kwargs)
            else:
                own_method(model, build, **kwargs)
            if tokenizer is not None:
                tokenizer.save_pretrained(build)
    if push_to_hub:
        push_folder(
            save_directory, repo_id, token, private=private, commit_message=commit_message, revision=revision
        )


@of_what_is_trained
@merging_by_one_rank(_gather_merged)
def save_pretrained_merged(
    model: nn.Module,
    save_directory: str | Path,
    tokenizer: Processor | None = None,
    save_method: str = "merged_16bit",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    max_shard_size: int | str = "5GB",
    *,
    dtype: str | None = None,
    repo_id: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> None:
    """Save the trained model for use in plain transformers; see ``save_merged`` and ``push_folder``."""
    save_merged(model, save_directory, tokenizer, save_method, max_shard_size=max_shard_size, dtype=dtype)
    if push_to_hub:
        push_folder(
            save_directory, repo_id, token, private=private, commit_message=commit_message, revision=revision
        )


@of_what_is_trained
@merging_by_one_rank(_gather_merged)
def push_to_hub_merged(
    model: nn.Module,
    repo_id: str,
    tokenizer: Processor | None = None,
    save_method: str = "merged_16bit",
    token: str | bool | None = None,
    **options: Any,
) -> str:
    """Upload the trained model for use in plain transformers; options and errors as ``push_merged``."""
    return push_merged(model, repo_id, tokenizer, save_method, token, **options)


@of_what_is_trained
@merging_by_one_rank(_gather_gguf)
def save_pretrained_gguf(
    model: nn.Module,
    save_directory: str | Path,
    tokenizer: Processor | None = None,
    quantization_method: str | Iterable[str] = "q8_0",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    *,
    repo_id: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> list[Path]:
    """Save the trained model as GGUF files for llama.cpp, whole or not at all.

    Args:
        model: a PEFT or transformers model, in any precision.
        save_directory: where to; ``model-Q8_0.gguf`` and so on.
        tokenizer: its tokenizer or processor, which the files carry.
        quantization_method: "f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1" or "q4_0", or a list of them.
        push_to_hub: also upload the folder.
        token: hub access token.
        repo_id: hub name, by default the folder's.
        private: whether a new hub repository is private.
        commit_message: of the upload.
        revision: branch of the upload.

    Returns:
        The files, on rank 0.

    Raises:
        ConfigError, NotYetError, AdapterError: the model, the tokenizer or the format cannot be written; nothing was.
        SaveError: the disk or the hub failed; an older save is untouched.
    """
    files = save_gguf(model, save_directory, tokenizer, quantization_method)
    if push_to_hub:
        push_folder(
            save_directory, repo_id, token, private=private, commit_message=commit_message, revision=revision
        )
    return files


@of_what_is_trained
@merging_by_one_rank(_gather_gguf)
def push_to_hub_gguf(
    model: nn.Module,
    repo_id: str,
    tokenizer: Processor | None = None,
    quantization_method: str | Iterable[str] = "q8_0",
    token: str | bool | None = None,
    **options: Any,
) -> str:
    """Upload the trained model as GGUF files; options and errors as ``push_gguf``."""
    return push_gguf(model, repo_id, tokenizer, quantization_method, token, **options)


@of_what_is_trained
@by_one_rank
def push_to_hub(
    model: nn.Module,
    repo_id: str,
    tokenizer: Processor | None = None,
    token: str | bool | None = None,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> str:
    """Upload what ``save_pretrained`` saves (PEFT: the adapter).

    Args:
        model: a PEFT or transformers model.
        repo_id: "user/name".
        tokenizer: tokenizer or processor to upload with it.
        token: hub access token; None for the stored one.
        private: whether a new repository is private.
        commit_message: of the upload.
        revision: branch of the upload.
        **kwargs: for the model's own ``save_pretrained``.

    Returns:
        Address of the repository.

    Raises:
        SaveError: the disk or the hub failed; after a failed upload the files stay and the error says where.
    """
    return push_built(
        lambda folder: save_pretrained(model, folder, tokenizer, **kwargs),
        repo_id,
        token,
        private=private,
        commit_message=commit_message,
        revision=revision,
    )
