"""The direct trainer under the module name that the guides import it from."""

from __future__ import annotations

from pantheraml.training.aggregation import AggregationMethod
from pantheraml.training.direct import MultiGPUTrainer

__all__ = ["AggregationMethod", "MultiGPUTrainer"]
