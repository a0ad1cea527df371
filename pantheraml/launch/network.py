"""By which interface a host is reached, said to gloo and NCCL before they guess.

gloo takes the address that this machine's own name resolves to, often one that other machines cannot reach; NCCL takes
the first interface it likes. The interface of the route to the host where the ranks meet is right for both.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence

from pantheraml.errors import ConfigError

# UDP's discard port: "connecting" to it asks the routing table and sends nothing.
_DISCARD = 9

_VARIABLES = {
    "GLOO_SOCKET_IFNAME": "{}",
    # NCCL takes a name for the beginning of several (eth1, eth10) unless it follows "=".
    "NCCL_SOCKET_IFNAME": "={}",
}


def socket_variables(
    hosts: str | Sequence[str], variables: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The variables that bind gloo and NCCL to the interface of the route to other machines.

    Args:
        hosts: where the ranks meet; or all hosts of a run, the one where they meet first. A host whose name means this
            machine alone (127.0.1.1 for its own name, as Debian writes it) says nothing of the network: the next is
            asked.
        variables: the environment, None that of this process; what is set there is kept.

    Returns:
        What is to be set; empty for ranks of one machine, which need no network.

    Raises:
        ConfigError: a host has no address here, or no route leads to it.
    """
    variables = os.environ if variables is None else variables
    names = (hosts,) if isinstance(hosts, str) else hosts
    sources = (source_address(name) for name in names)
    address = next((one for one in sources if not ipaddress.ip_address(one).is_loopback), None)
    interface = interface_of(address) if address is not None else None
    if interface is None:
        return {}
    return {name: form.format(interface) for name, form in _VARIABLES.items() if not variables.get(name)}


def source_address(host: str) -> str:
    """The address of this machine from which ``host`` is reached; no packet is sent.

    Raises:
        ConfigError: it has no address here, or no route leads to it.
    """
    try:
        found = socket.getaddrinfo(host, _DISCARD, type=socket.SOCK_DGRAM)
    except socket.gaierror as error:
        raise _unreachable(host, "has no address on this machine", error) from None
    fault: OSError = OSError("no address")
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0]).split("%")[0]
        except OSError as error:
            fault = error
    raise _unreachable(host, "cannot be reached from this machine", fault)


def interface_of(address: str) -> str | None:
    """The name of this machine's interface that has an address (``eth0``), or None."""
    import psutil

    wanted = ipaddress.ip_address(address)
    for name, known in psutil.net_if_addrs().items():
        own = [one.address.split("%")[0] for one in known if one.family in (socket.AF_INET, socket.AF_INET6)]
        if any(ipaddress.ip_address(one) == wanted for one in own):
            return name
    return None


def _unreachable(host: str, what: str, error: OSError) -> ConfigError:
    return ConfigError(
        got=f"The host {host!r} {what} ({error.strerror or error}).",
        need="Every machine of a run has to reach the one where the ranks meet.",
        fix=f"Try getent hosts {host} here, or set MASTER_ADDR to an address that all machines know.",
    )
