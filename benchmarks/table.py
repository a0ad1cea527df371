"""Rounds of one case made into one line, and lines made into tables."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

# Key of a figure, its heading, and how it is written.
COLUMNS = (
    ("tok_s", "tok/s", "{:,.0f}"),
    ("share", "of limit", "{:.2f}"),
    ("ratio", "ours / this", "{:.2f}"),
    ("ms", "ms", "{:,.1f}"),
    ("first_token_ms", "first token ms", "{:,.1f}"),
    ("allocated_gib", "allocated GiB", "{:.2f}"),
    ("reserved_gib", "reserved GiB", "{:.2f}"),
    ("first_step_s", "first s", "{:.1f}"),
    ("load_s", "load s", "{:.1f}"),
    ("tokens", "tokens", "{:,}"),
    ("loss", "loss", "{:.3f}"),
    ("grad_norm", "grad norm", "{:.3g}"),
)


def merge(rounds: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One outcome from the rounds of one case: medians of numbers, the first of everything else.

    A bad gradient in any round stands for all; otherwise rounds that failed count only if all did.
    """
    outcomes = list(rounds)
    bad = [outcome for outcome in outcomes if outcome["status"] == "bad gradient"]
    good = [outcome for outcome in outcomes if outcome["status"] == "ok"]
    if bad or not good:
        return {**(bad or outcomes)[0], "rounds": 0}
    merged: dict[str, Any] = {}
    for key, value in good[0].items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        merged[key] = median(outcome[key] for outcome in good) if is_number else value
    # Compilers keep what they made on disk, so that only the first round pays for it.
    if "first_step_s" in merged:
        merged["first_step_s"] = max(outcome["first_step_s"] for outcome in good)
    merged["rounds"] = len(good)
    merged["spread"] = spread(outcome["tok_s"] for outcome in good)
    return merged


def spread(values: Iterable[float]) -> float:
    """(largest - smallest) / median."""
    known = list(values)
    return (max(known) - min(known)) / median(known)


def compare(lines: list[dict[str, Any]]) -> None:
    """Add to each line its share of its row's limit, and how many times faster ours is (in place)."""
    limits = {line["row"]: line["tok_s"] for line in lines if line["who"] == "limit" and "tok_s" in line}
    ours = {line["row"]: line["tok_s"] for line in lines if line["who"] == "ours" and "tok_s" in line}
    ours |= {
        line["row"]: line["tok_s"]
        for line in lines
        if line["who"] == "ours-loop" and "tok_s" in line and line["row"] not in ours
    }
    for line in lines:
        if "tok_s" not in line or line["who"] == "limit":
            continue
        if line["row"] in limits:
            line["share"] = line["tok_s"] / limits[line["row"]]
        if line["row"] in ours and not line["who"].startswith("ours"):
            line["ratio"] = ours[line["row"]] / line["tok_s"]


def markdown(lines: list[dict[str, Any]], titles: dict[str, str]) -> str:
    """A Markdown table for each row of work; columns that nobody fills are left out."""
    parts = []
    for row in dict.fromkeys(line["row"] for line in lines):
        mine = [line for line in lines if line["row"] == row]
        shown = [column for column in COLUMNS if any(line.get(column[0]) is not None for line in mine)]
        heads = ["who", "precision", "recompute", *(head for _, head, _ in shown)]
        parts += [f"\n**{row}**: {titles.get(row, '')}\n", _cells(heads), _cells(["---"] * len(heads))]
        parts += [_cells(_line(line, shown)) for line in mine]
    return "\n".join(parts)


def _line(line: dict[str, Any], shown: list[tuple[str, str, str]]) -> list[str]:
    cells = [line["who"], line["precision"], str(line["recompute"])]
    if line["who"] == "limit":
        cells[2] = "-"
    if line["status"] != "ok":
        return [*cells, f"{line['status']}: {line.get('reason', '')}", *[""] * (len(shown) - 1)]
    for key, _, form in shown:
        value = line.get(key)
        cells.append("-" if value is None else form.format(value))
    return cells


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
