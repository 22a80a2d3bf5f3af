"""``gputrain report``: the report of a folder made again, two compared, several merged, nights beside it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gputrain.cli.arguments import EXIT_FAILED, EXIT_NOTHING_RAN, EXIT_OK, UsageError

if TYPE_CHECKING:
    from pytest_gputrain.report.compare import Comparison
    from pytest_gputrain.report.model import Report
    from pytest_gputrain.report.nights import Night


def declare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    report = commands.add_parser(
        "report",
        help="make, merge and compare the reports of test sessions",
        description="Make the report of a folder from its records, also of a session that was killed: "
        "report.json, summary.md, index.html. With two folders, OLD and NEW, NEW's says what got worse.",
        epilog="Exit codes: 0 passed, 1 failed, incomplete, interrupted or worse than OLD, 2 bad input, "
        "5 nothing ran.",
    )
    report.set_defaults(run=_report)
    add = report.add_argument
    add("folders", nargs="*", type=Path, metavar="DIR", help="what --gputrain-report or --report wrote")
    add("--merge", nargs="+", type=Path, metavar=("OUT", "DIR"), help="several folders as one report, in OUT")
    add(
        "--nights",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="earlier reports, or folders of them, as a strip in the page (DIR, or the latest of them)",
    )


def _report(options: argparse.Namespace) -> int:
    from pytest_gputrain.report.reading import ReportError

    try:
        return _carried_out(options)
    except ReportError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"the report cannot be written: {error}") from None


def _carried_out(options: argparse.Namespace) -> int:
    from pytest_gputrain.report.nights import read_nights

    nights, unread = read_nights(options.nights) if options.nights else ([], [])
    for line in unread:
        print(f"left out: {line}")
    if options.merge:
        return _merge(options.merge, options.folders, nights)
    folders = list(options.folders)
    if not folders and nights:
        folders = [Path(nights[-1].folder)]
    if not 1 <= len(folders) <= 2:
        raise UsageError(
            f"{len(folders)} folders given; give DIR, OLD NEW, --merge OUT DIR DIR or --nights DIR DIR"
        )
    report, folder = _read(folders[-1]), _folder(folders[-1])
    compared = _compared(folders[0], report, nights) if len(folders) == 2 else None
    return _written(report, folder, compared, nights)


def _merge(given: Sequence[Path], folders: Sequence[Path], nights: Sequence[Night]) -> int:
    from pytest_gputrain.report.join import join

    out, parts = given[0], given[1:]
    if folders or not parts:
        raise UsageError(f"--merge {out}: give OUT and the folders to merge after it: --merge OUT DIR DIR")
    if any(_folder(part).resolve() == out.resolve() for part in parts):
        raise UsageError(f"--merge {out}: OUT is one of the folders to merge; give another one")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--merge {out}: OUT is a file; give a folder, there or not yet there")
    places = [Path(os.path.relpath(_folder(part), out)).as_posix() for part in parts]
    return _written(join([_read(part) for part in parts], places), out, None, nights)


def _folder(path: Path) -> Path:
    """Of a report.json its folder."""
    return path.parent if path.is_file() else path


def _read(path: Path) -> Report:
    """From the records of the folder where it has any, else from its report.json. Raises ReportError."""
    from pytest_gputrain.report.files import load
    from pytest_gputrain.report.gather import gather
    from pytest_gputrain.report.reading import REPORT, ReportError
    from pytest_gputrain.report.records import read_records

    if path.is_dir() and (records := read_records(path)):
        return gather(records)
    if path.is_dir() and not (path / REPORT).exists():
        raise ReportError(f"{path} holds no {REPORT} and no records; give what --gputrain-report wrote")
    return load(path)


def _compared(old: Path, report: Report, nights: Sequence[Night]) -> Comparison:
    from pytest_gputrain.report.compare import compare
    from pytest_gputrain.report.files import to_json

    return compare(to_json(_read(old)), to_json(report), earlier=[night.report for night in nights])


def _written(
    report: Report, folder: Path, compared: Comparison | None, nights: Sequence[Night]
) -> int:  # fmt: skip
    from pytest_gputrain.report.page import PAGE
    from pytest_gputrain.report.summary import line_of
    from pytest_gputrain.report.write import write_all

    report = write_all(report, folder, compared=compared, nights=nights)
    print(f"{folder / PAGE}: {line_of(report)}")
    for one in report.not_run[:5]:
        print(f"  did not run: {one.count}: {one.reason}")
    if compared is not None:
        print(compared)
    if report.verdict == "nothing_ran":
        return EXIT_NOTHING_RAN
    worse = compared is not None and bool(compared.worse)
    return EXIT_OK if report.verdict == "passed" and not worse else EXIT_FAILED
