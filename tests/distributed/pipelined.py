"""What tests of split models on CPUs and on GPUs watch alike."""

from __future__ import annotations

from pantheraml.distributed.pipeline import step


def count_micro_batches(monkeypatch):
    """A list that grows by the number of micro-batches of each pipelined step."""
    found, run = [], step.Pipeline.step

    def counted(self, batches, *arguments, **settings):
        found.append(len(batches))
        return run(self, batches, *arguments, **settings)

    monkeypatch.setattr(step.Pipeline, "step", counted)
    return found
