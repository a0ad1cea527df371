"""A run whose rank 1 dies: python restarted.py MODEL OUTPUT. Two ranks, two again, and at last one.

The first time it is killed while it saves step 4; the second time it leaves in step 5.
"""

import json
import os
import signal
import sys
from itertools import chain, repeat
from pathlib import Path

from pantheraml.launch.agent import Ranks, become_agent
from pantheraml.launch.environment import LaunchEnvironment

if not LaunchEnvironment.detect().is_rank:
    become_agent(Ranks(2, max_restarts=2, count=chain([2], repeat(1)).__next__))

from pantheraml import MultiGPUConfig, get_rank
from tests.launch.restarts import build

trainer = build(sys.argv[1], sys.argv[2], MultiGPUConfig())
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
save, step = trainer._save_rng_state, trainer.training_step


def dies_saving(*arguments, **more):
    save(*arguments, **more)
    if trainer.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)


def dies_training(*arguments, **more):
    if trainer.state.global_step == 4:
        os._exit(0)
    return step(*arguments, **more)


if get_rank() == 1 and start == 0:
    trainer._save_rng_state = dies_saving
if get_rank() == 1 and start == 1:
    trainer.training_step = dies_training
trainer.train()
if get_rank() == 0:
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    Path(sys.argv[2], "result.json").write_text(json.dumps([start, trainer.args.world_size, logs]))
