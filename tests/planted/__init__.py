"""Small training programs: broken ones with one known defect each, and healthy ones that look suspicious."""

from tests.planted import broken_data, broken_gradients, broken_parallel, healthy_own, healthy_real
from tests.planted.plant import BROKEN, HEALTHY, Plant

__all__ = [
    "BROKEN",
    "HEALTHY",
    "Plant",
    "broken_data",
    "broken_gradients",
    "broken_parallel",
    "healthy_own",
    "healthy_real",
]
