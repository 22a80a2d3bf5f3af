"""What the ranks of a stability run agree on every few steps: that all are well, hold the same, and go on.

Every step would be dearer than all that is measured; records are kept between two votes, so that the step in
which something began is known nevertheless.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.checks.finite import not_finite
from pytest_gputrain.checks.peers import Peers
from pytest_gputrain.checks.stable_data import is_masked
from pytest_gputrain.checks.stable_untrained import Untrained
from pytest_gputrain.checks.stable_watch import ALL_EVERY
from pytest_gputrain.checks.stable_words import diverged, not_finite_step
from pytest_gputrain.endurance.findings import Finding
from pytest_gputrain.endurance.records import StepRecord

_EVERY = 20
_EARLY = (3, 10)  # of a large model steps are slow, and a run by time has to end
# Steps with a loss that is no number and that the program kept from its optimizer: some are its own affair.
_SKIPPED, _SKIPPED_SHARE = 3, 0.05


def is_due(step: int) -> bool:
    """Whether ranks vote after a step that is not the last one."""
    return step % _EVERY == 0 or step in _EARLY


@dataclass(frozen=True)
class _Ill:
    """A step that went wrong on this rank. names: of parameters that were not finite after it."""

    record: StepRecord
    names: list[str]
    masked: bool

    @property
    def by_loss(self) -> bool:
        return not self.record.finite["loss"]


class Vote:
    """parameters: all, by name; trained: those that every rank has to hold the same.

    skipped: steps whose loss is not finite in which no optimizer stepped.
    """

    def __init__(
        self,
        peers: Peers,
        parameters: Mapping[str, Any],
        trained: Mapping[str, Any],
        untrained: Untrained,
    ) -> None:
        self.skipped = 0
        self._untrained = untrained
        self._peers, self._parameters, self._trained = peers, parameters, trained
        self._pending: list[StepRecord] = []
        self._trouble: _Ill | Finding | None = None
        self._updates = False

    def take(self, record: StepRecord, batch: Any) -> None:
        """After each step; remembers the first that went wrong on this rank."""
        self._pending.append(record)
        if self._trouble is None and self._is_ill(record):
            self._trouble = _Ill(record, not_finite(dict(self._parameters)), is_masked(batch))
        self._updates = self._updates or record.update_seconds is not None

    def blame(self, finding: Finding | None) -> None:
        """What else is wrong on this rank, so that all stop."""
        self._trouble = self._trouble or finding

    def hold(self, late: bool) -> tuple[Finding | None, bool]:
        """A collective. (what is wrong, whether the flag is up on any rank)."""
        digests = [record.digest or "sharded" for record in self._pending]
        same, any_late = self._peers.agree("ill" if self._trouble else " ".join(digests), late)
        found = None if same and self._trouble is None else self._found(digests)
        self._pending.clear()
        return found, any_late

    def _is_ill(self, record: StepRecord) -> bool:
        if not record.finite["parameters"]:
            return True
        if record.finite["loss"]:
            return False
        if record.update_seconds is not None or not self._updates:
            return True
        self.skipped += 1
        return self.skipped > max(_SKIPPED, _SKIPPED_SHARE * record.step)

    def _found(self, digests: list[str]) -> Finding:
        """A collective: which it is. Of ranks that are well beside an ill one there is nothing to say."""
        ill, *by_step = self._peers.flagged([self._trouble is not None, *self._by_step()])
        if isinstance(self._trouble, _Ill):
            same = next(ranks for ranks, mine in zip(by_step, self._by_step(), strict=True) if mine)
            return not_finite_step(
                self._trouble.record,
                same,
                self._peers.world_size,
                self._trouble.names,
                len(self._parameters),
                masked=self._trouble.masked,
            )
        if self._trouble is not None:
            return self._trouble
        if not ill:
            for record, ranks in zip(self._pending, self._peers.deviating(digests), strict=True):
                if ranks:
                    if record.step % ALL_EVERY == 0 and (found := self._untrained.compare(record.step)):
                        return found
                    return diverged(record, ranks, dict(self._trained), self._peers)
        return Finding("victim", self._pending[-1].step, self._peers.rank, "")

    def _by_step(self) -> list[bool]:
        """For each step since the last vote: is it the ill one by its loss, and is it by weights alone?"""
        ill = self._trouble if isinstance(self._trouble, _Ill) else None
        here = [(ill is not None and ill.record is record) for record in self._pending]
        by_loss = ill is not None and ill.by_loss
        return [flag for one in here for flag in (one and by_loss, one and not by_loss)]
