"""Finders of a batch size as people write them: honest ones, and some with one known defect each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.memory.guard import OomGuard

Fits = Callable[[int], bool]
CPU = torch.device("cpu")


def train(case: TrainingCase, model: Any, optimizer: Any, size: int, micro_batches: int = 1) -> None:
    """Three steps at this size, then evaluation."""
    for _ in range(3):
        case.step(model, optimizer, [case.batch(size, CPU)] * micro_batches)
    evaluate(case, model, size)


def evaluate(case: TrainingCase, model: Any, size: int) -> None:
    model.eval()
    with torch.no_grad():
        case.loss(model, case.batch(size, CPU))
    model.train()


def without_updates(
    case: TrainingCase, model: Any, optimizer: Any, size: int, micro_batches: int = 1
) -> None:
    for _ in range(3):
        case.loss(model, case.batch(size, CPU)).backward()
    evaluate(case, model, size)


def without_evaluation(
    case: TrainingCase, model: Any, optimizer: Any, size: int, micro_batches: int = 1
) -> None:
    for _ in range(3):
        case.step(model, optimizer, [case.batch(size, CPU)] * micro_batches)


def fits(case: TrainingCase, capacity: int, size: int, body: Any = train, micro_batches: int = 1) -> bool:
    """Whether a fresh model trains and evaluates at this size; the random state is put back."""
    state = torch.get_rng_state()
    model = case.model().train()
    optimizer = case.optimizer(model)
    try:
        with OomGuard(capacity, roots=[model]):
            body(case, model, optimizer, size, micro_batches)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.set_rng_state(state)
    return True


def counted(can: Fits, sizes: Iterable[int]) -> int:
    """The last of the sizes before the first that does not fit."""
    found = 0
    for size in sizes:
        if not can(size):
            break
        found = size
    return found


def doubled(can: Fits, largest: int) -> int:
    """Doubling until one fails, then bisecting."""
    low, high = 0, 1
    while high <= largest and can(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if can(middle) else (low, middle)
    return min(low, largest)


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def asked(search: Callable[[Fits, int], int] = doubled, body: Any = train) -> Callable[..., int]:
    """A finder by this search, over tries that run this."""

    def finder(
        case: TrainingCase,
        *,
        capacity: int,
        max_batch_size: int,
        global_batch_size: int | None,
        **question: Any,
    ) -> int:
        if not global_batch_size:
            return search(lambda size: fits(case, capacity, size, body), max_batch_size)
        share = global_batch_size

        def can(size: int) -> bool:
            return fits(case, capacity, size, body, share // size)

        return counted(can, divisors(share))

    return finder


honest = asked()
takes_no_update = asked(body=without_updates)
never_evaluates = asked(body=without_evaluation)


def powers_of_two(case: TrainingCase, *, capacity: int, **question: Any) -> int:
    return counted(lambda size: fits(case, capacity, size), (2**power for power in range(8)))


def ignores_the_global_batch(
    case: TrainingCase, *, capacity: int, max_batch_size: int, **question: Any
) -> int:
    return doubled(lambda size: fits(case, capacity, size), max_batch_size)


def margin_on_the_size(case: TrainingCase, **question: Any) -> int:
    return int(honest(case, **question) * 0.85)


def extrapolates(case: TrainingCase, *, capacity: int, max_batch_size: int, **question: Any) -> int:
    """A line through two sizes, believed."""

    def peak(size: int) -> int:
        model = case.model().train()
        with OomGuard(None, roots=[model]) as guard:
            train(case, model, case.optimizer(model), size)
        return guard.peak_bytes

    state = torch.get_rng_state()
    one, three = peak(1), peak(3)
    torch.set_rng_state(state)
    slope = max(1, (three - one) // 2)
    return max(1, min(max_batch_size, 1 + (capacity - one) // slope))


def takes_any_error_for_memory(
    case: TrainingCase, *, capacity: int, max_batch_size: int, **question: Any
) -> int:
    def can(size: int) -> bool:
        try:
            return fits(case, capacity, size)
        except Exception:
            return False

    share = question["global_batch_size"]
    if share:
        return honest(case, capacity=capacity, max_batch_size=max_batch_size, **question)
    return max(1, doubled(can, max_batch_size))


kept_errors: list[BaseException] = []


def keeps_the_traceback(
    case: TrainingCase, *, capacity: int, max_batch_size: int, global_batch_size: int | None, **question: Any
) -> int:
    """For its log. Counts down from what is known to be too much; one guard around all tries, as on a GPU."""
    state = torch.get_rng_state()
    with OomGuard(capacity):

        def can(size: int) -> bool:
            try:
                model = case.model().train()
                train(case, model, case.optimizer(model), size)
            except torch.OutOfMemoryError as error:
                kept_errors.append(error)
                return False
            return True

        found = doubled(can, max_batch_size)
    torch.set_rng_state(state)
    return found


def moves_the_model(case: TrainingCase, *, model: Any, **question: Any) -> int:
    """Looks whether the smallest size works at all, on the model itself, and puts the weights back."""
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    evaluate_with_statistics(case, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return honest(case, **question)


def evaluate_with_statistics(case: TrainingCase, model: Any) -> None:
    with torch.no_grad():
        case.loss(model, case.batch(2, CPU))


def draws_a_batch(case: TrainingCase, **question: Any) -> int:
    """Looks at what a batch of the real data holds, once, and tries on fresh models only."""
    case.batch(2, CPU)
    return honest(case, **question)


def keeps_the_optimizers_state(case: TrainingCase, *, model: Any, optimizer: Any, **question: Any) -> int:
    """Steps with the real optimizer and puts weights, gradients and random state back, and no more."""
    weights = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    case.step(model, optimizer, [case.batch(1, CPU)])
    torch.set_rng_state(state)
    model.load_state_dict(weights)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    return honest(case, **question)


def leaves_evaluation_mode(case: TrainingCase, *, model: Any, **question: Any) -> int:
    model.eval()
    torch.backends.cudnn.benchmark = True
    return honest(case, **question)


def _by_name(cache: dict[str, int], case: TrainingCase, **question: Any) -> int:
    if question["global_batch_size"]:
        return honest(case, **question)
    if case.name not in cache:
        cache[case.name] = honest(case, **question)
    return cache[case.name]


def cached_by_name(narrow: TrainingCase) -> Callable[..., int]:
    """An earlier run, of the same model in another dtype, filled the cache: its key is the name alone."""

    def finder(case: TrainingCase, **question: Any) -> int:
        cache: dict[str, int] = {}
        _by_name(cache, narrow, **question)
        return _by_name(cache, case, **question)

    return finder


def reads_garbage(case: TrainingCase, **question: Any) -> int:
    """A run was killed while it wrote its cache; the next one believes what it finds."""
    written = json.dumps({"batch_size": 5, "device": "cpu"})[:14]
    return int(json.loads(written)["batch_size"])
