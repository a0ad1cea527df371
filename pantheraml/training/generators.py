"""Whether what is to generate for a run can: asked before ranks wait for one another.

TRL finds out later, and where a vLLM server does not answer, on one rank alone.
"""

from __future__ import annotations

import time
import urllib.request
from dataclasses import fields

from torch import nn
from trl import GRPOConfig
from trl.import_utils import is_vllm_available

from pantheraml.distributed.process_group import broadcast_object, is_main_process
from pantheraml.errors import ConfigError, HardwareError
from pantheraml.log import say
from pantheraml.models.sharding import is_sharded
from pantheraml.models.state import get_state

# Seconds that a server has for one answer, and between two questions.
_PATIENCE, _PAUSE = 5.0, 2.0


def ask_named_server(config: GRPOConfig) -> None:
    """Let a vLLM server that is named be the one that is asked: TRL's default is an engine beside the training.

    Args:
        config: before it is checked; ``vllm_mode`` is set where a server is named and another mode is not.
    """
    usual = {one.name: one.default for one in fields(GRPOConfig)}
    named = [
        name
        for name in ("vllm_server_base_url", "vllm_server_host", "vllm_server_port")
        if getattr(config, name) != usual[name]
    ]
    if config.use_vllm and named and config.vllm_mode == usual["vllm_mode"] != "server":
        config.vllm_mode = "server"
        say(f'{named[0]} names a vLLM server, so vllm_mode="server".')


def check_generator(config: GRPOConfig, model: nn.Module) -> None:
    """Refuse vLLM and continuous batching where they cannot work; every rank calls this, and all raise the same.

    Args:
        config: what begins with ``vllm_``, ``use_vllm`` and ``use_transformers_continuous_batching`` count.
        model: that is trained.

    Raises:
        ConfigError: vLLM is not installed, or cannot be sent these weights; continuous batching cannot run the model.
        HardwareError: the server does not answer.
    """
    if config.use_vllm:
        _check_vllm(config, model)
    elif config.use_transformers_continuous_batching:
        _check_continuous(model)


def _check_continuous(model: nn.Module) -> None:
    state = get_state(model)
    if state is not None and state.kernels == "auto":
        raise ConfigError(
            got="use_transformers_continuous_batching=True was given for a model with PantheraML's attention.",
            need="It keeps keys and values in pages, which transformers' own layers read.",
            fix='Leave it out, or load the model with kernels="off".',
        )
    if is_sharded(model):
        raise ConfigError(
            got="use_transformers_continuous_batching=True was given, and ranks share out the model's weights.",
            need="Ranks gather layers together, and each would take as many steps as its own rows need.",
            fix='Leave it out, or load the model without strategy="fsdp".',
        )


def _check_vllm(config: GRPOConfig, model: nn.Module) -> None:
    if not is_vllm_available():
        raise ConfigError(
            got="use_vllm=True was given, and vllm is not installed.",
            need="TRL loads it in every process that trains, for vllm_mode='server', too: weights go to the server by "
            "vLLM's own way.",
            fix="Type pip install 'trl[vllm]', or leave use_vllm out: transformers then generates.",
        )
    if is_sharded(model):
        raise ConfigError(
            got="use_vllm=True was given, and ranks share out the model's weights.",
            need="TRL sends vLLM whole weights, a tensor after the other, and knows them whole on each rank.",
            fix='Leave use_vllm out, or load the model without strategy="fsdp".',
        )
    if config.vllm_mode == "server":
        url = server_url(config)
        answer = _ask(url, config.vllm_server_timeout) if is_main_process() else None
        answer = broadcast_object(answer)
        if answer is not None:
            raise HardwareError(
                got=f"No vLLM server answers at {url}/health: {answer}.",
                need=f"It was asked for {config.vllm_server_timeout:.0f} seconds (vllm_server_timeout).",
                fix=f"Type trl vllm-serve --model MODEL --port {config.vllm_server_port} on the GPUs that generate, or "
                "correct vllm_server_host and vllm_server_port.",
            )


def server_url(config: GRPOConfig) -> str:
    """Where the server is, as TRL reads the arguments."""
    if config.vllm_server_base_url is not None:
        return config.vllm_server_base_url.rstrip("/")
    return f"http://{config.vllm_server_host}:{config.vllm_server_port}"


def _ask(url: str, timeout: float) -> str | None:
    """What is wrong with the server, after ``timeout`` seconds; None as soon as it answers."""
    end = time.monotonic() + timeout
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=_PATIENCE) as answer:
                if answer.status == 200:
                    return None
                wrong = f"status {answer.status}"
        except (OSError, ValueError) as error:
            wrong = str(error)
        if time.monotonic() >= end:
            return wrong
        time.sleep(min(_PAUSE, max(0.0, end - time.monotonic())))
