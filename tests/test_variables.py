"""The list of environment variables is that of the source; one that it lacks would be refused to users."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_gputrain.plugin.settings_table import SETTINGS
from pytest_gputrain.variables import NAMES, unknown

PACKAGE = Path(__file__).parent.parent / "pytest_gputrain"


def test_every_variable_of_the_source_is_known() -> None:
    written = {
        name
        for path in PACKAGE.rglob("*.py")
        if path.name != "variables.py"
        for name in re.findall(r"GPUTRAIN_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8"))
    }
    assert written | {setting.variable for setting in SETTINGS} == {*NAMES}


def test_what_is_not_ours_or_empty_is_let_be() -> None:
    environ = {**dict.fromkeys(NAMES, "1"), "GPUTRAIN_LUNCH": " ", "MY_GPUTRAIN_X": "1"}
    assert unknown(environ) is None
