"""``gputrain find-batch``: the largest batch size that fits, measured by real steps, or predicted.

A prediction is made where ``--capacity`` names a GPU that is not here, or ``--predict`` asks for one;
everything else runs real training steps, on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pytest_gputrain.cli.arguments import (
    EXIT_FAILED,
    EXIT_OK,
    UsageError,
    add_deadlines,
    add_place,
    folder,
    output_file,
    positive,
)
from pytest_gputrain.cli.find_batch_request import MOST, MOST_ON_CPU, checked_request, chosen_place
from pytest_gputrain.schemas import head

if TYPE_CHECKING:
    from pytest_gputrain.cli.find_batch_answer import Answer
    from pytest_gputrain.cli.find_batch_job import Request
    from pytest_gputrain.cli.find_batch_progress import Progress
    from pytest_gputrain.launch import LaunchResult

TIMEOUT = 3600.0
_PACKAGE = str(Path(__file__).resolve().parents[1])
STDOUT = Path("-")


def declare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = commands.add_parser(
        "find-batch",
        help="find the largest batch size that fits in memory",
        description="Find the largest batch size at which a training case fits in memory: by real training "
        "steps on a GPU of this machine, else on the CPU; or, with --capacity for a GPU that is not here, "
        "predicted from fake tensors.",
        epilog="Exit codes: 0 found, 1 nothing fits or the case failed, 2 bad input, 130 interrupted.",
    )
    parser.set_defaults(run=_find_batch, block_size=None)  # which `branches plan` knows
    add = parser.add_argument
    add("spec", nargs="?", metavar="MODULE:ATTR", help="the training case (default: GPUTRAIN_CASE)")
    add_place(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--predict", action="store_true", help="predict for --capacity; run nothing")
    how.add_argument("--measure", action="store_true", help="run real steps within --capacity, also on a CPU")
    add("--margin", type=_margin, default=0.85, metavar="F", help="part of the memory to use (default: 0.85)")
    add("--min", type=positive, default=1, metavar="N", help="smallest batch size (default: 1)")
    add(
        "--max",
        type=positive,
        metavar="N",
        help=f"largest (default: {MOST}; measured on a CPU {MOST_ON_CPU})",
    )
    add("--multiple-of", type=positive, default=1, metavar="N", help="only multiples of N")
    add("--global-batch", type=positive, metavar="N", help="plan its accumulation too")
    add(
        "--strategy", choices=("model", "exponential"), default="model", help="how to search (default: model)"
    )
    add(
        "--eval-factor",
        type=_factor,
        default=1.0,
        metavar="F",
        help="evaluation's batch by training's; 0: none",
    )
    add("--iterations", type=positive, default=3, metavar="N", help="steps of a probe (default: 3)")
    add("--compiled", action="store_true", help="compile as the case does")
    add("--checkpointing", action="store_true", help="activation checkpointing as the case does it")
    add("--cache-dir", type=folder, metavar="DIR", help="of what was measured (default: GPUTRAIN_CACHE_DIR)")
    add("--no-cache", action="store_true", help="measure again, and keep nothing")
    add_deadlines(parser)
    add("--json", type=_json_file, metavar="FILE", help="also write the result there; - for standard output")
    add("--plot", type=_plot_file, metavar="FILE", help="draw the memory ladder, .png or .svg")


def _margin(text: str) -> float:
    margin = _number(text)
    if not 0 < margin <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not legal; give a part of the memory above 0 and up to 1, such as 0.85"
        )
    return margin


def _factor(text: str) -> float:
    factor = _number(text)
    if not 0 <= factor < 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a factor of 0 (no evaluation) or more")
    return factor


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0  # below everything that is legal here


def _json_file(text: str) -> Path:
    return STDOUT if text == "-" else output_file(text)


def _plot_file(text: str) -> Path:
    from pytest_gputrain.report.ladder_plot import SUFFIXES, missing

    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; give a file that ends in .png or .svg")
    if lack := missing():
        raise argparse.ArgumentTypeError(lack)
    return output_file(text)


def _find_batch(options: argparse.Namespace) -> int:
    out = sys.stderr if options.json == STDOUT else sys.stdout
    answer = search(options, out)
    if answer is None:
        return EXIT_FAILED
    answer = _with_plan(answer, options)
    print(answer.text(), file=out, flush=True)
    _write(answer, options)
    return EXIT_OK if answer.size else EXIT_FAILED


def search(options: argparse.Namespace, out: TextIO) -> Answer | None:
    """Carry out what the subcommand's options ask for, its progress on ``out``.

    An answer of size 0 where nothing fits; None, and told on standard error, where the case's process ended
    otherwise. Raises UsageError.
    """
    from pytest_gputrain.cli.find_batch_progress import Progress
    from pytest_gputrain.launch import LaunchUsageError

    place = chosen_place(options)
    try:
        with tempfile.TemporaryDirectory(prefix="gputrain-find-batch-") as temporary:
            request = checked_request(options, place, Path(temporary) / "progress")
            progress = Progress(Path(request.progress), out, f"{request.spec}: {place.told}")
            return _run(request, options, progress)
    except LaunchUsageError as error:
        raise UsageError(str(error)) from None


def _run(request: Request, options: argparse.Namespace, progress: Progress) -> Answer | None:
    """The answer; None, and told on standard error, where the case's process ended otherwise."""
    from pytest_gputrain.cli.find_batch_answer import Answer
    from pytest_gputrain.cli.find_batch_rank import work
    from pytest_gputrain.launch import Launcher

    with progress:
        result = Launcher()(
            work,
            request,
            world_size=1,
            device="cpu" if request.predict else request.device,
            timeout=options.timeout or TIMEOUT,
            stall=options.stall,
            check=False,
        )
    if not result.passed:
        print(_failed(result, request, progress.last_size), file=sys.stderr, flush=True)
        return None
    found = result.values[0]
    if "usage" in found:
        raise UsageError(found["usage"])
    if "failed" in found:
        print(f"gputrain find-batch: {request.spec}: {found['failed']}", file=sys.stderr, flush=True)
        return None
    return Answer(**found)


def _failed(result: LaunchResult, request: Request, last_size: int | None) -> str:
    """The launch's text, its first line about the case: what it is, and where the search was."""
    from pytest_gputrain.launch import Verdict

    first, _, rest = result.summary().partition("\n")
    if result.verdict is Verdict.FAILED:  # "raised" says it; HUNG, CRASHED and TIMED_OUT need their word
        first = f"{str(result.cause).removeprefix('rank 0 ')}; that is not out of memory"
    probe = "the first probe" if last_size is None else f"the probe after batch size {last_size}"
    return "\n".join([f"gputrain find-batch: {request.spec}: {first}", f"  in {probe}", *_without_ours(rest)])


def _without_ours(text: str) -> Iterator[str]:
    """The lines of a launch's text without this package's frames, and without a folder that is gone."""
    ours = False
    for line in text.splitlines():
        if line.startswith("  File ") or not line.startswith("    "):
            ours = line.startswith((f'  File "{_PACKAGE}', "  artifacts:"))
        if not ours:
            yield line


def _with_plan(answer: Answer, options: argparse.Namespace) -> Answer:
    """With how to come to the wanted global batch."""
    if options.global_batch is None or not answer.size:
        return answer
    from pytest_gputrain.batch.accumulation import plan_accumulation

    plan = plan_accumulation(options.global_batch, answer.size, options.world_size)
    return dataclasses.replace(answer, plan=plan)


def _write(answer: Answer, options: argparse.Namespace) -> None:
    """The files that were asked for."""
    from pytest_gputrain.origin import origin

    if options.json is None and options.plot is None:
        return
    came_from = origin()
    if options.json is not None:
        document = {**head("gputrain.find-batch"), "origin": came_from, **answer.document()}
        text = json.dumps(document, indent=2) + "\n"
        if options.json == STDOUT:
            print(text, end="", flush=True)
        else:
            options.json.write_text(text, encoding="utf-8")
    if options.plot is not None:
        from pytest_gputrain.report.ladder_plot import draw

        draw(answer.picture(_footnote(answer, came_from)), options.plot)


def _footnote(answer: Answer, came_from: dict[str, Any]) -> str:
    how = "fake tensors" if answer.method == "predicted" else "real training steps"
    given = ", capacity given" if answer.given and answer.method == "measured" else ""
    return (
        f"{answer.method}: {how}{given}; torch {came_from['torch']}, {came_from['cpu']}, {came_from['time']}"
    )
