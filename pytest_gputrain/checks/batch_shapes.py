"""Do the case's batches always have the same shape? What is compiled for one is compiled anew for another.

Draws from ``batches`` to its end, or for some seconds. Where shapes do vary, a few steps of the compiled
model tell whether that matters: not where torch makes the graph dynamic, nor where what varies never reaches
it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks.batch_columns import Seen, Shapes, advice, in_words, variations
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.ranks import alone
from pytest_gputrain.checks.registry import check
from pytest_gputrain.checks.result import CheckFailed, Figures

# An endless stream is drawn from for so long; a slow one gives a few batches all the same.
MAX_DRAWN, DRAWING_SECONDS, AT_LEAST = 2000, 2.0, 4
# What only repeats batch() has nothing in store.
REPEATED = 16
# Different shapes for the compiled model: few are enough, and each may cost a compilation.
TRIED = 4
# Batches kept as they come, for a loop that trains on them.
KEPT = 14


@check("batch_shapes_constant", subject="compile")
def check_batch_shapes_constant(case: TrainingCase, ctx: CheckContext) -> Figures:
    """Fails when batches differ in shape or type, and the model is compiled anew for that."""
    found: Found = alone(_look, case, ctx, doing="drawing from batches()")
    seen, figures = found.seen, found.figures
    varies = list(variations(seen))
    if not varies:
        return figures
    first, *others = [in_words(one, seen) for one in varies]
    if found.harmless:
        return {**figures, "notes": [f"shapes vary ({first}), and {found.harmless}"]}
    counted = f"{figures['shapes']} shapes in {figures['batches']} batches"
    lines = [f"{counted}: {first}", *(f"  {line}" for line in others)]
    lines += [f"  made by {found.made_by}", *(f"  {line}" for line in found.trial)]
    lines.append(f"  likely: {advice(varies[0], seen)}")
    raise CheckFailed("\n".join(lines), figures)


@dataclass
class Found:
    """harmless: why shapes that vary do no harm, or "". trial: lines of what compiling made of them."""

    seen: Seen
    figures: Figures
    made_by: str = ""
    harmless: str = ""
    trial: list[str] = field(default_factory=list)


def _look(case: TrainingCase, ctx: CheckContext) -> Found:
    """In the rank."""
    from pytest_gputrain.checks.made_by import watched_loaders, who_makes
    from pytest_gputrain.checks.shape_trial import try_shapes

    with watched_loaders() as loaders:
        drawn = draw(case, ctx)
    found = Found(drawn.seen, drawn.figures(), who_makes(case, loaders))
    if drawn.seen.different():
        batches = [drawn.usual(), *(batch for _, batch in drawn.others()[:TRIED])]
        found.harmless, found.trial = try_shapes(case, ctx, batches)
    return found


@dataclass
class Drawn:
    """What the stream gave. first: its first batches; kept: by shapes, the first of each; with its index."""

    shapes: list[Shapes] = field(default_factory=list)
    first: list[tuple[int, Any]] = field(default_factory=list)
    kept: dict[Shapes, tuple[int, Any]] = field(default_factory=dict)
    ended: bool = False
    useful: int = 0
    tokens: int = 0

    @property
    def seen(self) -> Seen:
        return Seen(self.shapes, self.ended)

    def usual(self) -> Any:
        return self.kept[self.seen.usual][1]

    def others(self) -> list[tuple[int, Any]]:
        """Of every shape but the usual one, the first batch."""
        return [batch for shapes, batch in self.kept.items() if shapes != self.seen.usual]

    def figures(self) -> Figures:
        figures: Figures = {"batches": len(self.shapes), "shapes": len(self.kept)}
        if self.tokens:
            figures["tokens"], figures["useful tokens"] = self.tokens, f"{self.useful / self.tokens:.1%}"
        return figures


def draw(case: TrainingCase, ctx: CheckContext) -> Drawn:
    """The stream's batches, as many as there is time for. Raises CheckFailed where it gives none."""
    from pytest_gputrain.checks.session import seed_everything, seed_for
    from pytest_gputrain.checks.useful_tokens import count

    seed_everything(seed_for(ctx, 0))
    drawn, deadline = Drawn(), time.monotonic() + DRAWING_SECONDS
    stream = _iterator(case)
    limit = MAX_DRAWN if case.has_own_batches else REPEATED
    while len(drawn.shapes) < limit and (len(drawn.shapes) < AT_LEAST or time.monotonic() < deadline):
        try:
            batch = next(stream)
        except StopIteration:
            drawn.ended = True
            break
        shapes = shapes_of(batch)
        if not shapes:
            raise CheckFailed(
                f"batch {len(drawn.shapes)} of batches() has no tensor, it is {batch!r:.60}; give what the "
                "loop trains on"
            )
        if len(drawn.first) < KEPT:
            drawn.first.append((len(drawn.shapes), batch))
        drawn.kept.setdefault(shapes, (len(drawn.shapes), batch))
        drawn.shapes.append(shapes)
        useful, tokens = count(case, batch) or (0, 0)
        drawn.useful, drawn.tokens = drawn.useful + useful, drawn.tokens + tokens
    if not drawn.shapes:
        raise CheckFailed(NO_BATCH)
    return drawn


NO_BATCH = (
    "batches() gave no batch; it has to give the data of one epoch or more, from its beginning at each call"
)


def _iterator(case: TrainingCase) -> Any:
    """Raises CheckFailed where batches() gives nothing to iterate."""
    given = case.batches()
    try:
        return iter(given)
    except TypeError:
        raise CheckFailed(
            f"batches() returned {given!r:.60}; it has to return an iterable of batches (a DataLoader, a "
            "generator, a list)"
        ) from None


def shapes_of(batch: Any) -> Shapes:
    """Path, sizes and type of every tensor in it."""
    return tuple(
        (path, tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."))
        for path, leaf in pytree.leaves(batch)
        if pytree.is_tensor(leaf)
    )
