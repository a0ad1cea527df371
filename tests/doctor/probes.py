"""Probes that answer, raise, die, leave or hang, in a module that processes import at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pantheraml.errors import ConfigError


def raises():
    raise ConfigError("A thing is there.", "Another is needed.", "Type this.")


def dies():
    print("the driver said goodbye", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves():
    sys.exit(3)


def hangs(file):
    """With a child, as the launcher of ranks has them."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(file).write_text(str(child.pid))
    time.sleep(60)


def tells(number):
    return number + 1, [name for name in ("RANK", "SLURM_STEP_ID", "MASTER_PORT") if name in os.environ]


def sleeps():
    time.sleep(60)


def three(gpus=0):
    return "abc"[gpus:]
