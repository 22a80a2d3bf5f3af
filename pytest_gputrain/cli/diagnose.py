"""``gputrain diagnose``: runs a training program in several ways, says what fails and what to change."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gputrain.cli.arguments import (
    EXIT_FAILED,
    EXIT_NOTHING_RAN,
    EXIT_OK,
    EXIT_USAGE,
    Parser,
    UsageError,
    add_deadlines,
    device,
    file,
    positive,
)
from pytest_gputrain.cli.diagnose_request import (
    checked_folder,
    chosen_phases,
    given_of,
    make_folder,
    program_of,
    settings_of,
)
from pytest_gputrain.cli.machines import add_machines, followed, joined

if TYPE_CHECKING:
    from pytest_gputrain.diagnose.programs import Program
    from pytest_gputrain.diagnose.report import Report
    from pytest_gputrain.diagnose.run import Settings

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
    add("--nproc", type=positive, default=2, metavar="N", help="ranks of a machine (default: 2)")
    add_machines(parser)
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
    from pytest_gputrain.diagnose.programs import Script

    chosen = chosen_phases(options.phases)
    program = program_of(options)
    out = checked_folder(options.out, program.name)
    settings = settings_of(options, out)
    if not (isinstance(program, Script) and program.where is not None):
        return _planned(options, program, settings, chosen)[0]
    if (session := joined(program, settings)) is None:
        return EXIT_FAILED
    if not session.leads:
        return followed(session, program, settings)
    code, headline = EXIT_FAILED, "node 0 was stopped before it was done"
    try:
        code, headline = _planned(options, replace(program, session=session), settings, chosen)
    except UsageError as error:
        code, headline = EXIT_USAGE, str(error)
        raise
    finally:
        session.over(code, headline)
    return code


def _planned(
    options: argparse.Namespace, program: Program, settings: Settings, chosen: list[str] | None
) -> tuple[int, str]:
    """Runs the plan; (the exit code, the line to read first)."""
    from pytest_gputrain.diagnose.phases import plan
    from pytest_gputrain.diagnose.run import Plan

    out = settings.out
    given = given_of(options, program, settings)
    make_folder(out)
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
    return _finish(report, out), report.headline


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


def _finish(report: Report, out: Path) -> int:
    _tell(f"\n{report.text()}\n\n{out}/SUMMARY.md")
    if report.verdict == "PASS":
        return EXIT_OK
    return EXIT_NOTHING_RAN if report.verdict == "NOTHING RAN" else EXIT_FAILED
