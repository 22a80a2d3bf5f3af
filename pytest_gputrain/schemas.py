"""Names and versions of the JSON documents that commands write for other programs. Pure.

A version goes up when a name is taken away or changes its meaning; names that are added leave it, so readers
pass over what they do not know. ``report.json`` has a JSON Schema too (``report/schema/``); the cache of
batch sizes, plans of branches and their results carry ``format`` and ``version`` of their own rooms.
"""

from __future__ import annotations

SCHEMAS = {
    "gputrain.report": 1,  # --gputrain-report, check --report
    "gputrain.check": 1,  # check --json
    "gputrain.diagnose": 1,  # report.json of diagnose, diagnose --json
    "gputrain.doctor": 1,  # doctor --json
    "gputrain.find-batch": 1,  # find-batch --json
    "gputrain.compile": 1,  # CASE-DEVICE-parity.json and its like in --compile-report
    "gputrain.throughput": 1,  # throughput_comparison.json
    "gputrain.benchmark": 1,  # benchmarks/results/
}


def head(name: str) -> dict[str, str | int]:
    """What such a document begins with: ``schema`` and ``version``."""
    return {"schema": name, "version": SCHEMAS[name]}
