"""The ``pantheraml`` command: parse, call, print.

Nothing heavy is imported before a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from pantheraml.errors import ConfigError, PantheraMLError
from pantheraml.version import __version__

if TYPE_CHECKING:
    from pantheraml.config.run import RunConfig

DAMAGED = 1
UNHEALTHY = 1
FAILED = 2
INTERRUPTED = 130

app = typer.Typer(
    help="Fine-tune language models.",
    no_args_is_help=True,
    add_completion=False,
    # Its tracebacks show local variables, and with them tokens.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: the words after the program's name; those of the process by default.

    Raises:
        SystemExit: always, with the exit code.
    """
    app(args=arguments, prog_name="pantheraml")


@contextmanager
def _clean_errors(debug: bool) -> Iterator[None]:
    """Print our own errors as text and leave with their exit code.

    They go through ``sys.excepthook``: a rank puts its own in front, which lets the first failure of all ranks through.
    """
    before = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, PantheraMLError) and not debug:
            print(f"pantheraml: {error}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt) and not debug:
            print("pantheraml: interrupted", file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = show
    try:
        yield
    except (PantheraMLError, KeyboardInterrupt) as error:
        if debug:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        raise typer.Exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED) from None
    finally:
        if sys.excepthook is show:
            sys.excepthook = before


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG KEY=VALUE",
            help="A run file, then settings that replace its own, such as trainer.learning_rate=1e-4. "
            "Without a run file, the one in CONFIG_PATH.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The run file, when not given first.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the run, load nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Train as a YAML run file says."""
    with _clean_errors(debug):
        run = _read_settings(settings or [], config)
        if dry_run:
            from pantheraml.cli.describe import describe_run

            print(describe_run(run))
            return
        from pantheraml.cli.train import run_training

        run_training(run)


def _read_settings(words: list[str], config: Path | None) -> RunConfig:
    from pantheraml.config.load import load_config

    if config is None and words and "=" not in words[0]:
        config, words = Path(words[0]), words[1:]
    if config is None and os.environ.get("CONFIG_PATH"):
        config = Path(os.environ["CONFIG_PATH"])
    if config is None:
        raise ConfigError(
            "No run file is given.",
            "Training needs one that names at least the model and the data.",
            "Type `pantheraml train run.yaml`, or set CONFIG_PATH.",
        )
    return load_config(config, words)


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(help="A checkpoint, a saved model or adapter, or a run's output_dir.")
    ],
    load: Annotated[bool, typer.Option("--load", help="Also load every tensor of the weights.")] = False,
    debug: Debug = False,
) -> None:
    """Check that saved files are what was saved. The exit code is 0 if so, 1 if not, 2 if they cannot be checked."""
    with _clean_errors(debug):
        from pantheraml.cli.verify import verify_folder

        is_whole = verify_folder(folder, load=load)
    raise typer.Exit(0 if is_whole else DAMAGED)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model or a saved adapter: a folder or a hub id.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where to.")],
    forms: Annotated[
        list[str] | None,
        typer.Option(
            "--as",
            help="merged_16bit (the default), merged_4bit, or GGUF: f32, bf16, f16, q8_0, q5_1, q5_0, q4_1, q4_0. "
            "May be given several times.",
        ),
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Merge into the base as 4-bit training saw it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter, and save the model for other tools; on the CPU."""
    with _clean_errors(debug):
        from pantheraml.cli.export import export_model

        export_model(model, folder, forms or ["merged_16bit"], load_in_4bit=load_in_4bit)


@app.command()
def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out the training on one rank and several.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Check this machine, and say what is wrong and what to type. The exit code is 0 if nothing is, else 1."""
    with _clean_errors(debug):
        from pantheraml.cli.doctor import run_doctor

        is_healthy = run_doctor(quick=quick, as_json=as_json)
    raise typer.Exit(0 if is_healthy else UNHEALTHY)


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, or a hub id: only its config is fetched.")
    ],
    gpus: Annotated[str, typer.Option(help="Such as 8xH200, A100, or 4x80GB; none needs to be here.")],
    method: Annotated[str, typer.Option(help="lora (16-bit), qlora, fp8 or full.")] = "lora",
    seq: Annotated[int, typer.Option(help="Tokens of the longest row.")] = 2048,
    batch: Annotated[
        int | None, typer.Option(help="Rows of a step for each GPU; about 8,192 tokens by default.")
    ] = None,
    optim: Annotated[str, typer.Option(help="The optimizer, by transformers' name.")] = "adamw_torch_fused",
    strategy: Annotated[
        str | None, typer.Option(help="none, ddp, fsdp, deepspeed, tensor or pipeline; chosen by default.")
    ] = None,
    recompute: Annotated[str, typer.Option(help="auto, true or false.")] = "auto",
    rank: Annotated[int, typer.Option(help="The adapter's r.")] = 16,
    offload: Annotated[
        bool, typer.Option("--offload", help="Allow what is sharded to lie in host memory.")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Train two steps on a GPU of this machine, and plan by their peak."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
    debug: Debug = False,
) -> None:
    """Plan a run: how it is spread over GPUs, and what it takes of each. --probe alone needs weights and a GPU."""
    with _clean_errors(debug):
        from rich.console import Console

        from pantheraml.cli import plan as planning

        options = planning.PlanOptions(
            model, gpus, method, seq, batch, optim, strategy, recompute, rank, offload
        )
        with redirect_stdout(sys.stderr):  # some libraries log there as they are loaded
            request, choice = planning.plan_of(options)
            probed = None
            if probe:
                request, choice, probed = planning.probe_plan(options, request, choice)
        if as_json:
            print(planning.as_json(options, request, choice, probed))
        else:
            Console(highlight=False, soft_wrap=True).print(planning.draw(options, request, choice, probed))


@app.command()
def schema() -> None:
    """Print the JSON schema of run files."""
    import json

    from pantheraml.config.load import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the model to train.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for what the demo writes.")] = Path("demo-output"),
    debug: Debug = False,
) -> None:
    """Train a small model and show what happened."""
    with _clean_errors(debug):
        from pantheraml.demo.run import main as run_demo

        run_demo(model=model, output=output)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)
