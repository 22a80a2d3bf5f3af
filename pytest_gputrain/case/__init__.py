"""What a user hands over: a training loop taken apart into named functions. Imports no torch."""

from __future__ import annotations

from pytest_gputrain.case.loading import CaseError, load_case
from pytest_gputrain.case.training_case import LossReduction, TrainingCase

__all__ = ["CaseError", "LossReduction", "TrainingCase", "load_case"]
