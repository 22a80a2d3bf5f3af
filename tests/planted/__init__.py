"""Small training programs: broken ones with one known defect each, and healthy ones that look suspicious."""

from tests.planted import (
    broken_accumulation,
    broken_averages,
    broken_data,
    broken_divergence,
    broken_finders,
    broken_gradients,
    broken_hangs,
    broken_late,
    broken_memory,
    healthy_accumulation,
    healthy_data,
    healthy_loops,
    healthy_memory,
    healthy_models,
    healthy_parallel,
    healthy_real,
)
from tests.planted.plant import BROKEN, HEALTHY, Plant

__all__ = [
    "BROKEN",
    "HEALTHY",
    "Plant",
    "broken_accumulation",
    "broken_averages",
    "broken_data",
    "broken_divergence",
    "broken_finders",
    "broken_gradients",
    "broken_hangs",
    "broken_late",
    "broken_memory",
    "healthy_accumulation",
    "healthy_data",
    "healthy_loops",
    "healthy_memory",
    "healthy_models",
    "healthy_parallel",
    "healthy_real",
]
