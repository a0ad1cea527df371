"""The checks, one a file: a probe that collects facts from the machine, and a judge of facts alone."""
