"""A learning rate of their own for trained embeddings and heads."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from pantheraml.errors import ConfigError


def embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Trained weights of the input embedding and the output head, also inside PEFT's ``modules_to_save``."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]  # pyright: ignore[reportCallIssue]
    found: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
            if parameter.requires_grad and "lora_" not in name:
                found[id(parameter)] = parameter
    return list(found.values())


def split_embedding_group(optimizer: Optimizer, parameters: list[nn.Parameter], learning_rate: float) -> None:
    """Move ``parameters`` into optimizer groups with ``learning_rate``; everything else about a group is kept.

    Args:
        optimizer: changed in place; it must not have taken a step yet.
        parameters: the trained embeddings and heads.
        learning_rate: their learning rate.

    Raises:
        ConfigError: none of them is trained, so the rate would act on nothing.
    """
    if not parameters:
        raise ConfigError(
            got=f"embedding_learning_rate={learning_rate} was given, but no embedding or head is trained.",
            need="It acts on embed_tokens and lm_head.",
            fix='Add modules_to_save=["embed_tokens", "lm_head"] to get_peft_model, or drop it.',
        )
    wanted = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if not moved:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
        settings: dict[str, Any] = {key: value for key, value in group.items() if key != "params"}
        optimizer.add_param_group({**settings, "params": moved, "lr": learning_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
