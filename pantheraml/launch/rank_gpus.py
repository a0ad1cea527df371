"""Which GPUs of its machine a rank has: one, or the several of a pipeline. Loads no torch."""

from __future__ import annotations

from pantheraml.config.multi_gpu import MultiGPUConfig
from pantheraml.errors import ConfigError
from pantheraml.launch.environment import LaunchEnvironment

_VISIBLE = "CUDA_VISIBLE_DEVICES says which GPUs are visible"


def gpus_of_each(config: MultiGPUConfig, gpus: int) -> int:
    """How many GPUs each rank has, of ``gpus`` that are visible; where there are none, how many stages share the CPU.

    Raises:
        ConfigError: a pipeline over fewer than two GPUs, or over more than are visible.
    """
    if config.way != "pipeline":
        return 1
    degree = gpus if isinstance(config.pipeline_parallel, bool) else config.pipeline_parallel
    if gpus == 0 and degree == 0:
        raise ConfigError(
            got=f"A pipeline over all GPUs was asked for ({_asked(config)}), and there is no GPU.",
            need="Without GPUs, the stages of a pipeline share the CPU, and their number has to be said.",
            fix="Write pipeline_parallel=2 to try the script, or leave it out.",
        )
    if degree < 2 or gpus == 1:
        raise ConfigError(
            got=f"A pipeline was asked for ({_asked(config)}), over {1 if gpus else degree} GPU.",
            need="It has layers of one model on two GPUs or more.",
            fix=f"Leave it out, or make more GPUs visible: {_VISIBLE}.",
        )
    if 0 < gpus < degree:
        raise ConfigError(
            got=f"Pipelines of {degree} GPUs were asked for ({_asked(config)}), and {gpus} GPUs are visible.",
            need=f"Each rank is a pipeline over GPUs of its machine: {_degrees(gpus)}.",
            fix=f"Write pipeline_parallel={gpus}; {_VISIBLE}.",
        )
    return degree


def num_ranks(config: MultiGPUConfig, gpus: int) -> int:
    """Ranks of a machine, of which ``gpus`` are visible.

    Raises:
        ConfigError: more ranks were asked for than there are GPUs for, or pipelines that leave some over.
    """
    each = gpus_of_each(config, gpus)
    if config.num_processes is None:
        if gpus % each:
            raise ConfigError(
                got=f"Pipelines of {each} GPUs were asked for ({_asked(config)}), and {gpus} GPUs are visible.",
                need=f"Pipelines have all of them, in equal numbers: {_degrees(gpus)}.",
                fix=f"Write one of these, or num_processes={gpus // each} to leave {gpus % each} idle; {_VISIBLE}.",
            )
        return whole_ranks(config, gpus)
    if 0 < gpus < config.num_processes * each:
        has = "a GPU" if each == 1 else f"{each} GPUs"
        raise ConfigError(
            got=f"MultiGPUConfig(num_processes={config.num_processes}) was given, and {gpus} GPUs are visible.",
            need=f"Each rank has {has} of its own.",
            fix=f"Write num_processes={gpus // each}, or leave it out; {_VISIBLE}.",
        )
    return config.num_processes


def whole_ranks(config: MultiGPUConfig, gpus: int) -> int:
    """As many ranks as ``gpus`` are enough for, where some may be left over; at least one, which says what is wrong."""
    asked = config.pipeline_parallel
    each = 1 if config.way != "pipeline" else gpus if isinstance(asked, bool) else asked
    return max(1, gpus // max(1, each))


def check_ranks(config: MultiGPUConfig, environment: LaunchEnvironment, gpus: int) -> None:
    """Refuse more ranks on this machine than ``gpus`` that they see are enough for, where each has several.

    Raises:
        ConfigError: with what to type.
    """
    each, ranks = gpus_of_each(config, gpus), environment.local_world_size
    if each == 1 or gpus == 0 or ranks * each <= gpus:
        return
    most = gpus // each
    starts = f"python FILE starts {most} rank{'s' * (most > 1)}"
    types = {
        "torchrun": f"torchrun --nproc_per_node={most} FILE",
        "accelerate": f"accelerate launch --num_processes={most} FILE",
        "slurm-gpu": f"srun --ntasks-per-node=1 --gpus-per-node={gpus} python FILE",
    }
    typed = types.get(environment.kind)
    raise ConfigError(
        got=f"A pipeline of {each} GPUs was asked for ({_asked(config)}) by one of {ranks} ranks on this machine, "
        f"which see {gpus} GPUs.",
        need=f"Each rank has the {each} GPUs of its pipeline to itself, so there is room for {most}.",
        fix=f"Type {typed}; {starts}." if typed else f"Write num_processes={most}, or leave it out.",
    )


def gpus_of_rank(config: MultiGPUConfig, local_rank: int, gpus: int) -> range:
    """Indices of a rank's GPUs among ``gpus`` that it sees, which may be its own alone; empty where there are none."""
    if gpus == 0:
        return range(0)
    each = gpus_of_each(config, gpus)
    first = local_rank * each % gpus
    return range(first, first + each)


def _asked(config: MultiGPUConfig) -> str:
    degree = config.pipeline_parallel
    return 'strategy="pipeline"' if degree is False else f"pipeline_parallel={degree!r}"


def _degrees(gpus: int) -> str:
    """What divides ``gpus``, as words."""
    *most, last = [str(degree) for degree in range(2, gpus + 1) if gpus % degree == 0]
    return f"pipeline_parallel is {', '.join(most)}{' or ' * bool(most)}{last} here"
