"""The exchanges of a pass as another library launches them, counted; a pass once more leaves out what others have seen.

The library is asked by wrapping its own methods, on the objects of a run. torch numbers what is launched in a group of
ranks: so an exchange that came around the methods is noticed, and one that failed after it was launched. With either, a
rank that has failed would stand elsewhere than the others think; it ends with an error then, since they would wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from pantheraml.distributed.strategies.exchange_count import ExchangeCount
from pantheraml.errors import HardwareError

Exchange = Callable[..., Any]


class LaunchedExchanges:
    """The exchanges of a pass in the order in which they are launched.

    Args:
        groups: of ranks that they are launched in.
        device: of what is exchanged.
    """

    def __init__(self, groups: Iterable[dist.ProcessGroup], device: torch.device) -> None:
        self._groups, self._device = list({id(group): group for group in groups}.values()), device
        self._count = ExchangeCount()
        self._before = self._known = 0  # launched before this pass, and by counted methods within it

    def counted(self, exchange: Exchange, left_out: Exchange) -> Exchange:
        """What to put in the place of a method that exchanges.

        Args:
            exchange: the method.
            left_out: does what it does without an exchange, with any answer, where the others have seen it already.
        """

        def exchanged(*given: Any, **settings: Any) -> Any:
            if not self._count.is_new:
                self._count.add()
                return left_out(*given, **settings)
            before = self._launched()
            answer = exchange(*given, **settings)
            self._known += self._launched() - before
            self._count.add()
            return answer

        return exchanged

    def begin(self) -> None:
        """A pass begins, or the one that failed does once more."""
        self._before, self._known = self._launched(), 0
        self._count.begin()

    def end(self) -> None:
        """The pass is over: the next one is a new one."""
        self._count.end()

    def failed(self) -> None:
        """The pass failed on this rank: what it has exchanged is remembered.

        Raises:
            HardwareError: it has exchanged something else, or failed between an exchange and its end.
        """
        launched = self._launched() - self._before
        if launched != self._known:
            raise HardwareError(
                got=f"Memory ran out in a pass in which this rank exchanged {launched} times, {self._known} of them "
                "by the known methods.",
                need="A step is repeated where a rank that fails can leave out what the others have seen.",
                fix="Lower per_device_train_batch_size, or write zero_stage=1.",
            )
        self._count.failed()

    def _launched(self) -> int:
        backends: list[Any] = [group._get_backend(self._device) for group in self._groups]
        return sum(backend._get_sequence_number_for_group() for backend in backends)
