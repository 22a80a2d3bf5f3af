"""What a case's author expects of a long run, finding by finding, so that all the rest is still looked for.

``expected_failures={"stable_training:loss": "targets are bootstrapped"}``. Not strict, as ``stable_training``
alone is: a loss that need not fall may fall. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pytest_gputrain.endurance.findings import Finding

CHECK = "stable_training"
# What may be named after the check, and the kinds of findings that it covers.
_COVERS = {
    "loss": ("loss",),
    "step_time": ("step_time",),
    "straggler": ("straggler",),
    "memory": ("memory", "graph", "host_memory", "objects"),
}
EXPECTABLE = tuple(f"{CHECK}:{name}" for name in _COVERS)


class Expected:
    """expected_failures: the case's. notes: on those findings that came as expected."""

    def __init__(self, expected_failures: Mapping[str, str]) -> None:
        self.notes: list[str] = []
        self._reasons = {
            kind: expected_failures[f"{CHECK}:{name}"]
            for name, kinds in _COVERS.items()
            if f"{CHECK}:{name}" in expected_failures
            for kind in kinds
        }

    def others(self, findings: Iterable[Finding | None]) -> list[Finding]:
        """The findings that are not expected."""
        found = [one for one in findings if one is not None]
        for one in found:
            if reason := self._reasons.get(one.kind):
                self.notes.append(f"expected ({reason}): {one.message.partition(chr(10))[0]}")
        return [one for one in found if one.kind not in self._reasons]
