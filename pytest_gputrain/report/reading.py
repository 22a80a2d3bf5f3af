"""A report.json from the disk, refused in one line where it is none that this version reads. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]

SCHEMA, VERSION = "gputrain.report", 1
REPORT = "report.json"


class ReportError(ValueError):
    """A report that cannot be used; one line."""


def load_report(path: Path) -> Json:
    """The parsed report. Raises ReportError: not there, not JSON, no report, or of another version."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ReportError(
            f"{path} is not JSON ({error.msg} in line {error.lineno}): cut off or edited"
        ) from None
    except UnicodeDecodeError:
        raise ReportError(f"{path} is not JSON (not UTF-8 text)") from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror or error})") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ReportError(f"{path} is no report of gputrain (its schema is not {SCHEMA!r})")
    if found.get("version") != VERSION:
        raise ReportError(
            f"{path} is of version {found.get('version')!r} of the report, this reads version {VERSION}; "
            "use the gputrain that wrote it, or write it again"
        )
    if lacking := [name for name, kind in _PARTS.items() if not isinstance(found.get(name), kind)]:
        raise ReportError(f"{path} is no whole report: it lacks {', '.join(lacking)}")
    return found


_PARTS = {"verdict": str, "session": dict, "machines": list, "tests": list}
