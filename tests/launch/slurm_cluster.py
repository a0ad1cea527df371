"""A real SLURM of two nodes on one machine: a controller and two slurmd, each node with two GPUs that are not there.

To install it on Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

from tests.launch import namespaces
from tests.launch.namespaces import Machines

NODES = ("node1", "node2")
GPUS = 2
_ADDRESSES = {"control": "10.90.0.100", "node1": "10.90.0.1", "node2": "10.90.0.2"}
_DAEMONS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "salloc", "scontrol", "sinfo")
_START_SECONDS = 30
# /dev/null's numbers: a device file that stands for a GPU.
_NULL = os.makedev(1, 3)

_CONFIG = """\
ClusterName=test
SlurmctldHost=control({control})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
LaunchParameters=use_interactive_step
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
NodeName=node1 NodeAddr={node1} CPUs=4 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeAddr={node2} CPUs=4 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why there can be no cluster here; empty if there can."""
    lacking = [name for name in _DAEMONS if shutil.which(name) is None]
    return namespaces.why_not() or (f"SLURM is not installed: no {', '.join(lacking)}" if lacking else "")


class Cluster:
    """The cluster; gone at the end of the ``with`` block.

    Args:
        folder: empty, with a short path (it holds sockets).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._machines = Machines(folder, _ADDRESSES)
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        for index in range(GPUS):
            os.mknod(folder / f"gpu{index}", stat.S_IFCHR | 0o666, _NULL)
        (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder, **_ADDRESSES))
        (folder / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")

    def __enter__(self) -> Cluster:
        self._machines.__enter__()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        self._machines.__exit__()

    def run(
        self,
        *command: str | Path,
        variables: dict[str, str] | None = None,
        seconds: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command where users log in."""
        return subprocess.run(
            self._machines.inside("control", *command),
            stdin=subprocess.DEVNULL,
            env=self._variables() | (variables or {}),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def submit(self, *words: str | Path, variables: dict[str, str] | None = None) -> str:
        """Give ``words`` to sbatch; the number of the job."""
        done = self.run("sbatch", "--parsable", *words, variables=variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def states(self, job: str) -> set[str]:
        """Of a job, or of all jobs of an array."""
        return set(re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", job).stdout))

    def end(self, job: str, seconds: float = 200) -> set[str]:
        """The states of a job when it has come to its end. ``sbatch --wait`` looks ever more seldom."""
        latest = time.monotonic() + seconds
        while (states := self.states(job)) & {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}:
            assert time.monotonic() < latest, states
            time.sleep(0.2)
        return states

    def type(self, typed: str, *command: str | Path, seconds: float = 60) -> str:
        """Run a command that opens a shell where users log in, type into it, and return what is shown.

        The keyboard stays there until the command ends: a shell that meets its end first may not run what was typed.
        SHELL is what a login sets and the daemons of a CI do not; SLURM opens no shell without it.
        """
        screen = self._folder / "screen"
        with (
            screen.open("wb") as shown,
            subprocess.Popen(
                self._machines.inside("control", *command),
                stdin=subprocess.PIPE,
                stdout=shown,
                stderr=shown,
                env=self._variables() | {"SHELL": "/bin/sh"},
                text=True,
            ) as process,
        ):
            assert process.stdin is not None
            process.stdin.write(typed)
            process.stdin.flush()
            try:
                process.wait(seconds)
            finally:
                process.kill()
        return screen.read_text(errors="replace")

    def _variables(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return kept | {"SLURM_CONF": str(self._folder / "slurm.conf")}

    def _start(self) -> None:
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {"socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files = [f"--{option}={self._folder / name}" for option, name in names.items()]
        self._daemon("munge", ["munged", "--foreground", "--force", f"--key-file={key}", *files])
        self._wait("munge", lambda: (self._folder / "munge.socket").exists())
        self._daemon("control", self._machines.inside("control", "slurmctld", "-D", "-i"))
        for node in NODES:
            self._daemon(node, self._machines.inside(node, "slurmd", "-D", "-N", node))
        self._wait("SLURM", self._is_idle)

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self._variables(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

    def _is_idle(self) -> bool:
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split() == ["idle"] * len(
            NODES
        )

    def _wait(self, what: str, is_there) -> None:
        end = time.monotonic() + _START_SECONDS
        while not is_there():
            if time.monotonic() > end:
                logs = "\n".join(
                    f"{log.name}: {log.read_text()[-2000:]}" for log in self._folder.glob("*.log")
                )
                raise TimeoutError(f"{what} did not start.\n{logs}")
            time.sleep(0.1)
