"""Weights after optimizer steps against the reference's: of torch's optimizers, and of the case's own.

Both models start each optimizer from the same weights, and compute their own gradients. Adaptive optimizers
divide a gradient by its size, which makes as much of rounding as of a gradient: elements whose golden
gradient is rounding are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_gradients import parts, percent
from pytest_gputrain.tensor_parallel.golden_inputs import draw
from pytest_gputrain.tensor_parallel.golden_last_digit import change_last_digits
from pytest_gputrain.tensor_parallel.golden_model import SEED, ComparisonError, parameters_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_rounding import FACTOR
from pytest_gputrain.tensor_parallel.golden_step import SCALES, compare_step, take
from pytest_gputrain.tensor_parallel.records import (
    Difference,
    OptimizerRecord,
    OptimizerResult,
    StepRecord,
)

STEPS = 3
# Rows of the steps' batches, in turn: what is wrong for one sample only is seen as well.
ROWS = (2, 1)
OWN = "the case's optimizer"
NAMES = ("SGD", "Adam", "RMSprop", "AdamW", "AdamW(foreach=True)", "AdamW(fused=True)", OWN)
SETTINGS = {"SGD": {"lr": 1e-2, "momentum": 0.9}, "Adam": {"lr": 1e-3}, "RMSprop": {"lr": 1e-3}}
# However much a model makes of rounding, it does not excuse more of an update than this.
MOST_BY_ROUNDING = 0.1
# Of the update. In short types an update is a few units of rounding: there it is of the weights.
UPDATE_TOLERANCE = {"float64": 1e-7, "float32": 2e-3}
WEIGHT_TOLERANCE = 2e-2
# Of a gradient's root mean square: elements below it are as much rounding as gradient.
ROUNDING = {"float64": 1e-6, "float32": 1e-3, "float16": 3e-2, "bfloat16": 2e-1}


def compare_optimizers(
    case: TrainingCase, mesh: Any, names: Sequence[str] = NAMES, *, steps: int = STEPS, seed: int = SEED
) -> OptimizerRecord:
    """Run on every rank of ``mesh``; returns the same record on all.

    names: of ``torch.optim``, with ``(foreach=True)`` or ``(fused=True)`` behind it, and ``OWN``. Raises
    ComparisonError for another one, and where nothing can be compared.
    """
    chosen = [(name, _factory(name, case)) for name in names]
    pair = Pair(case, mesh, seed=seed)
    batches = _batches(pair, steps)
    pair.expect_same(batches)
    pair.parallelize()
    trial = _Trial(pair, batches)
    results = [trial.run(name, make) for name, make in chosen]
    taken: list[StepRecord] = []
    for scale in SCALES if case.has_own_step else ():
        trial.reset()
        record = compare_step(pair, batches[0], scale)
        if record is None:
            break
        taken.append(record)
    wrong = [step.problem for step in taken if step.problem]
    wrong += [result.problem for result in results if result.problem]
    return OptimizerRecord(
        world_size=pair.world.size,
        results=tuple(results),
        weights=tuple(pair.weights.records),
        steps=tuple(taken),
        simulated=pair.world.simulated,
        problem=pair.problem or pair.weights.problem or (wrong[0] if wrong else None),
        notes=tuple(pair.notes),
    )


def _factory(name: str, case: TrainingCase) -> Callable[[nn.Module], Any]:
    if name == OWN:
        return case.optimizer
    kind, _, flag = name.removesuffix(")").partition("(")
    made = getattr(torch.optim, kind, None)
    flags = {f"{one}=True": {one: True} for one in ("foreach", "fused")} | {"": {}}
    if not isinstance(made, type) or flag not in flags:
        raise ComparisonError(
            f"optimizer {name!r} is not known; give names of torch.optim, such as {', '.join(NAMES[:-1])}"
        )
    settings = {**SETTINGS.get(kind, {"lr": 1e-3}), **flags[flag]}
    return lambda model: made([p for p in model.parameters() if p.requires_grad], **settings)


def _batches(pair: Pair, steps: int) -> list[Any]:
    """Of two samples and of one; of two only where the reference takes no single one (a batch norm)."""
    drawn = [draw(pair.case, ROWS[step % len(ROWS)], pair.device, pair.seed + step) for step in range(steps)]
    try:
        for batch in drawn:
            pair.ask_reference(batch)
    except Exception:
        return [draw(pair.case, ROWS[0], pair.device, pair.seed + step) for step in range(steps)]
    return drawn


@dataclass
class _Path:
    """Where one model went: losses, and by name where gradients are more than rounding at every step."""

    losses: list[Any]
    significant: dict[str, torch.Tensor]


class _Trial:
    """Both models at the same weights, as often as wanted."""

    def __init__(self, pair: Pair, batches: list[Any]) -> None:
        self.pair, self.batches = pair, batches
        self._golden = _kept(pair.reference)
        with pair.world.acting():
            self._parallel = _kept(pair.parallel)

    def reset(self) -> None:
        _put_back(self._golden)
        with self.pair.world.acting():
            _put_back(self._parallel)

    def run(self, name: str, make: Callable[[nn.Module], Any]) -> OptimizerResult:
        """One optimizer; collective."""
        pair, steps = self.pair, len(self.batches)
        self.reset()
        kind = next(p.dtype for p in pair.reference.parameters() if p.is_floating_point())
        allowed = UPDATE_TOLERANCE.get(apart.kind_of(kind), WEIGHT_TOLERANCE)
        if kind == torch.float16 and not isinstance(make(pair.reference), torch.optim.SGD):
            skipped = "not here: float16 has no room for the squares of gradients; keep weights in float32"
            return OptimizerResult(name, 0, 0.0, allowed, skipped=skipped)
        try:
            with pair.world.alone():
                golden = self._train(pair.reference, make, pair.ask_reference)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return OptimizerResult(name, 0, 0.0, allowed, skipped=f"not here: {_line(error)}")
        if any(apart.nonfinite(p) for p in pair.reference.parameters()):
            skipped = "not here: a single process's weights are NaN or Inf after it"
            return OptimizerResult(name, 0, 0.0, allowed, skipped=skipped)
        try:
            with pair.world.acting():
                optimizer = make(pair.parallel)
            path = self._train(pair.parallel, lambda _: optimizer, pair.ask_parallel)
        except (RuntimeError, NotImplementedError) as error:
            if "(" not in name and not pair.world.simulated:
                raise
            # A kernel for lists of equal tensors refuses what is only partly made of DTensors.
            return OptimizerResult(name, 0, 0.0, allowed, skipped=f"not with this model: {_line(error)}")
        of_updates = kind in (torch.float32, torch.float64)
        (worst, relative, largest), wrong = self._compare(golden, allowed, of_updates=of_updates)
        losses = tuple(float(next(iter(pair.world.whole(loss).values()))) for loss in path.losses)
        problem = None
        if allowed < relative <= MOST_BY_ROUNDING and of_updates:
            allowed = max(allowed, self._own_rounding(make, golden))
        if not relative <= allowed:
            problem = (
                f"after {steps} steps of {name} {worst} is not where the reference's is: its update is "
                f"off by {percent(relative)}. {largest}"
            )
            if wrong:
                layer = wrong[0].rpartition(".")[0]
                problem += (
                    f"\n  {len(wrong)} of {len(golden.significant)} parameters are off, first in {layer}"
                )
        return OptimizerResult(
            name=name,
            steps=steps,
            relative=relative,
            tolerance=allowed,
            parameter=worst,
            difference=largest,
            golden_losses=tuple(float(loss) for loss in golden.losses),
            losses=losses,
            problem=problem,
        )

    def _own_rounding(self, make: Callable[[nn.Module], Any], golden: _Path) -> float:
        """What an update may be off by: several times what the single process's changes by as the weights
        that it starts from change in their last digit. Steps make much of a unit at the kink of a ReLU.
        Collective.
        """
        pair, parameters = self.pair, parameters_of(self.pair.reference)
        start = {id(tensor): kept for tensor, kept in self._golden}
        moved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _put_back(self._golden)
        change_last_digits(parameters.values(), pair.seed)
        with pair.world.alone():
            self._train(pair.reference, make, pair.ask_reference)
        most = 0.0
        for name, mask in golden.significant.items():
            size = apart.norm((moved[name] - start[id(parameters[name])]) * mask)
            off = apart.norm((parameters[name].detach() - moved[name]) * mask)
            most = max(most, off / size if size else 0.0)
        most = max(pair.world.merged(dict.fromkeys(pair.world.held, most)))
        return min(MOST_BY_ROUNDING, FACTOR * most)

    def _train(self, model: nn.Module, make: Callable[[nn.Module], Any], ask: Callable[..., Any]) -> _Path:
        pair = self.pair
        acting = pair.world.acting if model is pair.parallel else pair.world.alone
        with acting():
            optimizer = make(model)
        path = _Path([], {})
        for batch in self.batches:
            model.zero_grad(set_to_none=True)
            if pair.case.has_own_step:  # its gradients may only be whole after what it does to them
                with acting():
                    gradients = take(
                        pair.case, model, batch, pair.seed, optimizer=optimizer, losses=path.losses
                    )
            else:
                path.losses.append(ask(batch, gradients=True).loss.detach())
                gradients = {n: p.grad for n, p in parameters_of(model).items() if p.grad is not None}
            if model is pair.reference:
                _mark(gradients, path.significant)
            if not pair.case.has_own_step:
                with acting():
                    optimizer.step()
        return path

    def _compare(
        self, golden: _Path, allowed: float, *, of_updates: bool
    ) -> tuple[tuple[str, float, Difference | None], list[str]]:
        """The worst parameter, its relative error on the worst rank, and where; and all that are further off
        than allowed, in the model's order. Collective.
        """
        pair = self.pair
        reference = parameters_of(pair.reference)
        whole = {name: pair.world.whole(p) for name, p in parameters_of(pair.parallel).items()}
        found: dict[int, tuple[str, float, Difference | None]] = {}
        wrong: dict[int, list[str]] = {rank: [] for rank in pair.world.held}
        start = {id(tensor): kept for tensor, kept in self._golden}
        for rank in pair.world.held:
            worst: tuple[str, float, Difference | None] = ("", 0.0, None)
            got = {name: by_rank[rank] for name, by_rank in whole.items()}
            for name, parameter in reference.items():
                if name not in golden.significant:
                    continue
                mask = golden.significant[name]
                moved = parameter.detach() - start[id(parameter)] if of_updates else parameter.detach()
                size = apart.norm(moved * mask)
                one = self._distance(name, parameter.detach(), mask, got, rank)
                if one is None or not size:
                    continue
                if not one[0] / size <= worst[1]:  # NaN is worse than any
                    worst = (name, one[0] / size, one[1])
                if not one[0] / size <= allowed:
                    wrong[rank].append(name)
            found[rank] = worst
        everywhere = {name for names in pair.world.merged(wrong) for name in names}
        return max(pair.world.merged(found), key=lambda one: one[1]), [
            n for n in reference if n in everywhere
        ]

    def _distance(
        self, name: str, golden: torch.Tensor, mask: torch.Tensor, got: dict[str, Any], rank: int
    ) -> tuple[float, Difference] | None:
        pieces = parts(self.pair, name, golden, got, rank)
        masks = parts(self.pair, name, mask, got, rank)
        squares, largest = 0.0, None
        for (wanted, found, *_), (kept, *_) in zip(pieces, masks, strict=True):
            found = torch.where(kept.bool(), found.to(wanted.device), wanted)
            one = apart.difference(wanted, found, rank)
            squares += apart.norm(torch.nan_to_num(found - wanted, nan=torch.inf)) ** 2
            if largest is None or one.largest > largest.largest:
                largest = one
        return None if largest is None else (squares**0.5, largest)


def _mark(gradients: dict[str, Any], significant: dict[str, torch.Tensor]) -> None:
    """Where the gradient is not rounding, now and at every step before; exact zeros are exact."""
    total = sum(apart.norm(grad) ** 2 for grad in gradients.values()) ** 0.5
    for name, grad in gradients.items():
        size = apart.norm(grad)
        rms = size / max(1, grad.numel()) ** 0.5
        counts = (grad.abs() > apart.tolerance(ROUNDING, grad.dtype) * rms) | (grad == 0)
        if size <= apart.NEGLIGIBLE * torch.finfo(grad.dtype).eps * total:
            counts = torch.zeros_like(counts)
        significant[name] = counts & significant[name] if name in significant else counts


def _kept(model: nn.Module) -> list[tuple[Any, Any]]:
    tensors = [*model.parameters(), *model.buffers()]
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


def _put_back(kept: list[tuple[Any, Any]]) -> None:
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.80}"
