"""Looks at a program's model before the plan: a range or a branch that it does not have is bad input.

A case's model is built in a rank of its own. A script has to train a step to show its model, so it is only
asked when there is something to check.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gputrain.diagnose import environment, readings
from pytest_gputrain.diagnose.phases import ALONE
from pytest_gputrain.diagnose.programs import Case, Program
from pytest_gputrain.diagnose.records import Phase
from pytest_gputrain.launch import LaunchUsageError

if TYPE_CHECKING:
    from pytest_gputrain.launch import Launcher


class ProbeError(ValueError):
    """What was asked for is not in the model; one line."""


@dataclass(frozen=True)
class Known:
    """layers: how many the model has; None where it could not be seen (the plan will say why)."""

    layers: int | None = None
    branches: tuple[str, ...] = ()


def probe(
    program: Program,
    launcher: Callable[[Path], Launcher],
    folder: Path,
    *,
    branches: Sequence[str] = (),
    layers: tuple[int, int | None] | None = None,
) -> Known:
    """What the model has. Raises ProbeError when ``branches`` or ``layers`` are not in it."""
    if not isinstance(program, Case) and not branches and layers is None:
        return Known()
    starter = launcher(folder / "launch")
    on_top = environment.added(os.environ, ALONE, device=starter.defaults.device)
    on_top["GPUTRAIN_STUDY"] = str(folder.absolute())
    step = Phase("probe", "one step, to see the model", "single", 1, 1)
    try:
        program.launch(step, starter, on_top)
    except LaunchUsageError as error:
        raise ProbeError(str(error)) from None
    facts = next(iter(readings.facts(folder).values()), {})
    if "layers" not in facts:
        return Known(branches=tuple(branches))
    known = Known(int(facts["layers"]), tuple(facts.get("branches", ())))
    _check(known, branches, layers)
    return replace(known, branches=tuple(branches) or known.branches)


def _check(known: Known, branches: Sequence[str], layers: tuple[int, int | None] | None) -> None:
    lacking = [name for name in branches if name not in known.branches]
    if lacking:
        legal = f"it has {', '.join(known.branches)}" if known.branches else (
            "it declares none (a module with `branches` and force_branch(name))"
        )  # fmt: skip
        raise ProbeError(f"--branches: the model has no branch {lacking[0]!r}; {legal}")
    if layers is None:
        return
    start, end = layers
    asked = f"{start}:{'' if end is None else end}"
    if not known.layers:
        raise ProbeError(f"--layers {asked}: the model has no list of layers; leave --layers out")
    if start >= known.layers or (end or 0) > known.layers:
        raise ProbeError(
            f"--layers {asked}: the model has {known.layers} layers; give a range within 0:{known.layers}"
        )
