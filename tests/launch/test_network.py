"""Interfaces and ports on one machine; ``test_namespaces`` has two."""

from __future__ import annotations

import socket

import pytest

from pantheraml.errors import ConfigError
from pantheraml.launch.network import interface_of, socket_variables, source_address
from tests.distributed.ranks import free_port


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.1.1"])
def test_one_machine_needs_no_interface(host):
    assert socket_variables(host, {}) == {}


def test_the_source_of_loopback_is_loopback():
    assert source_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


def test_a_host_that_nobody_knows():
    with pytest.raises(ConfigError, match=r"'no\.such\.host\.invalid' has no address"):
        socket_variables("no.such.host.invalid", {})


def test_a_free_port_is_free():
    ports = {free_port() for _ in range(5)}
    for port in ports:
        with socket.socket() as server:
            server.bind(("", port))
