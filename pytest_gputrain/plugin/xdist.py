"""What only pytest-xdist needs. Registered only when xdist is there: its hooks are unknown otherwise."""

from __future__ import annotations

from typing import Any

import pytest

_REFUSED = "gputrain_refused"


def refuse(config: pytest.Config, items: list[pytest.Item], error: pytest.UsageError) -> None:
    """In a worker: run nothing and let the controller say why.

    Raised here, a usage error would be shown as a crash of the worker, with a traceback of xdist.
    """
    items.clear()
    workeroutput: dict[str, Any] = config.workeroutput  # type: ignore[attr-defined]  # set by xdist
    workeroutput[_REFUSED] = str(error)


class XdistHooks:
    """The controller's side."""

    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Raise what a worker refused as the usage error it is, for the exit code of pytest."""
        if refused := getattr(node, "workeroutput", {}).get(_REFUSED):
            raise pytest.UsageError(refused)
