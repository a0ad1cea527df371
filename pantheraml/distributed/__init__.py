"""Ranks that work together: the process group, and what strategies need of it."""
