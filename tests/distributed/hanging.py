"""Ranks that train nothing, and hang as they are told: python hanging.py RANKS HOW OUTPUT SECONDS"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from pantheraml import MultiGPUConfig, all_reduce_scalar, get_rank, setup_multi_gpu
from pantheraml.distributed.process_group import connect_store
from pantheraml.distributed.watchdog import Watchdog


def rows(seconds):
    time.sleep(seconds)  # the row never comes


def collective():
    all_reduce_scalar(1.0)


def work(seconds):
    """Python that moves."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(1000))


def hang(how, alone, output, seconds):
    """What the last rank does in step 4, before all reduce."""
    if how == "sleep":
        rows(2.5 * seconds if alone else 1000)
    if how == "skip":
        started = subprocess.Popen(["sleep", "1000"])
        (output / "child").write_text(str(started.pid))
        threading.Event().wait()  # goes another way
    if how == "locked":
        ctypes.PyDLL(None).sleep(1000)  # Python's lock is held
    if how == "slow":
        time.sleep(0.7 * seconds)
        work(2 * seconds)
        subprocess.run(
            [sys.executable, "-c", f"while __import__('time').process_time() < {1.2 * seconds}: pass"]
        )
    if how == "raise":
        raise ValueError("this rank fails")


def train(ranks, how, output, seconds, watchdog):
    rank = get_rank()
    for step in range(1, 7):
        watchdog.progress(step, "between steps")
        watchdog.progress(step, "computing")
        time.sleep((0.5 if how == "slow" else 0.3) * seconds)
        if step == 4 and rank == ranks - 1:
            hang(how, ranks == 1, output, seconds)
        if step == 4 and how == f"stop{rank}":
            os.kill(os.getpid(), signal.SIGSTOP)
        collective()
        if how == "slow" and step == 4 and rank == 0:
            with watchdog.patient("saving"):
                time.sleep(2 * seconds)


def main(ranks, how, output, seconds):
    setup_multi_gpu(MultiGPUConfig(num_processes=ranks))
    rank = get_rank()
    (output / f"pid{rank}").write_text(str(os.getpid()))
    watchdog = Watchdog(seconds, 30.0, output, rank, ranks, connect_store)
    watchdog.start()
    try:
        train(ranks, how, output, seconds, watchdog)
    except Exception as error:
        watchdog.stop(error)
        if how == "raise":
            time.sleep(2 * seconds)
        raise
    began = time.monotonic()
    watchdog.stop()
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("pantheraml")]
    os.write(1, f"rank {rank} done, {names}, {time.monotonic() - began < 0.5}\n".encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
