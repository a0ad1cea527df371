"""By which interface of this machine another one is reached."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import psutil

_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface_to(host: str) -> str | None:
    """The interface whose address packets to ``host`` would carry; None for this machine itself, or without a route."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # nothing is sent
            address = probe.getsockname()[0]
    except OSError:
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return None if address.startswith("127.") else name
    return None


def socket_variables(host: str, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """What tells gloo and NCCL which interface leads to ``host``; nothing that the user has set."""
    given = os.environ if variables is None else variables
    name = interface_to(host)
    return {} if name is None else {key: name for key in _VARIABLES if key not in given}
