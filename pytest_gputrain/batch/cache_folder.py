"""Which folder keeps what discoveries measured: decided once, here, for pytest, the command line and scripts.

Given > ``GPUTRAIN_CACHE_DIR`` > the platform's folder for caches. Imports no torch.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GPUTRAIN_CACHE_DIR"
NAME = "pytest-gputrain"


def cache_folder(given: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder, absolute, there or not yet there; an empty variable counts as not set."""
    chosen = str(given or "").strip() or environ.get(VARIABLE, "").strip()
    return Path(chosen).expanduser().absolute() if chosen else default_folder(environ)


def default_folder(environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """Return the user's cache folder by the platform's convention (Linux: XDG base directories)."""
    if platform == "win32" and (local := environ.get("LOCALAPPDATA", "").strip()):
        return Path(local) / NAME / "Cache"
    # "All paths must be absolute. If a relative path is encountered, ignore it" (XDG base directories).
    if (xdg := environ.get("XDG_CACHE_HOME", "").strip()) and Path(xdg).is_absolute():
        return Path(xdg) / NAME
    try:
        home = Path.home()
    except RuntimeError:  # a container's user that no database knows
        return Path(tempfile.gettempdir()) / f"{NAME}-{getattr(os, 'getuid', int)()}"
    return home / "Library" / "Caches" / NAME if platform == "darwin" else home / ".cache" / NAME
