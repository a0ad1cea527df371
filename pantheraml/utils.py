"""The managers under the module name that the guides import them from."""

from __future__ import annotations

from pantheraml.hooks.config_manager import ConfigManager
from pantheraml.hooks.device_manager import DeviceManager
from pantheraml.hooks.memory_manager import MemoryManager

__all__ = ["ConfigManager", "DeviceManager", "MemoryManager"]
