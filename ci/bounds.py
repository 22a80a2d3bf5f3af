#!/usr/bin/env python3
"""Tries the bounds that pyproject.toml declares: makes an environment at one end of them, and tests in it.

    python3 ci/bounds.py lowest --folder DIR     # every dependency at its lower bound, the oldest Python
    python3 ci/bounds.py newest --folder DIR     # every dependency as new as there is, the newest Python
    python3 ci/bounds.py newest --folder DIR --python python3.12 torch==2.13 -- -k launch

Bounds are read from pyproject.toml, never written here. A requirement given in addition (``torch==2.13``)
goes before them; what follows ``--`` goes to pytest in place of the subset below. torch from PyPI is a CUDA
build: 3 to 6 GB an environment. Ends with a line for docs/compatibility.md. Needs Python 3.11 itself.

Exit codes: 0 all passed; 1 a step failed; 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
EXTRAS = ("opt", "report", "stacks")
# Of the extra `dev` what the tests import; the rest are linters, and rivals of the benchmarks.
TESTS_IMPORT = ("hatchling", "hypothesis", "jsonschema", "pytest-randomly")
# Where another torch, pytest or Python shows: hooks, processes, leases, private names of torch.
SUBSET = (
    "tests/plugin/test_load.py",
    "tests/plugin/test_fixtures.py",
    "tests/plugin/test_leasing.py",
    "tests/devices",
    "tests/launch/test_functions.py",
    "tests/launch/test_scripts.py",
    "tests/launch/test_warm.py",
    "tests/trace/test_traced_ranks.py",
    "tests/compile/test_monitor.py",
    "tests/memory/test_guard.py",
)
SUBSET_MARKS = "not slow and not nightly"


def project() -> dict[str, Any]:
    """The table ``project`` of pyproject.toml."""
    # By name: the types of the oldest Python that is declared do not know it.
    found: dict[str, Any] = importlib.import_module("tomllib").loads((ROOT / "pyproject.toml").read_text())
    return found["project"]  # type: ignore[no-any-return]


def declared() -> dict[str, str]:
    """Lower bounds by package name: dependencies, extras for users, what the tests import."""
    table = project()
    extras = table["optional-dependencies"]
    dev = [text for text in extras["dev"] if re.split(r"[<>=~! ]", text)[0] in TESTS_IMPORT]
    users = [text for name in EXTRAS for text in extras[name]]
    return dict(map(_bound, [*table["dependencies"], *users, *dev]))


def _bound(text: str) -> tuple[str, str]:
    found = re.fullmatch(r"([\w-]+)>=([\d.]+)", text)
    if found is None:
        raise SystemExit(f"ci/bounds.py: {text!r} in pyproject.toml: give one lower bound, NAME>=VERSION")
    return found[1], found[2]


def pythons() -> list[str]:
    """The versions that the classifiers name, oldest first."""
    texts = [text.rpartition(" ")[2] for text in project()["classifiers"] if "Python :: 3." in text]
    return sorted(texts, key=lambda text: int(text.partition(".")[2]))


def requirements(end: str, given: Iterable[str]) -> list[str]:
    """What pip is asked for. Given ones take the place of the declared."""
    mine = {re.split(r"[<>=~!]", text)[0]: text for text in given}
    between = "==" if end == "lowest" else ">="
    others = (f"{name}{between}{low}" for name, low in declared().items() if name not in mine)
    return [*mine.values(), *others]


def make(end: str, python: str, folder: Path, given: Sequence[str]) -> Path:
    """Make the environment where there is none, and return its interpreter."""
    inside = folder / "bin" / "python"
    if not inside.is_file():
        subprocess.run([python, "-m", "venv", str(folder)], check=True, stdin=subprocess.DEVNULL)
    pip = [str(inside), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]
    wanted = [*pip, *(["--upgrade"] if end == "newest" else []), *requirements(end, given)]
    subprocess.run(wanted, check=True, stdin=subprocess.DEVNULL)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True, stdin=subprocess.DEVNULL)
    return inside


def tried(inside: Path, more: Sequence[str]) -> bool:
    """Run the subset and the shipped checks on the reference GPT. Both, whatever the first came to."""
    subset = [*SUBSET, "-m", SUBSET_MARKS, "-n", "2", "-q"]
    check = ["check", "pytest_gputrain.reference.gpt:case"]  # all of them
    steps = [["pytest", *(more or subset)], *([] if more else [["pytest_gputrain", *check]])]
    codes = [
        subprocess.run([str(inside), "-m", *step], cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
        for step in steps
    ]
    return not any(codes)


def versions(inside: Path) -> str:
    """``Python 3.11.7, torch 2.13.0, …`` of an environment."""
    code = (
        "import platform, sys; from importlib.metadata import version as of; "
        "print(', '.join(['Python ' + platform.python_version(), *(f'{n} {of(n)}' for n in sys.argv[1:])]))"
    )
    done = subprocess.run([str(inside), "-c", code, *declared()], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> int:
    ours, pytests = _halves(sys.argv[1:])
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("end", choices=("lowest", "newest"))
    parser.add_argument("requirements", nargs="*", metavar="NAME==VERSION")
    parser.add_argument("--folder", type=Path, required=True, help="of the environment; made where missing")
    parser.add_argument("--python", help="interpreter (default: the oldest, the newest that is declared)")
    options = parser.parse_args(ours)
    python = options.python or f"python{pythons()[0 if options.end == 'lowest' else -1]}"
    if shutil.which(python) is None:
        parser.error(f"{python} is not there; install it, or give another with --python")
    inside = make(options.end, python, options.folder.absolute(), options.requirements)
    print(versions(inside), flush=True)
    passed = tried(inside, pytests)
    print(f"{'passed' if passed else 'FAILED'} with {versions(inside)}")
    return 0 if passed else 1


def _halves(arguments: list[str]) -> tuple[list[str], list[str]]:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


if __name__ == "__main__":
    raise SystemExit(main())
