"""torch elastic's agent, which looks at its ranks more closely.

What it does otherwise than torch's:

- a rank that leaves with exit code 0 before its program has ended is a failure, as soon as others go on without it;
- when one rank fails, the others have ten seconds to end (a rank that waits for a GPU hears no signal), and then all
  that the ranks have started ends with them;
- the ranks are started again only where that may help, and as many as there are devices then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous
from torch.distributed.launcher.api import LaunchConfig

from pantheraml.launch.blame import Exit, Outcome, blame
from pantheraml.launch.rank_files import forget_end, read_record
from pantheraml.launch.stopping import read_stop
from pantheraml.log import warn

# Seconds for ranks to end when one has failed; and for others to follow one that left with exit code 0.
_GRACE, _FOLLOW = 10.0, 3.0
# The same where the ranks were asked to stop: they have saved, and tell their trackers so.
_GRACE_TO_STOP = 30.0
_LOOK = 0.1


class RanksAgent(LocalElasticAgent):
    """The agent of the ranks of this machine.

    Args:
        spec: what to start.
        logs: where torch keeps what it notes of the ranks.
        folder: what the ranks share with the agent.
        count: says how many ranks to start when they are started again; None: as many as before.

    Attributes:
        outcome: how the ranks ended, once they have.
    """

    def __init__(
        self, spec: WorkerSpec, logs: LogsSpecs, folder: Path, count: Callable[[], int] | None
    ) -> None:
        super().__init__(spec, logs)
        self._folder, self._count = folder, count
        self._left: dict[int, float] = {}  # when ranks were seen to have left early
        self.outcome = Outcome()

    # torch's methods are wrapped by a decorator without types.
    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # pyright: ignore[reportIncompatibleVariableOverride]
        exits = self._exits(worker_group)
        failed = [rank for rank, one in exits.items() if one.code]
        left = self._left_early(exits, others=len(worker_group.workers) - len(exits), at_once=bool(failed))
        if failed or left:
            stuck = self._end_ranks()
            after = {
                rank: replace(
                    one, ours=rank not in exits and (one.pid in stuck or one.code == -signal.SIGTERM)
                )
                for rank, one in self._exits(worker_group).items()
            }
            self.outcome = blame(after, [*failed, *left][0], left, self._folder)
            if self.outcome.why_not_again is not None or read_stop(self._folder):
                self._remaining_restarts = 0
            return RunResult(WorkerState.FAILED)
        if len(exits) == len(worker_group.workers):
            return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(exits))
        return RunResult(WorkerState.HEALTHY)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        spec = worker_group.spec
        before = spec.local_world_size
        if self._count is not None:
            spec.local_world_size = self._count()
        now = spec.local_world_size
        fewer = "" if before == now else f", {now} instead of {before}"
        number = f"{spec.max_restarts - self._remaining_restarts} of {spec.max_restarts}"
        warn(
            f"{self.outcome.said}; the ranks are started again{fewer} (restart {number}), and go on with the last "
            "whole checkpoint of this run, if it has one."
        )
        forget_end(self._folder)
        self._left, self.outcome = {}, Outcome()
        super()._restart_workers(worker_group)  # pyright: ignore[reportCallIssue, reportUnknownMemberType]

    def _processes(self) -> dict[int, subprocess.Popen[bytes]]:
        """The processes of the ranks, by their number on this machine."""
        handlers = cast(SubprocessContext, self._pcontext).subprocess_handlers
        return {number: cast("subprocess.Popen[bytes]", one.proc) for number, one in handlers.items()}  # pyright: ignore[reportUnknownMemberType]

    def _exits(self, worker_group: WorkerGroup) -> dict[int, Exit]:
        """How ranks have ended, by rank; nothing of those that have not."""
        found: dict[int, Exit] = {}
        processes = self._processes()
        for worker in worker_group.workers:
            code = processes[worker.local_rank].poll()
            if code is not None:
                found[worker.global_rank] = Exit(processes[worker.local_rank].pid, code)
        return found

    def _left_early(self, exits: dict[int, Exit], others: int, at_once: bool) -> set[int]:
        """Ranks that left with exit code 0, but not by the end of their program, while others go on.

        Args:
            exits: of the ranks that have ended.
            others: how many have not.
            at_once: do not give the others time to follow: one of them has failed.
        """
        now = time.monotonic()
        for rank, one in exits.items():
            if one.code == 0 and not read_record(self._folder, rank, one.pid).ended:
                self._left.setdefault(rank, now)
        return {rank for rank, since in self._left.items() if at_once or (others and now - since > _FOLLOW)}

    def _end_ranks(self) -> set[int]:
        """End all ranks, with what they have started; the processes that had to be killed."""
        processes = list(self._processes().values())
        _signal_groups([one.pid for one in processes if one.poll() is None], signal.SIGTERM)
        until = time.monotonic() + (_GRACE_TO_STOP if read_stop(self._folder) else _GRACE)
        while time.monotonic() < until and any(one.poll() is None for one in processes):
            time.sleep(_LOOK)
        stuck = {one.pid for one in processes if one.poll() is None}
        _signal_groups([one.pid for one in processes], signal.SIGKILL)  # a rank leads a group of its own
        for one in processes:
            with suppress(subprocess.TimeoutExpired):  # one that waits for a driver ends when that answers
                one.wait(_GRACE)
        return stuck


def _signal_groups(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)


def run_agent(
    config: LaunchConfig, command: list[str], folder: Path, count: Callable[[], int] | None = None
) -> Outcome:
    """Start ``command`` once for each rank of this machine, and wait until all have ended, for good.

    Args:
        config: how many, where they meet, and how often they may be started again.
        command: program and arguments.
        folder: what the ranks share with the agent.
        count: says how many ranks to start when they are started again; None: as many as before.

    Raises:
        SignalException: this process was sent a signal; the ranks have ended.
    """
    host, _, port = config.rdzv_endpoint.rpartition(":")
    meeting = rendezvous.get_rendezvous_handler(
        RendezvousParameters(
            config.rdzv_backend,
            config.rdzv_endpoint,
            config.run_id,
            config.min_nodes,
            config.max_nodes,
            **config.rdzv_configs,
        )
    )
    is_static = config.rdzv_backend == "static"
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        rdzv_handler=meeting,
        entrypoint=command[0],
        args=tuple(command[1:]),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=host if is_static else None,
        master_port=int(port) if is_static else None,
        numa_options=config.numa_options,
    )
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = config.signals_to_handle
    agent = RanksAgent(spec, cast(LogsSpecs, config.logs_specs), folder, count)
    agent.run()  # pyright: ignore[reportUnknownMemberType]
    meeting.shutdown()
    return agent.outcome
