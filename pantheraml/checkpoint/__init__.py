"""Saving that leaves nothing half-written."""
