"""Check this machine and what is installed: the same as `pantheraml doctor`.

    python examples/verify_installation.py
    python examples/verify_installation.py --quick --json

The exit code is 0 where nothing is wrong, and 1 where a row is red; each red row says what to type.
"""

import sys

from pantheraml.cli.app import main

main(["doctor", *sys.argv[1:]])
