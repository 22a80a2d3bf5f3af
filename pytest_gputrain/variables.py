"""Every environment variable of this package, so that a misspelt one is refused and not silently ignored."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

PREFIX = "GPUTRAIN_"

NAMES = (
    # The settings of a session, `plugin/settings_table.py`.
    "GPUTRAIN_ALONE",
    "GPUTRAIN_CACHE_DIR",
    "GPUTRAIN_CASE",
    "GPUTRAIN_LEASE_DIR",
    "GPUTRAIN_LEASE_TIMEOUT",
    "GPUTRAIN_NODE_TIMEOUT",
    "GPUTRAIN_REPORT",
    "GPUTRAIN_REQUIRE_GPUS",
    "GPUTRAIN_SHARE_GPU",
    "GPUTRAIN_STABILITY",
    "GPUTRAIN_STALL",
    "GPUTRAIN_TIMEOUT",
    "GPUTRAIN_FAKE_GPUS",
    # What a rank traces, and what of a script is changed: `trace/switches.py`, `trace/study.py`.
    "GPUTRAIN_BACKEND",
    "GPUTRAIN_DDP_FIND_UNUSED",
    "GPUTRAIN_DDP_NO_SYNC",
    "GPUTRAIN_DDP_STATIC_GRAPH",
    "GPUTRAIN_FORCE_BRANCH",
    "GPUTRAIN_GC_RANGE",
    "GPUTRAIN_GRAD_DIGEST",
    "GPUTRAIN_HEARTBEAT",
    "GPUTRAIN_MAX_STEPS",
    "GPUTRAIN_SEED",
    "GPUTRAIN_STUDY",
    "GPUTRAIN_TRACE_DDP_BUCKETS",
    "GPUTRAIN_TRACE_GRADS",
    "GPUTRAIN_TRACE_MODULE_BWD",
    "GPUTRAIN_WATCHDOG",
    "GPUTRAIN_WATCHDOG_SECONDS",
    # Weights for the reference OPT-125M: `reference/opt125m.py`.
    "GPUTRAIN_OPT_WEIGHTS",
    # What a training script says about itself: `compile/validation.py`.
    "GPUTRAIN_VALIDATE",
    # The mark of a launch's processes, which a rank that launches again has in its environment.
    "GPUTRAIN_LAUNCH",
)


def unknown(environ: Mapping[str, str]) -> str | None:
    """Return one line about a variable that has our prefix and is none of ours; None where all are known.

    An empty one counts as not set, as everywhere.
    """
    ours = [name for name in environ if name.startswith(PREFIX)]
    for name in sorted(ours):
        if name not in NAMES and environ[name].strip():
            # The prefix alone would make all of them alike.
            short = [known.removeprefix(PREFIX) for known in NAMES]
            near = difflib.get_close_matches(name[len(PREFIX) :], short, n=1)
            way_out = (
                f"did you mean {PREFIX}{near[0]}?"
                if near
                else "unset it: names with this prefix are pytest-gputrain's"
            )
            return f"{name}={environ[name]!r}: there is no such variable; {way_out}"
    return None
