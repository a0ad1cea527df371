"""One run of GRPO on one or two GPUs; rank 0 writes every figure of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model: str, folder: str, ranks: int, settings: dict) -> None:
    from pantheraml import MultiGPUConfig, setup_multi_gpu

    config = {"num_processes": ranks, **settings}
    setup_multi_gpu(MultiGPUConfig(**config))
    from pantheraml import is_main_process
    from tests.training.grpo_runs import figures

    found = figures(
        model, folder, config, per_device_train_batch_size=6 // ranks, steps_per_generation=2, beta=0.04,
        loading={"dtype": "float32"}, use_cpu=False,
    )  # fmt: skip
    if is_main_process():
        Path(folder, "figures.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
