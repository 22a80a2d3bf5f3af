"""``gputrain diagnose``: runs a training program in several ways, says what fails and what to change."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gputrain.cli.arguments import (
    EXIT_FAILED,
    EXIT_NOTHING_RAN,
    EXIT_OK,
    Parser,
    UsageError,
    add_deadlines,
    device,
    file,
    ranks,
)

if TYPE_CHECKING:
    from pytest_gputrain.diagnose.phases import Given
    from pytest_gputrain.diagnose.programs import Program
    from pytest_gputrain.diagnose.report import Report
    from pytest_gputrain.diagnose.run import Settings

TIMEOUT, STALL = 120.0, 30.0
PHASES = (
    "ddp_one_step, ddp_steps, ddp_whole, gloo, branches, static_graph, find_unused, fsdp2, single, "
    "checkpointing, gradient_parity"
)


def declare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = commands.add_parser(
        "diagnose",
        help="find out why a training program hangs, fails or is slow",
        usage="gputrain diagnose [options] (SCRIPT | -m MODULE) [argument ...], or --case MODULE:ATTR",
        description="Run a training program in several ways, each with a deadline of its own, and say what "
        "is the matter, on which rank and line, and what to change. The program is not modified.",
        epilog="Exit codes: 0 every phase that accuses passed, 1 one did not, 2 bad input, 5 nothing ran, "
        "130 interrupted (what is known is written).",
    )
    parser.set_defaults(run=_diagnose)
    add = parser.add_argument
    add("-m", dest="module", action="store_true", help="SCRIPT is a module, as for python -m")
    add("--case", metavar="MODULE:ATTR", help="a training case instead of a script")
    add("--nproc", type=ranks, default=2, metavar="N", help="number of ranks (default: 2)")
    add(
        "--out",
        metavar="DIR",
        help="folder of the report, empty or new (default: one below gputrain-diagnose/)",
    )
    add_deadlines(parser)
    add("--steps", type=_steps, default=3, metavar="K", help="optimizer steps a phase (default: 3)")
    add("--phases", metavar="A,B", help=f"run only these, of {PHASES}")
    add("--branches", metavar="A,B", help="branches of the model, each to be run alone")
    add("--layers", type=_layers, metavar="A:B", help="layers to checkpoint, half open (default: all)")
    add("--device", type=device, default="cpu", help="cpu (gloo, the default) or cuda")
    add("--share-gpu", action="store_true", help="with cuda and a case: ranks that outnumber GPUs share them")
    add("--json", type=file, metavar="FILE", help="also write report.json there")
    add("script", nargs="?", metavar="SCRIPT", help="the training script; what follows it is its own")
    add("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    assert isinstance(parser, Parser)
    parser.set_defaults(ours=parser.names())


def _steps(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 2:  # one step hides an unused parameter
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a number of steps from 2 up")
    return int(text)


def _layers(text: str) -> tuple[int, int | None]:
    start, colon, end = (part.strip() for part in text.partition(":"))
    whole = all(not part or part.isdecimal() for part in (start, end))
    if not colon or not whole or (end and int(start or 0) >= int(end)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not legal; give start:end with start below end, half open, such as 0:4, 2: or :"
        )
    return int(start or 0), int(end) if end else None


def _diagnose(options: argparse.Namespace) -> int:
    from pytest_gputrain.diagnose.phases import plan
    from pytest_gputrain.diagnose.run import Plan

    chosen = _chosen(options.phases)
    program = _program(options)
    out = _checked_folder(options.out, program.name)
    settings = _settings(options, out)
    given = _given(options, program, settings)
    _make(out)
    phases = plan(given, chosen)
    _warn_of_ours_behind_the_script(options)
    _tell(f"gputrain diagnose {program.command}: report in {out}")
    try:
        report = Plan(program, given, phases, settings, tell=_tell).run()
    except KeyboardInterrupt:
        _tell(f"interrupted; what is known is in {out}/SUMMARY.md")
        raise
    if options.json is not None:
        options.json.write_text(json.dumps(report.document(), indent=2) + "\n", encoding="utf-8")
    return _finish(report, out)


def _warn_of_ours_behind_the_script(options: argparse.Namespace) -> None:
    """An option there is the script's. If its text does not have one of that name, it was meant for us."""
    if options.script is None or options.module:
        return
    text = Path(options.script).read_text(errors="replace")
    names = dict.fromkeys(argument.partition("=")[0] for argument in options.arguments)
    ours = [name for name in names if name.startswith("--") and name in options.ours and name not in text]
    if ours:
        print(
            f"gputrain diagnose: {', '.join(ours)} after the script goes to the script; what is meant for "
            "gputrain diagnose stands before it",
            file=sys.stderr,
        )


def _tell(text: str) -> None:
    print(text, flush=True)


def _chosen(text: str | None) -> list[str] | None:
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


def _program(options: argparse.Namespace) -> Program:
    from pytest_gputrain.case import CaseError, load_case
    from pytest_gputrain.diagnose.programs import Case, Script
    from pytest_gputrain.launch import LaunchUsageError
    from pytest_gputrain.launch.request import linux, script_or_module

    if (options.case is None) == (options.script is None):
        given = "both a script and" if options.case else "neither a script nor"
        raise UsageError(f"{given} a case given; give SCRIPT, -m MODULE or --case MODULE:ATTR")
    try:
        linux()
        if options.case is None:
            path = script_or_module(options.script, options.module, way="-m MODULE")
            return Script(path, tuple(options.arguments), options.module)
        cases = load_case(options.case)
    except (CaseError, LaunchUsageError) as error:
        raise UsageError(str(error)) from None
    if len(cases) > 1:
        names = ", ".join(case.name for case in cases)
        raise UsageError(f"--case {options.case} is {len(cases)} cases ({names}); name one of them")
    return Case(cases[0], options.case)


def _settings(options: argparse.Namespace, out: Path) -> Settings:
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


def _given(options: argparse.Namespace, program: Program, settings: Settings) -> Given:
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


def _checked_folder(given: str | None, name: str) -> Path:
    """The folder of the report, not made yet. Raises UsageError where it cannot be."""
    if given is None:
        return Path("gputrain-diagnose") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(given)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {given} is a file; give a folder, new or empty")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {given} is not empty; give a new or an empty folder")
    return out


def _make(out: Path) -> None:
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


def _finish(report: Report, out: Path) -> int:
    _tell(f"\n{report.text()}\n\n{out}/SUMMARY.md")
    if report.verdict == "PASS":
        return EXIT_OK
    return EXIT_NOTHING_RAN if report.verdict == "NOTHING RAN" else EXIT_FAILED
