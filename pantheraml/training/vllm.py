"""Whether vLLM can generate for a run, asked before ranks wait for one another: TRL finds out on one of them, later."""

from __future__ import annotations

import time
import urllib.request

from torch import nn
from trl import GRPOConfig
from trl.import_utils import is_vllm_available

from pantheraml.distributed.process_group import broadcast_object, is_main_process
from pantheraml.errors import ConfigError, HardwareError
from pantheraml.models.sharding import is_sharded

# Seconds that a server has for one answer, and between two questions.
_PATIENCE, _PAUSE = 5.0, 2.0


def check_vllm(config: GRPOConfig, model: nn.Module) -> None:
    """Refuse ``use_vllm=True`` where it cannot work; every rank calls this, and all raise the same.

    Args:
        config: ``vllm_mode``, ``vllm_server_base_url``, ``vllm_server_host``, ``vllm_server_port`` and
            ``vllm_server_timeout`` count.
        model: that is trained.

    Raises:
        ConfigError: vLLM is not installed, or ranks share out the weights that it would be sent.
        HardwareError: the server does not answer.
    """
    if not config.use_vllm:
        return
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
                fix="Start it as docs/grpo.md says (vllm serve MODEL --port ...), or correct vllm_server_host and "
                "vllm_server_port.",
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
