"""Typed, validated settings; loads no torch."""
