"""The demonstration run behind ``make demo``."""
