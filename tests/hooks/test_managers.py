"""The guides' managers, called as they print it: a plan that enable_multi_gpu takes, devices and memory."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

import pantheraml
from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.devices import visible_gpus
from pantheraml.devices.nvml import Gpu, GPUState
from pantheraml.devices.usual_models import read_size, usual_model
from pantheraml.errors import ConfigError, ModelLoadError
from pantheraml.hooks.planning import arguments_of, choose
from pantheraml.hooks.settings import HookSettings
from pantheraml.utils import ConfigManager, DeviceManager, MemoryManager
from tests import tiny


class Driver:
    """NVML with two H200 of which 1 and then 9 GiB are taken, and more at every look."""

    def __init__(self):
        self.looks = 0

    def gpus(self):
        return [Gpu("GPU-0", False), Gpu("GPU-1", False)]

    def state(self, uuid):
        self.looks += 1
        used = 1.0 if uuid == "GPU-0" else 9.0
        return GPUState(used + self.looks // 2, 139.8, 400.0, 60, {}, "NVIDIA H200")


@pytest.fixture
def two_gpus(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(visible_gpus, "open_nvml", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.promise("C4")
def test_the_guides_call():
    optimal = ConfigManager().get_optimal_config(model_size="7B", available_memory="32GB")
    assert (optimal["num_gpus"], optimal["enable_gradient_checkpointing"]) == (1, "auto")
    status = pantheraml.enable_multi_gpu(**optimal)
    assert status["config"] == optimal and optimal["batch_size_per_gpu"] >= 1


@pytest.mark.promise("C4")
def test_a_plan_follows_what_there_is(two_gpus):
    ask = ConfigManager().get_optimal_config
    here = ask("8B")
    assert here["num_gpus"] == 2 and here["batch_size_per_gpu"] == 4 and "strategy" not in here
    small = ask("8B", available_memory="24GB")
    assert small["batch_size_per_gpu"] < 4
    request, choice = choose("8B", "H200", 1, 2048, "lora")
    all_layers = replace(
        choice.plan, work=replace(choice.plan.work, recomputing=(len(request.parts.layers),))
    )
    assert arguments_of(request, all_layers)["enable_gradient_checkpointing"] is True
    large = ask("70B", "H200", 8, 4096)
    assert large.items() >= {"num_gpus": 8, "strategy": "fsdp", "shard_frozen": True}.items()
    assert HookSettings.of(large).multi_gpu == MultiGPUConfig(
        num_processes=8, strategy="fsdp", shard_frozen=True
    )
    full = ask("7B", "80GB", 8, method="full")
    assert full["strategy"] == "fsdp" and "shard_frozen" not in full
    assert ask("70B", "2xH200", method="qlora")["num_gpus"] == 2
    with pytest.raises(ConfigError, match=r"Nothing fits.*method='qlora' saves"):
        ask("7B", "12GB", 1)
    with pytest.raises(ConfigError, match="4 GPUs asked for, 2 can be seen"):
        ask("7B", num_gpus=4)


def test_models_are_named_or_measured(tmp_path):
    estimate = MemoryManager().estimate
    folder = tiny.save_checkpoint(tmp_path / "model")
    of_folder = estimate(str(folder), "24GB", max_seq_length=64)
    of_size = estimate("7B", "32GB")
    assert of_folder["weights"] < 0.01 and 13 < of_size["weights"] < 13.6
    assert sum(of_size.values()) - of_size["total"] == pytest.approx(of_size["total"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ModelLoadError, match="Say its size instead"):
        estimate(str(folder), "24GB")
    for size in ("350M", "1.5b", "7B", "13 B", "180B"):
        assert usual_model(read_size(size)).numbers == pytest.approx(read_size(size), rel=0.05)
    assert read_size("seven") is None
    with pytest.raises(ConfigError, match="50M to 1000B"):
        estimate("1M", "24GB")
    with pytest.raises(ConfigError, match="Did you mean 'lora'"):
        estimate("7B", "24GB", method="lorra")
    with pytest.raises(ConfigError, match="available_memory '32' names"):
        estimate("7B", "32")
    with pytest.raises(ConfigError, match="none can be seen here"):
        estimate("7B")


@pytest.mark.promise("C4")
def test_configs_are_kept_and_checked(tmp_path):
    manager = ConfigManager()
    for name in manager.list_templates():
        config = manager.get_template(name)
        assert manager.load_config(manager.save_config(config, tmp_path / "a" / f"{name}.yaml")) == config
    assert manager.get_template("low_memory")["batch_size_per_gpu"] == 1
    (tmp_path / "mine.json").write_text('{"num_gpus": 1, "timeout_minutes": 3}')
    mine = manager.load_config(tmp_path / "mine.json")
    assert mine == manager.validate({"num_gpus": 1, "timeout_minutes": 3})
    assert pantheraml.enable_multi_gpu(**mine)["config"] == mine
    (tmp_path / "wrong.yaml").write_text("num_gpu: 1")
    with pytest.raises(ConfigError, match="Did you mean 'num_gpus'"):
        manager.load_config(tmp_path / "wrong.yaml")
    (tmp_path / "wrong.yaml").write_text("num_gpus: 1\nnum_gpus: 2")
    with pytest.raises(ConfigError, match="num_gpus"):
        manager.load_config(tmp_path / "wrong.yaml")
    with pytest.raises(ConfigError, match="Did you mean 'fast'"):
        manager.get_template("fasst")


@pytest.mark.promise("C4")
def test_devices(two_gpus):
    manager = DeviceManager()
    first, second = manager.get_available_devices()
    assert (first.device, second.device, first.name) == ("cuda:0", "cuda:1", "NVIDIA H200")
    assert (second.power, second.temperature) == (400.0, 60) and second.free == second.total - second.used
    with manager.watch(0.01) as seen:
        time.sleep(0.1)
    assert len(seen.samples) > 3
    assert seen.peaks["cuda:1"] == seen.samples[-1][1].used > seen.samples[0][1].used


def test_a_machine_without_gpus(caplog):
    caplog.set_level("INFO", "pantheraml")
    (host,) = DeviceManager().get_available_devices()
    assert host.device == "cpu" and 0 < host.used < host.total
    manager = MemoryManager()
    assert manager.get_memory_stats()["cpu"]["rss"] > 0.1
    manager.print_memory_stats()
    manager.clear_cache()
    assert "rss" in caplog.text
