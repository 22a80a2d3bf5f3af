"""A tensor that took much of the memory, as it is told to people."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gputrain.memory.ledger import Record
from pytest_gputrain.memory.lines import location
from pytest_gputrain.values import format_size


@dataclass(frozen=True)
class Large:
    """One of the largest tensors at the peak; ``location``: the user's line, None if it was there before."""

    num_bytes: int
    category: str
    shape: tuple[int, ...]
    dtype: str
    location: str | None

    @classmethod
    def of(cls, record: Record) -> Large:
        """As written in the books."""
        shape, dtype = record.shape
        where = location(record.lines) if record.lines else None
        return cls(record.num_bytes, record.category, shape, str(dtype).removeprefix("torch."), where)

    def __str__(self) -> str:
        made = f"made at {self.location}" if self.location else "there before the block, or small"
        return f"{format_size(self.num_bytes)} {self.category} {self.dtype}{[*self.shape]}, {made}"
