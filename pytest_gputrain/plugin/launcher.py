"""The launcher a test gets: the launch room's own, speaking pytest when a launch does not pass."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gputrain.launch import (
    LaunchDefaults,
    Launcher,
    LaunchError,
    LaunchUsageError,
    UnsupportedPlatform,
    Verdict,
)
from pytest_gputrain.launch.errors import TooFewGpus
from pytest_gputrain.plugin import leasing, properties
from pytest_gputrain.plugin.sections import note_launch
from pytest_gputrain.plugin.settings import settings_of

if TYPE_CHECKING:
    from pytest_gputrain.launch import LaunchResult

# File systems allow 255 bytes a name; the launch adds names of its own below.
MAX_FOLDER_NAME = 120


# pytest types its exception as a variable, so mypy cannot see the base class.
class LaunchFailure(LaunchError, pytest.fail.Exception):  # type: ignore[name-defined,misc]
    """A ``LaunchError`` of which pytest shows the text alone, so that the cause is the first line.

    The frames of this process say nothing that the summary does not say better, by rank.
    """

    def __init__(self, result: LaunchResult) -> None:
        LaunchError.__init__(self, result)
        self.msg = str(self)
        self.pytrace = False


# Marked final for type checkers only; this is a usage error of pytest and a ValueError for who catches it.
class LauncherUsageError(LaunchUsageError, pytest.UsageError):  # type: ignore[misc]
    """Bad input to ``ddp_launcher``: one line, raised before any rank starts."""


# How pytest names them, in its short summary too: `FAILED test_x.py::test_a - LaunchError: HUNG after …`.
LaunchFailure.__name__ = LaunchFailure.__qualname__ = "LaunchError"
LauncherUsageError.__name__ = LauncherUsageError.__qualname__ = "LaunchUsageError"
LaunchFailure.__module__ = LauncherUsageError.__module__ = "builtins"


class PytestLauncher(Launcher):
    """``Launcher`` with this session's settings, whose failures are test outcomes."""

    def __init__(self, node: pytest.Item, defaults: LaunchDefaults) -> None:
        super().__init__(defaults=defaults)
        self._node = node

    def __call__(self, *args: Any, **kwargs: Any) -> LaunchResult:
        __tracebackhide__ = True
        return self._in_pytest(super().__call__, *args, **kwargs)

    def torchrun(self, *args: Any, **kwargs: Any) -> LaunchResult:
        __tracebackhide__ = True
        return self._in_pytest(super().torchrun, *args, **kwargs)

    def _in_pytest(self, launch: Callable[..., LaunchResult], *args: Any, **kwargs: Any) -> LaunchResult:
        __tracebackhide__ = True
        failed = False
        try:
            result = launch(*args, **kwargs)
        except UnsupportedPlatform as error:
            pytest.skip(str(error))
        except TooFewGpus as error:
            # A script, in a test that runs only because the ranks of functions can share.
            if properties.has(self._node, properties.SHARED):
                self._skip(
                    f"needs {error.needed}; --share-gpu is for functions, scripts choose their own device"
                )
            raise LauncherUsageError(str(error)) from None
        except LaunchUsageError as error:
            properties.add(self._node, properties.REFUSED, error)
            raise LauncherUsageError(str(error)) from None
        except LaunchError as error:
            result, failed = error.result, True
        self._tell(result)
        if not failed:
            return result
        if result.verdict is Verdict.SKIPPED:
            self._skip(str(result.cause) if result.cause else result.summary())
        raise LaunchFailure(result)

    def _tell(self, result: LaunchResult) -> None:
        """Leave what the report has to say about a launch, whatever it came to."""
        if result.shared_gpu:
            properties.add(self._node, properties.SHARED, result.shared_gpu)
        properties.add(self._node, properties.VERDICT, result.verdict)
        if result.cause is not None:
            properties.add(self._node, properties.CAUSE, str(result.cause).partition("\n")[0])
        note_launch(self._node, result, kept=self.defaults.artifacts is not None)

    def _skip(self, reason: str) -> None:
        __tracebackhide__ = True
        if reason.startswith("needs "):  # for lack of hardware: the terminal counts these
            properties.add(self._node, properties.SHORTAGE, reason)
        pytest.skip(reason)


def launcher_for(node: pytest.Item, base: Path | None) -> PytestLauncher:
    """Return the launcher of one test, which keeps artifacts below ``base`` unless there is a report folder.

    Folders are made by the first launch, not before; without either they go with the result.
    """
    settings = settings_of(node.config)
    base = settings.report or base
    artifacts = base / folder_name(node.nodeid) if base else None
    defaults = LaunchDefaults(
        timeout=settings.timeout,
        stall=settings.stall,
        device="cuda" if node.get_closest_marker("requires_gpus") else "cpu",
        artifacts=artifacts,
        share_gpu=settings.share_gpu,
        gpus=tuple(gpu.uuid for gpu in leasing.held(node)),
    )
    return PytestLauncher(node, defaults)


def folder_name(nodeid: str) -> str:
    """Return a folder name that tells people which test it was and that no other test shares."""
    name = re.sub(r"[^\w.]+", "-", nodeid).strip("-.")
    if "[" not in nodeid and len(name) <= MAX_FOLDER_NAME:
        return name
    # Parameters may differ only in characters that a file system does not take, or beyond the cut.
    return f"{name[:MAX_FOLDER_NAME]}-{hashlib.sha256(nodeid.encode()).hexdigest()[:8]}"
