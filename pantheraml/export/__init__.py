"""Adapter, merged weights, hub."""
