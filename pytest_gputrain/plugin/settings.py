"""One resolver for every setting: command line > environment > ini, and the origin is kept for every error.

A setting named ``gputrain_stall`` has the environment twin ``GPUTRAIN_STALL`` and the ini twin
``gputrain_stall``; an empty environment variable counts as not set. What a test itself says (a marker, an
argument of the fixture) goes before all of these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from pytest_gputrain.plugin.settings_table import SETTINGS, Setting
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


class _Given(NamedTuple):
    """What was written, where, and the folder that relative paths there mean."""

    texts: tuple[str, ...]
    origin: str
    folder: Path


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
