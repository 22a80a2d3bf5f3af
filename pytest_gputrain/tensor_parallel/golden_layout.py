"""Where each rank's parameters lie in the reference's, found by their content.

A shard is known by what is in it, not by its shape or its name: shards cut from a fused matrix in an order of
the model's own (q0 k0 v0 q1 k1 v1), key heads that several ranks hold, transposed, renamed and fused
parameters, and a padded vocabulary are all found, and a rank that holds another rank's part is, too. Rows
along a dimension are compared by an exact fingerprint of their bits, so that moving them is free and
changing them is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

MOST_SEGMENTS = 4096  # a shuffle of single rows would take one each
_CHUNK = 1 << 22  # elements fingerprinted at a time
_MOST_STARTS = 32  # rows equal to this many others say nothing


@dataclass(frozen=True)
class Segment:
    """``length`` positions from ``start`` on are those of ``source`` from ``source_start`` on."""

    start: int
    length: int
    source: str
    source_start: int


@dataclass(frozen=True)
class Layout:
    """One rank's parameter in terms of the reference's.

    dim: of the parallel tensor, cut along which the segments are told. transposed: the sources are, first.
    """

    dim: int
    transposed: bool
    segments: tuple[Segment, ...]

    def expected(self, like: torch.Tensor, sources: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        """What a tensor of this layout has to be where the reference has ``sources``; None is zero."""
        made = torch.zeros_like(like, memory_format=torch.contiguous_format)
        for segment in self.segments:
            source = sources[segment.source]
            if source is None:
                continue
            source = source.t() if self.transposed else source
            part = source.narrow(self.dim, segment.source_start, segment.length)
            made.narrow(self.dim, segment.start, segment.length).copy_(part)
        return made

    @property
    def matched(self) -> int:
        return sum(segment.length for segment in self.segments)


def fingerprints(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """One int64 a position along ``dim``, from the bits there; exact, whatever the memory format."""
    rows = tensor.detach().cpu().movedim(dim, 0)
    rows = rows.reshape(rows.shape[0], -1)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
    bits = bits.contiguous().view(whole[bits.element_size()])
    generator = torch.Generator().manual_seed(bits.shape[1])
    factors = torch.randint(-(1 << 62), 1 << 62, (bits.shape[1],), generator=generator) | 1
    step = max(1, _CHUNK // max(1, bits.shape[1]))
    parts = [(bits[at : at + step].long() * factors).sum(1) for at in range(0, bits.shape[0], step)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def runs(own: torch.Tensor, source: torch.Tensor) -> list[tuple[int, int, int]]:
    """(start, length, source start) of the longest runs of ``own`` found in ``source``, in order.

    Positions that are nowhere in ``source`` are in no run. Empty after ``MOST_SEGMENTS``.
    """
    known = torch.isin(own, source)
    found: list[tuple[int, int, int]] = []
    at, expected = 0, 0
    while at < own.numel():
        if not bool(known[at]):
            at += 1
            continue
        if len(found) >= MOST_SEGMENTS:
            return []
        start, length = _longest(own, source, at, expected)
        found.append((at, length, start))
        at, expected = at + length, start + length
    return found


def _longest(own: torch.Tensor, source: torch.Tensor, at: int, expected: int) -> tuple[int, int]:
    """The start in ``source`` from which the most positions agree, the one that goes on first."""
    starts = (source == own[at]).nonzero().flatten().tolist()
    if expected in starts:
        starts = [expected, *(one for one in starts if one != expected)]
    best = (starts[0], 0)
    for start in starts[:_MOST_STARTS]:
        reach = min(own.numel() - at, source.numel() - start)
        differs = (own[at : at + reach] != source[start : start + reach]).nonzero()
        length = int(differs[0]) if differs.numel() else reach
        if length > best[1]:
            best = (start, length)
    return best


def lay(own: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> Layout | None:
    """How ``own`` is made of the sources; None where less than half of it is found in them.

    sources: by name, the reference's parameters that it may hold parts of.
    """
    best: Layout | None = None
    for layout in _candidates(own, sources):
        if best is None or layout.matched > best.matched:
            best = layout
        if layout.matched == own.shape[layout.dim]:
            break
    if best is None or 2 * best.matched < own.shape[best.dim]:
        return None
    return best


def _candidates(own: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> Iterator[Layout]:
    if not own.dim():
        return
    for transposed in (False, True):
        for dim in range(own.dim()):
            fitting = _fitting(own, sources, dim, transposed)
            if not fitting:
                continue
            marks = {name: fingerprints(tensor, dim) for name, tensor in fitting.items()}
            found = runs(fingerprints(own, dim), torch.cat(list(marks.values())))
            if found:
                yield Layout(dim, transposed, tuple(_segments(found, marks)))


def _fitting(
    own: torch.Tensor, sources: Mapping[str, torch.Tensor], dim: int, transposed: bool
) -> dict[str, torch.Tensor]:
    """The sources that agree with ``own`` in all but ``dim``."""
    fitting = {}
    for name, source in sources.items():
        if source.dtype != own.dtype or source.dim() != own.dim():
            continue
        if transposed and source.dim() != 2:
            continue
        turned = source.t() if transposed else source
        others = [d for d in range(own.dim()) if d != dim]
        if all(turned.shape[d] == own.shape[d] for d in others):
            fitting[name] = turned
    return fitting


def _segments(found: list[tuple[int, int, int]], marks: Mapping[str, torch.Tensor]) -> Iterator[Segment]:
    """Runs in the joined sources, cut where one source ends."""
    begins, total = {}, 0
    for name, mark in marks.items():
        begins[name] = total
        total += mark.numel()
    for start, length, at in found:
        for name, mark in marks.items():
            first, last = max(at, begins[name]), min(at + length, begins[name] + mark.numel())
            if first < last:
                yield Segment(start + first - at, last - first, name, first - begins[name])
