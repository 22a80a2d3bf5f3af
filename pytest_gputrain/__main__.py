"""``python -m pytest_gputrain``, the same as ``gputrain``."""

from __future__ import annotations

import sys

from pytest_gputrain.cli import main

sys.exit(main())
