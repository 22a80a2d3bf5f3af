"""One resolver for every setting: command line > environment > ini, and the origin is kept for every error.

A setting named ``gputrain_stall`` has the environment twin ``GPUTRAIN_STALL`` and the ini twin
``gputrain_stall``; an empty environment variable counts as not set. What a test itself says (a marker, an
argument of the fixture) goes before all of these.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from pytest_gputrain.values import LEGAL_FLAG, LEGAL_SECONDS, parse_flag, parse_seconds
from pytest_gputrain.variables import unknown

COMMAND_LINE = "the command line"
DEFAULT = "default"


# Named tuples in this room: a dataclass takes half a millisecond to make, in every pytest session.
class Settings(NamedTuple):
    """What this session runs with. ``timeout`` and ``stall`` in seconds; ``origins`` by field name."""

    cases: tuple[str, ...]
    report: Path | None
    require_gpus: int | None
    share_gpu: bool
    timeout: float
    stall: float
    stability: bool
    lease_dir: Path | None
    lease_timeout: float
    cache_dir: Path | None
    alone: bool
    origins: Mapping[str, str]


class Setting(NamedTuple):
    """One row of the table below: everything about a setting, said once."""

    field: str
    option: str
    description: str
    legal: str
    parse: Callable[[str, Path], object]
    default: object
    metavar: str | None = None
    kind: Literal["value", "list", "flag"] = "value"

    @property
    def name(self) -> str:
        return "gputrain_" + self.option.removeprefix("--").removeprefix("gputrain-").replace("-", "_")

    @property
    def variable(self) -> str:
        return self.name.upper()

    @property
    def help(self) -> str:
        return f"{self.description} (environment: {self.variable}; ini: {self.name})"


class _Given(NamedTuple):
    """What was written, where, and the folder that relative paths there mean."""

    texts: tuple[str, ...]
    origin: str
    folder: Path


def _parse_case(text: str, folder: Path) -> str:
    # Imported here: a session that gives no case does not pay for it.
    from pytest_gputrain.case.loading import split_spec

    return ":".join(split_spec(text, "case"))


def _parse_folder(text: str, folder: Path) -> Path:
    path = folder / Path(text).expanduser()
    # Its parents too: what is below a file would be accepted here and fail in the first launch.
    if not next(there for there in (path, *path.parents) if os.path.exists(there)).is_dir():
        raise ValueError
    return path


def _parse_count(text: str, folder: Path) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _parse_seconds(text: str, folder: Path) -> float:
    return parse_seconds(text)


def _parse_flag(text: str, folder: Path) -> bool:
    return parse_flag(text)


SETTINGS = (
    Setting(
        "cases",
        "--gputrain-case",
        "training case that the shipped checks run on; may be given several times",
        "MODULE:ATTRIBUTE, such as my_project.cases:gpt",
        _parse_case,
        (),
        "MODULE:ATTR",
        "list",
    ),
    Setting(
        "report",
        "--gputrain-report",
        "folder that keeps the artifacts of every launch, by test",
        "a folder, there or not yet there",
        _parse_folder,
        None,
        "DIR",
    ),
    Setting(
        "require_gpus",
        "--require-gpus",
        "fail the session when fewer than N GPUs are found, or when no test marked gpu ran",
        "a number of GPUs, 0 (none required) or more",
        _parse_count,
        None,
        "N",
    ),
    Setting(
        "share_gpu",
        "--share-gpu",
        "where ranks outnumber GPUs, let them share through gloo instead of skipping the test; such results "
        "are labelled and never count for --require-gpus",
        LEGAL_FLAG,
        _parse_flag,
        False,
        kind="flag",
    ),
    Setting(
        "timeout",
        "--gputrain-timeout",
        "seconds that one launch may take before it is ended, with the stacks of all ranks",
        LEGAL_SECONDS,
        _parse_seconds,
        300.0,
        "SECONDS",
    ),
    Setting(
        "stall",
        "--gputrain-stall",
        "seconds without any progress after which a launch counts as hung",
        LEGAL_SECONDS,
        _parse_seconds,
        60.0,
        "SECONDS",
    ),
    Setting(
        "stability",
        "--stability",
        "run the tests marked stability too; without it, or a -m that names them, they are skipped",
        LEGAL_FLAG,
        _parse_flag,
        False,
        kind="flag",
    ),
    Setting(
        "lease_dir",
        "--gputrain-lease-dir",
        "folder through which the test runs of this host agree on who holds which GPU "
        "(default: gputrain-leases in the temporary folder)",
        "a folder, there or not yet there",
        _parse_folder,
        None,
        "DIR",
    ),
    Setting(
        "lease_timeout",
        "--gputrain-lease-timeout",
        "seconds that a test may wait for its GPUs, none of them its own; then it fails, with who holds them",
        LEGAL_SECONDS,
        _parse_seconds,
        3600.0,
        "SECONDS",
    ),
    Setting(
        "cache_dir",
        "--gputrain-cache-dir",
        "folder that keeps what batch-size discoveries measured (default: pytest-gputrain in the user's "
        "folder for caches)",
        "a folder, there or not yet there",
        _parse_folder,
        None,
        "DIR",
    ),
    Setting(
        "alone",
        "--gputrain-alone",
        "run tests marked distributed as one rank, in pytest's own process: for --pdb and breakpoint()",
        "true or false",
        _parse_flag,
        False,
        kind="flag",
    ),
)

_KEY = pytest.StashKey[Settings]()


def add_options(parser: pytest.Parser) -> None:
    """Declare every setting as an option and its ini twin, with one description for both."""
    group = parser.getgroup("gputrain", "training code on every rank (pytest-gputrain)")
    for setting in SETTINGS:
        more: dict[str, Any] = {"metavar": setting.metavar, "action": "store"}
        if setting.kind == "list":
            more["action"] = "append"
        elif setting.kind == "flag":
            more = {"action": "store_const", "const": "true"}
        group.addoption(setting.option, dest=setting.name, default=None, help=setting.help, **more)
        ini_type: Literal["linelist", "string"] = "linelist" if setting.kind == "list" else "string"
        parser.addini(setting.name, setting.help, type=ini_type, default=None)


def resolve(config: pytest.Config, environ: Mapping[str, str] = os.environ) -> Settings:
    """Return this session's settings and keep them. Raises ``pytest.UsageError`` for an illegal one."""
    if mistaken := unknown(environ):
        raise pytest.UsageError(mistaken)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for setting in SETTINGS:
        given = _given(setting, config, environ)
        values[setting.field] = setting.default if given is None else _parsed(setting, given)
        origins[setting.field] = DEFAULT if given is None else given.origin
    settings = config.stash[_KEY] = Settings(**values, origins=origins)
    return settings


def settings_of(config: pytest.Config) -> Settings:
    """Return what ``resolve`` found for this session."""
    return config.stash[_KEY]


def not_default(settings: Settings) -> list[str]:
    """Return the names of the settings that somebody set."""
    return [field for field, origin in settings.origins.items() if origin != DEFAULT]


def _given(setting: Setting, config: pytest.Config, environ: Mapping[str, str]) -> _Given | None:
    here = config.invocation_params.dir
    if (option := config.getoption(setting.name)) is not None:
        return _Given(tuple(option) if setting.kind == "list" else (option,), COMMAND_LINE, here)
    if text := environ.get(setting.variable, "").strip():
        texts = tuple(text.replace(",", " ").split()) if setting.kind == "list" else (text,)
        return _Given(texts, f"the environment variable {setting.variable}", here)
    if ini := config.getini(setting.name):
        origin = f"{setting.name} in {config.inipath.name if config.inipath else 'an ini option'}"
        texts = tuple(ini) if setting.kind == "list" else (str(ini),)
        return _Given(texts, origin, config.inipath.parent if config.inipath else config.rootpath)
    return None


def _parsed(setting: Setting, given: _Given) -> object:
    values = []
    for text in given.texts:
        try:
            values.append(setting.parse(text, given.folder))
        except ValueError:
            raise pytest.UsageError(
                f"{setting.option}: {text!r} (from {given.origin}) is not legal; give {setting.legal}"
            ) from None
    return tuple(values) if setting.kind == "list" else values[0]
