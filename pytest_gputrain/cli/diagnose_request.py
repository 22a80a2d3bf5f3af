"""What ``gputrain diagnose`` is asked for: the program, the phases, the folder of the report."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gputrain.cli.arguments import UsageError
from pytest_gputrain.cli.machines import machines

if TYPE_CHECKING:
    from pytest_gputrain.diagnose.phases import Given
    from pytest_gputrain.diagnose.programs import Program
    from pytest_gputrain.diagnose.run import Settings

TIMEOUT, STALL = 120.0, 30.0


def chosen_phases(text: str | None) -> list[str] | None:
    """The phases asked for; None for all. Raises UsageError for one that there is not."""
    from pytest_gputrain.diagnose.phases import NAMES, unknown_names

    if text is None:
        return None
    names = _list(text)
    unknown = unknown_names(names)
    if unknown or not names:
        named = ", ".join(map(repr, unknown)) or repr(text)
        raise UsageError(f"--phases: {named} is no phase; legal are {', '.join(NAMES)}")
    return names


def _list(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def program_of(options: argparse.Namespace) -> Program:
    """The script or case. Raises UsageError."""
    from pytest_gputrain.case import CaseError, load_case
    from pytest_gputrain.diagnose.programs import Case, Script
    from pytest_gputrain.launch import LaunchUsageError
    from pytest_gputrain.launch.request import linux, script_or_module

    if (options.case is None) == (options.script is None):
        given = "both a script and" if options.case else "neither a script nor"
        raise UsageError(f"{given} a case given; give SCRIPT, -m MODULE or --case MODULE:ATTR")
    nnodes, where = machines(options)
    if options.nproc * nnodes < 2:
        raise UsageError(f"--nproc {options.nproc} is not legal; give a number of ranks from 2 up")
    try:
        linux()
        if options.case is None:
            path = script_or_module(options.script, options.module, way="-m MODULE")
            return Script(path, tuple(options.arguments), options.module, options.nproc, nnodes, where)
        if nnodes > 1:
            raise UsageError(
                f"--case runs on one machine, and there are {nnodes} nodes; give a script, or --nnodes 1"
            )
        cases = load_case(options.case)
    except (CaseError, LaunchUsageError) as error:
        raise UsageError(str(error)) from None
    if len(cases) > 1:
        names = ", ".join(case.name for case in cases)
        raise UsageError(f"--case {options.case} is {len(cases)} cases ({names}); name one of them")
    return Case(cases[0], options.case)


def settings_of(options: argparse.Namespace, out: Path) -> Settings:
    """How it is launched. Raises UsageError where GPUs are lacking."""
    from pytest_gputrain.devices.sharing import lacking
    from pytest_gputrain.diagnose.run import Settings
    from pytest_gputrain.launch import LaunchDefaults

    # A script chooses its device itself: only a case can be told to share.
    share = options.share_gpu and options.case is not None
    if options.device == "cuda" and (lack := lacking(options.nproc, share_gpu=share)):
        raise UsageError(f"--device cuda --nproc {options.nproc} {lack}; give --device cpu or fewer ranks")
    launch = LaunchDefaults(
        timeout=options.timeout or TIMEOUT,
        stall=options.stall or STALL,
        device=options.device,
        share_gpu=share,
    )
    return Settings(out=out, launch=launch)


def given_of(options: argparse.Namespace, program: Program, settings: Settings) -> Given:
    """What the plan is for. Raises UsageError for what the model does not have."""
    from pytest_gputrain.diagnose.phases import Given
    from pytest_gputrain.diagnose.probe import ProbeError, probe
    from pytest_gputrain.diagnose.programs import Case

    branches = tuple(_list(options.branches or ""))
    try:
        with tempfile.TemporaryDirectory(prefix="gputrain-probe-") as folder:
            known = probe(program, settings.launcher, Path(folder), branches=branches, layers=options.layers)
    except ProbeError as error:
        raise UsageError(str(error)) from None
    own = isinstance(program, Case)
    return Given(
        kind=program.kind,
        backend="nccl" if settings.device == "cuda" else "gloo",
        ranks=options.nproc,
        steps=options.steps,
        branches=branches or known.branches,
        layers=options.layers,
        checkpointing=isinstance(program, Case) and program.case.set_checkpointing is not None,
        fsdp2="" if own else "a script wraps its model itself; give a case to try it",
    )


def checked_folder(given: str | None, name: str) -> Path:
    """The folder of the report, not made yet. Raises UsageError where it cannot be."""
    if given is None:
        return Path("gputrain-diagnose") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(given)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {given} is a file; give a folder, new or empty")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {given} is not empty; give a new or an empty folder")
    return out


def make_folder(out: Path) -> None:
    """Makes the folder, and tries to write there: only an attempt tells."""
    missing = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return
    except OSError as error:
        for path in missing:  # nothing is left behind
            if path.is_dir():
                path.rmdir()
        raise UsageError(f"--out {out} cannot be written ({error.strerror}); give another folder") from None
