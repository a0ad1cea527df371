"""``pantheraml doctor``: checks of a machine, each with what is wrong and what to type."""
