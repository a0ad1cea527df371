"""The interface follows the route between two machines, for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import namespaces
from tests.launch.namespaces import Machines

pytestmark = pytest.mark.skipif(bool(namespaces.why_not()), reason=namespaces.why_not())

ROOT = Path(__file__).parents[2]
PROBE = (
    "import json, sys; from pantheraml.launch.network import socket_variables\n"
    "from pantheraml.errors import ConfigError\n"
    "try: said = socket_variables(sys.argv[1:])\n"
    "except ConfigError as error: said = str(error)\n"
    "print(json.dumps(said))"
)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    addresses = {"one": "10.91.0.1", "two": "10.91.0.2"}
    with Machines(tmp_path_factory.mktemp("machines"), addresses) as found:
        found.wire("one", "two", "fast0", ("10.92.0.1", "10.92.0.2"))
        yield found


def variables(machines: Machines, machine: str, *hosts: str, **environment: str):
    kept = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
    done = subprocess.run(
        machines.inside(machine, sys.executable, "-c", PROBE, *hosts),
        env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_interface_of_the_route(machines):
    assert variables(machines, "two", "one") == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert variables(machines, "two", "10.92.0.1") == {
        "GLOO_SOCKET_IFNAME": "fast0",
        "NCCL_SOCKET_IFNAME": "=fast0",
    }


def test_the_machine_where_the_ranks_meet_takes_the_same_network(machines):
    assert variables(machines, "one", "one")["GLOO_SOCKET_IFNAME"] == "bridge0"
    assert variables(machines, "one", "10.92.0.1")["GLOO_SOCKET_IFNAME"] == "fast0"


def test_a_name_that_means_loopback_leaves_it_to_the_next(machines):
    assert variables(machines, "two", "127.0.1.1") == {}
    assert variables(machines, "two", "127.0.1.1", "one")["GLOO_SOCKET_IFNAME"] == "eth0"


def test_what_the_user_set_is_kept(machines):
    assert variables(machines, "two", "one", GLOO_SOCKET_IFNAME="mine") == {"NCCL_SOCKET_IFNAME": "=eth0"}


def test_no_route(machines):
    assert "cannot be reached" in variables(machines, "two", "198.51.100.1")
