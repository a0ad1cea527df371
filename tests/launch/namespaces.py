"""Machines on one machine: network namespaces on a bridge, with host names of their own. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

# Runs a command ("$@" after two words) under a host name and with a hosts file that only it sees. (`ip netns exec`
# would do, but mounts another /sys, and slurmd dies of that.)
_ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    lacking = [tool for tool in ("ip", "nsenter", "unshare", "mount") if shutil.which(tool) is None]
    if os.geteuid() != 0:
        return "network namespaces need root"
    if lacking:
        return f"{' and '.join(lacking)} are not installed"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "this container may not make namespaces"


class Machines:
    """Machines that reach each other by name; gone at the end of the ``with`` block.

    Args:
        folder: for the hosts file.
        addresses: host name -> address, all in one /24; the first machine holds the bridge.
    """

    def __init__(self, folder: Path, addresses: dict[str, str]) -> None:
        self.addresses = addresses
        self._hosts = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        self._hosts.write_text("\n".join(lines) + "\n")

    def __enter__(self) -> Machines:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.addresses:
            subprocess.run(["ip", "netns", "delete", self._space(name)], capture_output=True, check=False)

    def inside(self, name: str, *command: str | Path) -> list[str]:
        """``command`` as it is to be started from here to run on machine ``name``."""
        enter = ["nsenter", f"--net=/run/netns/{self._space(name)}", "unshare", "--uts", "--mount"]
        return [*enter, "sh", "-c", _ENTER, "sh", name, str(self._hosts), *map(str, command)]

    def wire(self, first: str, second: str, interface: str, addresses: tuple[str, str]) -> None:
        """A cable of its own between two machines; ``interface`` is its name at both ends."""
        one, two = self._space(first), self._space(second)
        _ip("-n", one, "link", "add", interface, "type", "veth", "peer", "name", interface, "netns", two)
        for space, address in ((one, addresses[0]), (two, addresses[1])):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", interface)
            _ip("-n", space, "link", "set", interface, "up")

    def _space(self, name: str) -> str:
        return f"test-{os.getpid()}-{name}"

    def _build(self) -> None:
        holder, *others = self.addresses
        for name in self.addresses:
            _ip("netns", "add", self._space(name))
            _ip("-n", self._space(name), "link", "set", "lo", "up")
        center = self._space(holder)
        _ip("-n", center, "link", "add", "bridge0", "type", "bridge")
        self._bring_up(holder, "bridge0")
        for number, name in enumerate(others):
            port = f"port{number}"
            _ip(
                "-n",
                center,
                "link",
                "add",
                port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                self._space(name),
            )
            _ip("-n", center, "link", "set", port, "master", "bridge0", "up")
            self._bring_up(name, "eth0")

    def _bring_up(self, name: str, interface: str) -> None:
        _ip("-n", self._space(name), "address", "add", f"{self.addresses[name]}/24", "dev", interface)
        _ip("-n", self._space(name), "link", "set", interface, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
