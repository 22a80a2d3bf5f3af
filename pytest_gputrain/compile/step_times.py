"""Time and throughput of steps that were timed one by one, the first ones left out. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.compile.batch_tokens import BatchTokens

WARMUP = 5  # steps: compiling, autotuning, the allocator's growth, caches


@dataclass
class StepTimes:
    """``steps``: seconds and batch of each. The first ``warmup`` are in no figure."""

    warmup: int
    steps: list[tuple[float, BatchTokens]] = field(default_factory=list)

    def add(self, seconds: float, batch: BatchTokens) -> None:
        self.steps.append((seconds, batch))

    def figures(self) -> dict[str, Any]:
        """``num_steps`` that were measured, and where that is not 0: ``seconds_per_step``; ``unit`` and
        ``per_second`` of everything that went through the model; ``useful_share`` where it is known.
        """
        measured = self.steps[self.warmup :]
        warmup = len(self.steps) - len(measured)
        figures: dict[str, Any] = {"warmup_steps": warmup, "num_steps": len(measured)}
        if not measured:
            return figures
        seconds = sum(step_seconds for step_seconds, _ in measured)
        batches = [batch for _, batch in measured]
        total = sum(batch.total for batch in batches)
        counts = [batch.useful for batch in batches]
        useful = sum(count for count in counts if count is not None)
        return {
            **figures,
            "seconds_per_step": seconds / len(measured),
            "unit": batches[0].unit,
            # Of sums, not a mean of rates: a short batch must not count as much as a full one.
            "per_second": total / seconds,
            "useful_share": useful / total if total and None not in counts else None,
        }

    def lines(self) -> list[str]:
        """The figures for people."""
        figures = self.figures()
        if not figures["num_steps"]:
            return [f"Avg time/step: not measured ({len(self.steps)} steps, the first {self.warmup} warm up)"]
        unit, speed, share = figures["unit"], figures["per_second"], figures["useful_share"]
        said = [f"Avg time/step: {figures['seconds_per_step']:.3f}s"]
        if speed:  # 0 where no batch was told
            said[0] += f" | {unit.capitalize()}/sec: {speed:.1f}"
        if share is not None:
            said.append(f"Useful tokens/sec: {speed * share:.1f} ({share:.1%} of all count in the loss)")
        return said
