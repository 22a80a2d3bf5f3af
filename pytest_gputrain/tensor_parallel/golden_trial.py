"""One optimizer on both models: from the same weights over a few steps, each with its own gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pytest_gputrain.tensor_parallel import golden_difference as apart
from pytest_gputrain.tensor_parallel.golden_gradients import percent
from pytest_gputrain.tensor_parallel.golden_last_digit import LastDigits
from pytest_gputrain.tensor_parallel.golden_model import parameters_of
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_rounding import FACTOR
from pytest_gputrain.tensor_parallel.golden_step import take
from pytest_gputrain.tensor_parallel.golden_updates import Kept, Updates, compare_updates, mark_significant
from pytest_gputrain.tensor_parallel.records_training import OptimizerResult

Make = Callable[[nn.Module], Any]
# However much a model makes of rounding, it does not excuse more of an update than this.
MOST_BY_ROUNDING = 0.1
MOST_BY_SHORT_ROUNDING = 0.3  # where a short type computes (autocast): bugs are factors there
# Of the update. In short types an update is a few units of rounding: there it is of the weights.
UPDATE_TOLERANCE = {"float64": 1e-7, "float32": 2e-3}
WEIGHT_TOLERANCE = 2e-2


@dataclass
class Path:
    """Where one model went: losses, and by name where gradients are more than rounding at every step."""

    losses: list[Any]
    significant: dict[str, torch.Tensor]


class Trial:
    """Both models at the same weights, as often as wanted."""

    def __init__(self, pair: Pair, batches: list[Any]) -> None:
        self.pair, self.batches = pair, batches
        self._golden = _kept(pair.reference)
        with pair.world.acting():
            self._parallel = _kept(pair.parallel)
        self._kind = next(p.dtype for p in pair.reference.parameters() if p.is_floating_point())

    def reset(self) -> None:
        """Both models as they were."""
        _put_back(self._golden)
        with self.pair.world.acting():
            _put_back(self._parallel)

    def run(self, name: str, make: Make) -> OptimizerResult:
        """One optimizer; collective."""
        allowed = UPDATE_TOLERANCE.get(apart.kind_of(self._kind), WEIGHT_TOLERANCE)
        self.reset()
        golden = self._alone(make)
        path = golden if isinstance(golden, str) else self._in_parallel(name, make)
        if isinstance(golden, str) or isinstance(path, str):
            return OptimizerResult(name, 0, 0.0, allowed, skipped=str(path))
        of_updates = self._kind in (torch.float32, torch.float64)
        found = compare_updates(self.pair, self._golden, golden.significant, allowed, of_updates=of_updates)
        losses = tuple(float(next(iter(self.pair.world.whole(loss).values()))) for loss in path.losses)
        if of_updates and found.relative > allowed and self._may_be_rounding(found):
            own = self._own_rounding(make, golden)
            if self.pair.short is not None:
                # What rounding makes more than half of is rounding: the bias of a key before a softmax.
                golden.significant = {n: m for n, m in golden.significant.items() if own.get(n, 0.0) <= 0.5}
                found = compare_updates(self.pair, self._golden, golden.significant, allowed, of_updates=True)
            most = max((own.get(name, 0.0) for name in golden.significant), default=0.0)
            allowed = max(allowed, min(self._most_by_rounding, FACTOR * most))
        return OptimizerResult(
            name=name,
            steps=len(self.batches),
            relative=found.relative,
            tolerance=allowed,
            parameter=found.parameter,
            difference=found.difference,
            golden_losses=tuple(float(loss) for loss in golden.losses),
            losses=losses,
            problem=None if found.relative <= allowed else self._problem(name, make, found, golden),
        )

    def _alone(self, make: Make) -> Path | str:
        """The way of the single process; why there is none, where this optimizer cannot be judged."""
        pair = self.pair
        if self._kind == torch.float16 and not isinstance(make(pair.reference), torch.optim.SGD):
            return "not here: float16 has no room for the squares of gradients; keep weights in float32"
        try:
            with pair.world.alone():
                golden = self._train(pair.reference, make, pair.ask_reference)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return f"not here: {_line(error)}"
        if any(apart.nonfinite(p) for p in pair.reference.parameters()):
            return "not here: a single process's weights are NaN or Inf after it"
        return golden

    def _in_parallel(self, name: str, make: Make) -> Path | str:
        """The way of the parallel model; why there is none, where this optimizer refuses it."""
        pair = self.pair
        try:
            with pair.world.acting():
                optimizer = make(pair.parallel)
            return self._train(pair.parallel, lambda _: optimizer, pair.ask_parallel)
        except (RuntimeError, NotImplementedError) as error:
            if "(" not in name and not pair.world.simulated:
                raise
            # A kernel for lists of equal tensors refuses what is only partly made of DTensors.
            return f"not with this model: {_line(error)}"

    def _problem(self, name: str, make: Make, found: Updates, golden: Path) -> str:
        text = (
            f"after {len(self.batches)} steps of {name} {found.parameter} is not where the reference's is: "
            f"its update is off by {percent(found.relative)}. {found.difference}"
        )
        if left := self._left_out(make):
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            what = f"{left[0]}{more} is not in {name}'s parameters, as it is in a single process"
            text = f"{what}\n  {text}"
        if found.wrong:
            layer = found.wrong[0].rpartition(".")[0] or found.wrong[0]
            text += (
                f"\n  {len(found.wrong)} of {len(golden.significant)} parameters are off, first in {layer}"
            )
        return text

    def _left_out(self, make: Make) -> list[str]:
        """Trained parameters that the parallel model's optimizer has not, and the reference's has."""
        pair = self.pair
        with pair.world.acting():
            theirs = make(pair.parallel)
        with pair.world.alone():
            golden = make(pair.reference)
        if not (hasattr(theirs, "param_groups") and hasattr(golden, "param_groups")):
            return []
        held = {id(p) for one in (theirs, golden) for group in one.param_groups for p in group["params"]}
        known = {name for name, p in parameters_of(pair.reference).items() if id(p) in held}
        return [
            name
            for name, p in parameters_of(pair.parallel).items()
            if p.requires_grad and id(p) not in held and name in known
        ]

    def _may_be_rounding(self, found: Updates) -> bool:
        return self.pair.short is not None or found.relative <= self._most_by_rounding

    def _own_rounding(self, make: Make, golden: Path) -> dict[str, float]:
        """By parameter, what the single process's update changes by as gradients are taken of weights that
        are changed in their last digit, and given to the unchanged ones: relative to the update. Steps make
        much of a unit at the kink of a ReLU. Its weights are as before then. Collective.
        """
        pair, parameters = self.pair, parameters_of(self.pair.reference)
        start = {id(tensor): kept for tensor, kept in self._golden}
        after = _kept(pair.reference)
        moved = {id(tensor): kept for tensor, kept in after}
        _put_back(self._golden)
        digits = LastDigits(list(parameters.values()), pair.seed, pair.computes_in)
        with pair.world.alone():
            self._train(pair.reference, make, pair.ask_reference, digits)
        changes = {}
        # Of a step that never put them back nothing is known.
        for name, mask in golden.significant.items() if not digits.changed else ():
            there = moved[id(parameters[name])]
            size = apart.norm((there - start[id(parameters[name])]) * mask)
            off = apart.norm((parameters[name].detach() - there) * mask)
            changes[name] = off / size if size else 0.0
        _put_back(after)
        by_rank = pair.world.merged(dict.fromkeys(pair.world.held, changes))
        return {name: max(one.get(name, 0.0) for one in by_rank) for name in golden.significant}

    @property
    def _most_by_rounding(self) -> float:
        return MOST_BY_ROUNDING if self.pair.short is None else MOST_BY_SHORT_ROUNDING

    def _train(
        self,
        model: nn.Module,
        make: Make,
        ask: Callable[..., Any],
        digits: LastDigits | None = None,
    ) -> Path:
        pair = self.pair
        acting = pair.world.acting if model is pair.parallel else pair.world.alone
        with acting():
            optimizer = make(model)
        if digits is not None and hasattr(optimizer, "register_step_pre_hook"):
            optimizer.register_step_pre_hook(lambda *_: digits.put_back())
        path = Path([], {})
        for batch in self.batches:
            model.zero_grad(set_to_none=True)
            if digits is not None:
                digits.change()
            if pair.case.has_own_step:  # its gradients may only be whole after what it does to them
                with acting():
                    gradients = take(
                        pair.case, model, batch, pair.seed, optimizer=optimizer, losses=path.losses
                    )
            else:
                path.losses.append(ask(batch, gradients=True).loss.detach())
                gradients = {n: p.grad for n, p in parameters_of(model).items() if p.grad is not None}
            if model is pair.reference:
                mark_significant(gradients, path.significant, pair.computes_in)
            if not pair.case.has_own_step:
                with acting():
                    optimizer.step()
        return path


def _kept(model: nn.Module) -> Kept:
    tensors = [*model.parameters(), *model.buffers()]
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


def _put_back(kept: Kept) -> None:
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.80}"
