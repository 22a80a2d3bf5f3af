"""Branches of one base run at several batch sizes: planned, written down, run. Imports no torch."""

from __future__ import annotations

from pytest_gputrain.sweep.branches import Branch, BranchPlan, plan_branches
from pytest_gputrain.sweep.configs import check_folder, write_configs
from pytest_gputrain.sweep.manifest import Manifest, PlannedBranch, SweepError, read_manifest

__all__ = [
    "Branch",
    "BranchPlan",
    "Manifest",
    "PlannedBranch",
    "SweepError",
    "check_folder",
    "plan_branches",
    "read_manifest",
    "write_configs",
]
