"""A training script without the training: started in every way, it says what it found and fails as it is told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

where = Path.cwd()
if "--chdir" in sys.argv:
    os.chdir("/")

from pantheraml.config.multi_gpu import MultiGPUConfig  # noqa: E402
from pantheraml.distributed import process_group as group  # noqa: E402
from pantheraml.launch.ranks import own_record  # noqa: E402

count = int(sys.argv[1])
end = sys.argv[-1]


def tell(text):
    """One write, so that ranks do not mix their lines."""
    os.write(1, f"{text}\n".encode())


def fail_after_three_steps(rank):
    """What a trainer leaves, and a process that the rank has started."""
    child = subprocess.Popen(["sleep", "1000"])
    Path(os.environ["READY"]).joinpath(str(child.pid)).touch()
    signal.signal(signal.SIGTERM, signal.SIG_DFL if rank == 1 else lambda *_: None)
    record = own_record()
    record.begin(0)
    for step in (1, 2, 3):
        record.done(step)
    group.barrier()


def main():
    group.setup_multi_gpu(MultiGPUConfig(num_processes=count))
    rank = group.get_rank()
    total = group.all_reduce_scalar(rank + 1)
    tell(
        f"rank {rank}/{group.get_world_size()} total={total} cwd={where} argv={sys.argv[1:]} flags={sys.flags.optimize}"
    )
    for name in os.environ.get("TELL", "").split():
        tell(f"{name}={os.environ.get(name)} on {rank}")
    if end in ("raise", "exit", "term", "left") and "READY" in os.environ:
        fail_after_three_steps(rank)
    if end == "raise" and rank == 1:
        raise ValueError("the second rank fails")
    if end == "all":
        raise ValueError("every rank fails")
    if end == "exit" and rank == 1:
        sys.exit(3)
    if end == "term" and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if end == "left":
        if rank == 1:
            os._exit(0)
        while True:  # for a GPU, say: no signal is heard, and no error comes
            time.sleep(1)
    if end == "saves":  # as a run that trains: one Ctrl-C is noted, a second one obeyed

        def noted(number, _):
            signal.signal(number, signal.default_int_handler)
            Path(os.environ["READY"]).joinpath(f"{rank} noted").touch()

        signal.signal(signal.SIGINT, noted)
    if end in ("wait", "saves"):
        Path(os.environ["READY"]).joinpath(str(rank)).touch()
        time.sleep(100)
    if end == "first":
        with group.main_process_first():
            tell(f"in {rank}")
            time.sleep(0.3 if rank == 0 else 0)
    if end == "second":
        group.setup_multi_gpu()
        group.cleanup_multi_gpu()
        with group.distributed_context() as config:
            tell(f"again {group.broadcast_object(rank)} {config.backend}")
    group.barrier()


if __name__ == "__main__":
    main()
