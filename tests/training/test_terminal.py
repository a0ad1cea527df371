"""Telemetry on a terminal, a pseudo one, beside the progress bar; and into a pipe."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests import forked, tiny

pty = pytest.importorskip("pty", reason="there are no pseudo terminals")
termios = pytest.importorskip("termios")
SCRIPT = Path(__file__).with_name("terminal_run.py")
TABLE = [
    "  GiB    allocated  reserved  peak  free  others  power   temp",
    "  gpu_0       39.7      41.0  40.1  66.0          690 W  61 °C",
    "  gpu_1       39.7      41.0  40.1  66.0    31.2  690 W  61 °C",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def screen(written):
    """The lines that a terminal shows in the end."""
    lines, at, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.|\n", written, re.DOTALL):
        if part == "\r":
            column = 0
        elif part == "\n":
            at, column = at + 1, 0
            lines += [""] * (at == len(lines))
        elif part == "\x1b[A":
            at = max(at - 1, 0)
        elif part[0] != "\x1b":
            line = lines[at].ljust(column)
            lines[at] = line[:column] + part + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_a_terminal_shows_a_table_above_the_bar(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (50, 100))
    process = forked.start(SCRIPT, model, tmp_path, err=follower)
    os.close(follower)
    written = b""
    try:
        while part := os.read(leader, 65536):
            written += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(leader)
    text = written.decode()
    assert forked.end(process) == 0, text
    assert "\x1b[" in text, "it is coloured"
    lines = screen(text.replace("\r\n", "\n"))
    for step in (2, 4, 6):
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"PantheraML: step {step}  "))
        assert re.fullmatch(rf"PantheraML: step {step}  [\d,]+ tokens/s", lines[at])
        assert lines[at + 1 : at + 4] == TABLE
    (bar,) = (line for line in lines if "/6 [" in line)
    assert re.fullmatch(r"100%\|█+\| 6/6 \[.*\]", bar), "one whole bar, below everything"


def test_a_pipe_gets_plain_lines(model, tmp_path):
    code, _, text = forked.run(SCRIPT, model, tmp_path)
    assert code == 0, text
    figures = r"step (\d), [\d,]+ tokens/s, gpu_0 39\.7 GiB \(reserved 41\.0, peak 40\.1, free 66\.0\) 690 W 61 °C, "
    figures += r"gpu_1 39\.7 GiB \(reserved 41\.0, peak 40\.1, free 66\.0, others 31\.2\) 690 W 61 °C"
    assert re.findall(rf"(?:^|\r)PantheraML: {figures}$", text, re.MULTILINE) == ["2", "4", "6"]
    assert "\x1b[" not in text.replace("\x1b[A", "")
