"""``python -m pantheraml.train --config run.yaml key=value`` is ``pantheraml train``.

The run file may also be named by the environment variable ``CONFIG_PATH``.
"""

from __future__ import annotations

import sys

from pantheraml.cli.app import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
