"""The process that starts the ranks of this machine and ends with them: torch elastic's agent, entered by its API.

The ranks run what this process was started with, argument for argument: ``python -u train.py --n 3`` becomes several
``python -u train.py --n 3``, in the folder that it was started in. (torchrun's command line is not used: it takes
options such as ``--n`` of a script for abbreviations of its own.)
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pantheraml.launch.blame import Outcome
from pantheraml.launch.environment import AGENT
from pantheraml.launch.rank_files import HUNG
from pantheraml.launch.stopping import OTHERS, PassedOn, read_stop
from pantheraml.log import say, warn

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig


@dataclass(frozen=True)
class Ranks:
    """Which ranks one agent starts.

    Attributes:
        here: ranks on this machine.
        nodes: machines.
        node_rank: of this one.
        host: of node 0; ``"localhost"`` where there is one node.
        port: where the agents of several nodes meet; 0 takes a free one, for one node.
        run_id: the same on all nodes.
        variables: added to the ranks' environment.
        runs: what each of them runs, as a noun.
        max_restarts: how often they are started again when one of them has died.
        count: says how many to start then; None: as many as before.
    """

    here: int
    nodes: int = 1
    node_rank: int = 0
    host: str = "localhost"
    port: int = 0
    run_id: str = "pantheraml"
    variables: tuple[tuple[str, str], ...] = ()
    runs: str = "script"
    max_restarts: int = 0
    count: Callable[[], int] | None = None


_became_agent = False


def become_agent(ranks: Ranks) -> NoReturn:
    """Start the ranks, wait for them, and leave this process with their exit code.

    Args:
        ranks: what to start.

    Raises:
        SystemExit: always; the code of the first rank that failed, 128 + n where a signal n ended it or us, else 0.
    """
    global _became_agent  # noqa: PLW0603
    if _became_agent:  # the script caught SystemExit and goes on; it must not start ranks for ever
        os._exit(1)
    command = command_again()
    _became_agent = True
    with tempfile.TemporaryDirectory(prefix="pantheraml-") as folder:
        outcome = run_ranks(command, ranks, Path(folder))
    if outcome.said:
        warn(outcome.said)
    sys.stdout.flush()
    sys.exit(outcome.code)


def command_again() -> list[str]:
    """What this process was started with; the working directory is the one of that moment again."""
    arguments = sys.orig_argv[1:]
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is not None and getattr(main, "__spec__", None) is None:
        _return_to_start(file, arguments)
    return [sys.executable, *arguments]


def _return_to_start(file: str, arguments: list[str]) -> None:
    """Undo ``os.chdir`` calls that the script made: its path was relative to where it was started."""
    for word in arguments:
        path = Path(word)
        if not path.is_absolute() and file.endswith(os.sep + os.path.normpath(word)):
            os.chdir(file.removesuffix(os.path.normpath(word)))
            return


def run_ranks(command: list[str], ranks: Ranks, folder: Path) -> Outcome:
    """Start ``command`` once for each rank of this machine, and wait until all have ended.

    Args:
        command: program and arguments.
        ranks: what to start.
        folder: an empty one, which the ranks share; they leave the tracebacks of their failures there.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from pantheraml.launch.elastic import run_agent

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # its lines would stand beside ours and say the same
            logging.getLogger(name).setLevel(logging.CRITICAL)
    say(_describe(ranks))
    with _environment(_variables(ranks, folder)), PassedOn(folder) as requests:
        try:
            outcome = run_agent(_elastic_config(ranks, folder), command, folder, ranks.count)
        except SignalException as error:
            return _ended_by(signal.Signals(error.sigval), folder)
        if not outcome.code:
            return outcome
        if requests.heard is not None:
            return _ended_by(requests.heard, folder)
        stopped = read_stop(folder)
        said = "" if stopped else _describe_end(outcome, ranks.max_restarts)
        return replace(outcome, said=said, stopped=stopped)


def _describe_end(outcome: Outcome, max_restarts: int) -> str:
    again = ""
    if max_restarts:
        why = outcome.why_not_again or f"max_restarts={max_restarts} is used up"
        again = f", and are not started again ({why})"
    return f"{outcome.said}; {'all' if outcome.code == HUNG else 'the other'} ranks were ended{again}."


def _ended_by(sent: signal.Signals, folder: Path) -> Outcome:
    said = f"{sent.name}: all ranks were ended."
    return Outcome(128 + sent, said=said, signal=sent, stopped=read_stop(folder))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Generator[None]:
    """Variables that processes started in the block inherit; afterwards the environment is as before."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _describe(ranks: Ranks) -> str:
    if ranks.nodes == 1:
        return f"starting {ranks.here} ranks of this {ranks.runs}."
    where = f"node {ranks.node_rank} of {ranks.nodes}, met at {ranks.host}:{ranks.port}"
    return f"starting {ranks.here} ranks of this {ranks.runs} on {socket.gethostname()} ({where})."


def _variables(ranks: Ranks, folder: Path) -> dict[str, str]:
    found = {AGENT: str(folder), **dict(ranks.variables)}
    if "OMP_NUM_THREADS" not in os.environ:
        # As many threads as the rank's share of the cores: each would take all of them.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found["OMP_NUM_THREADS"] = str(max(1, cores // ranks.here))
    return found


def _elastic_config(ranks: Ranks, folder: Path) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    several = ranks.nodes > 1
    return LaunchConfig(
        min_nodes=ranks.nodes,
        max_nodes=ranks.nodes,
        nproc_per_node=ranks.here,
        run_id=ranks.run_id,
        # Several nodes know who is first; one node takes any free port.
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=f"{ranks.host}:{ranks.port}",
        rdzv_configs={"rank": ranks.node_rank, "timeout": 900} if several else {"timeout": 900},
        max_restarts=ranks.max_restarts,
        monitor_interval=0.1,
        signals_to_handle=OTHERS,
        # torch would make folders of its own in the one for temporary files, and leave them there.
        logs_specs=DefaultLogsSpecs(str(folder / "torchelastic")),
    )
