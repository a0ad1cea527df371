"""Fused operations, one per file."""
