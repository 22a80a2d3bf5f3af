"""The whole plan on a training case, for whoever has one in hand: a test, a notebook."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.diagnose.phases import Given, plan
from pytest_gputrain.diagnose.probe import probe
from pytest_gputrain.diagnose.programs import Case
from pytest_gputrain.diagnose.report import Report
from pytest_gputrain.diagnose.run import Plan, Settings
from pytest_gputrain.launch import LaunchDefaults


def diagnose_case(case: TrainingCase, out: Path, launch: LaunchDefaults, *, ranks: int = 2) -> Report:
    """Run every phase; ``out`` is made. Raises ProbeError for a case that cannot be launched at all."""
    out.mkdir(parents=True, exist_ok=True)
    program, settings = Case(case), Settings(out=out, launch=launch)
    with tempfile.TemporaryDirectory(prefix="gputrain-probe-") as folder:
        known = probe(program, settings.launcher, Path(folder))
    given = Given(
        "case",
        backend="nccl" if launch.device == "cuda" else "gloo",
        ranks=ranks,
        branches=known.branches,
        checkpointing=case.set_checkpointing is not None,
    )
    return Plan(program, given, plan(given), settings, tell=lambda line: None).run()
