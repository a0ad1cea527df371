"""Whether ranks of this machine can meet: a port that can be bound and reached."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from pantheraml.doctor.check import Check
from pantheraml.doctor.finding import Finding
from pantheraml.errors import first_line

NAME = "port"
# Where ranks of one machine meet, by name, as torch does.
_HOST = "localhost"
_SECONDS = 5.0


@dataclass(frozen=True)
class Facts:
    """What was tried.

    Attributes:
        chosen: MASTER_PORT, if it is set.
        port: that was bound and reached; None if that failed.
        failure: why not, as a clause.
    """

    chosen: str | None
    port: int | None = None
    failure: str = ""


def probe() -> Facts:
    """Bind MASTER_PORT, or any free port, and connect to it."""
    chosen = os.environ.get("MASTER_PORT") or None
    try:
        with socket.create_server(("", int(chosen or 0))) as server:
            server.settimeout(_SECONDS)
            port = int(server.getsockname()[1])
            with socket.create_connection((_HOST, port), timeout=_SECONDS) as caller:
                answering, _ = server.accept()
                with answering:
                    answering.sendall(b"x")
                    caller.recv(1)
    except (OSError, ValueError, OverflowError) as error:
        return Facts(chosen, failure=first_line(error))
    return Facts(chosen, port)


def judge(facts: Facts) -> list[Finding]:
    """One row."""
    if facts.port is not None:
        which = "MASTER_PORT" if facts.chosen else "a free port"
        return [Finding(NAME, "ok", f"{which} ({facts.port}) can be bound and reached")]
    if facts.chosen is not None:
        seen = f"MASTER_PORT={facts.chosen} cannot be used: {facts.failure}"
        return [Finding(NAME, "bad", seen, "Type unset MASTER_PORT: a free port is taken then.")]
    seen = f"no port of {_HOST} can be bound and reached: {facts.failure}"
    return [
        Finding(
            NAME,
            "bad",
            seen,
            f"Type getent hosts {_HOST}; it has to be 127.0.0.1, and no firewall in between.",
        )
    ]


CHECK = Check(NAME, probe, judge, if_it_fails=f"Type getent hosts {_HOST}.", seconds=30)
