"""Prints, in one line, what a process finds out about its start; run by the tests in other processes."""

import json
import os
import sys
from dataclasses import asdict

from pantheraml.errors import ConfigError
from pantheraml.launch.environment import LaunchEnvironment

try:
    found = LaunchEnvironment.detect()
    said = asdict(found) | {"is_rank": found.is_rank}
except ConfigError as error:
    said = {"error": str(error)}
said |= {"torch": "torch" in sys.modules, "host": os.uname().nodename}
os.write(1, (json.dumps(said) + "\n").encode())
