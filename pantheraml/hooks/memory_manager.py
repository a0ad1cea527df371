"""The guides' ``MemoryManager``: what this process has taken, what a run would take, and giving back what is unused."""

from __future__ import annotations

from pantheraml.devices.memory import format_memory_stats, get_memory_stats
from pantheraml.hooks.planning import choose
from pantheraml.kernels.utils import clear_gpu_cache
from pantheraml.log import say

_GIB = 2**30


class MemoryManager:
    """Memory of the devices of this process, in GiB."""

    def get_memory_stats(self) -> dict[str, dict[str, float]]:
        """Of each GPU that this process uses, or of the CPU without one; see ``pantheraml.devices.memory``."""
        return get_memory_stats()

    def print_memory_stats(self) -> None:
        """Show ``get_memory_stats()`` as a table."""
        say("memory\n" + format_memory_stats(self.get_memory_stats()))

    def clear_cache(self) -> None:
        """Give cached, unused GPU memory back to the driver; nothing without a GPU."""
        clear_gpu_cache()

    def estimate(
        self,
        model_size: str = "7B",
        available_memory: str | None = None,
        num_gpus: int | None = None,
        max_seq_length: int = 2048,
        method: str = "lora",
    ) -> dict[str, float]:
        """What the fullest GPU would take at its peak, by component, in the run that the planner chooses.

        Args:
            model_size: as for ``ConfigManager.get_optimal_config``, like all others.
            available_memory: likewise.
            num_gpus: likewise.
            max_seq_length: likewise.
            method: likewise.

        Returns:
            GiB of ``"weights"``, ``"activations"``, ..., and ``"total"``, which is what has to fit on the card.

        Raises:
            ConfigError: no GPU to plan for, or nothing fits, with what would.
            ModelLoadError: no such model, or one that no family describes.
        """
        _, choice = choose(model_size, available_memory, num_gpus, max_seq_length, method)
        fullest = choice.plan.fullest
        told = {name: size / _GIB for name, size in fullest.parts().items()}
        return {**told, "total": fullest.reserved / _GIB}
