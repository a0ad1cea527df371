"""The figures of a logging step as people read them: one line, or on a terminal a line and a row for each GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

Stats = dict[str, dict[str, float]]
# Columns of memory in GiB, by their names in the figures of a device.
_MEMORY = {
    "allocated": "allocated",
    "reserved": "reserved",
    "peak_allocated": "peak",
    "free": "free",
    "used_by_others": "others",
}


def plain_line(step: int, figures: dict[str, float], devices: Stats) -> str:
    """For logs and files, GiB: ``step 10, 12,345 tokens/s, 46 % of the peak, gpu_0 39.7 GiB (reserved 41.0, ...)``."""
    words = _run(step, figures)
    for name, row in _gpus(devices).items():
        rest = (f"{_MEMORY[key]} {row[key]:.1f}" for key in _memory_columns({name: row})[1:])
        text = [f"{name} {row['allocated']:.1f} GiB ({', '.join(rest)})", _power(row), _temperature(row)]
        words.append(" ".join(filter(None, text)))
    return ", ".join(words)


def draw_lines(step: int, figures: dict[str, float], devices: Stats) -> RenderableType:
    """For a terminal, as rich prints it; GiB."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    first, *rest = _run(step, figures)
    title = Text.assemble(("PantheraML: ", "dim"), (first, "bold"), "  ", ("  ".join(rest), "bold cyan"))
    gpus = _gpus(devices)
    if not gpus:
        return title
    columns = {_MEMORY[key]: [_amount(row, key) for row in gpus.values()] for key in _memory_columns(gpus)}
    columns |= {"power": [*map(_power, gpus.values())], "temp": [*map(_temperature, gpus.values())]}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(box=None, header_style="dim", padding=(0, 1), pad_edge=False)
    table.add_column("GiB", style="bold", no_wrap=True)
    for name in columns:
        style = {"peak": "cyan", "others": "yellow"}.get(name)
        table.add_column(name, justify="right", no_wrap=True, style=style)
    for name, *cells in zip(gpus, *columns.values(), strict=True):
        table.add_row(name, *cells)
    return Group(title, Padding(table, (0, 0, 0, 2), expand=False))


def _run(step: int, figures: dict[str, float]) -> list[str]:
    share = [f"{100 * figures['mfu']:.0f} % of the peak"] if "mfu" in figures else []
    return [f"step {step}", f"{figures['tokens_per_second']:,.0f} tokens/s", *share]


def _gpus(devices: Stats) -> Stats:
    return {name: row for name, row in devices.items() if "allocated" in row}


def _memory_columns(gpus: Stats) -> list[str]:
    """Those that some GPU has; what others use, where they do."""
    return [key for key in _MEMORY if any(_amount(row, key) for row in gpus.values())]


def _amount(row: dict[str, float], key: str) -> str:
    is_shown = key in row and (key != "used_by_others" or row[key] > 0)
    return f"{row[key]:.1f}" if is_shown else ""


def _power(row: dict[str, float]) -> str:
    return f"{row['power']:.0f} W" if "power" in row else ""


def _temperature(row: dict[str, float]) -> str:
    return f"{row['temperature']:.0f} °C" if "temperature" in row else ""
