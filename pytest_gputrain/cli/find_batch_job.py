"""What ``gputrain find-batch`` hands to the process that does the work, and what that one tells meanwhile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_gputrain.batch.ladder import legal_sizes


@dataclass(frozen=True, kw_only=True)
class Request:
    """capacity: bytes, None for the device's own. cache: folder, None for none. progress: file of events.

    block_size: tokens of a sequence for which the answer is meant, None for whatever the case draws.
    """

    spec: str
    predict: bool
    device: str
    capacity: int | None
    margin: float
    minimum: int
    maximum: int
    multiple_of: int
    world_size: int
    global_batch: int | None
    strategy: str
    eval_batch_factor: float
    iterations: int
    compiled: bool
    checkpointing: bool
    cache: str | None
    progress: str
    block_size: int | None = None

    @property
    def share(self) -> int | None:
        """Samples of one optimizer step on one rank."""
        return None if self.global_batch is None else self.global_batch // self.world_size

    @property
    def ragged(self) -> bool:
        """Whether the batch size need not divide the global batch: a smaller last micro-batch makes up for
        it, but would be no multiple.
        """
        return self.global_batch is not None and self.multiple_of == 1

    def sizes(self) -> Sequence[int]:
        """The legal batch sizes. Raises ValueError where there is none."""
        if self.share is None or not self.ragged:
            return legal_sizes(self.minimum, self.maximum, self.multiple_of, self.share)
        return legal_sizes(self.minimum, min(self.maximum, self.share))


class Events:
    """Events for the process that shows them, one JSON line each."""

    def __init__(self, path: str) -> None:
        self._path = path

    def write(self, **event: object) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
