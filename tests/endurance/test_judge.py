"""What is said of a run's records: once for one cause, with rank, step and way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pytest_gputrain.endurance.held import Held
from pytest_gputrain.endurance.judge import growing, grows, pace, remarks
from pytest_gputrain.endurance.records import StepRecord

KB = 1024
STEPS = 200
KEPT = Held(steps=100, tensors=100, tensor_bytes=400 * KB, graph_nodes=0, holder="`kept`[…] in train.py")


def records(**a_step: float) -> list[StepRecord]:
    """Fields that grow by so much a step."""
    start: dict[str, Any] = {
        "heap_bytes": 10**8,
        "rss_bytes": 10**8,
        "fds": 20,
        "threads": 5,
        "objects": 10**6,
        "hooks": 4,
        "groups": 1,
    }
    fields = [
        {name: value + round(a_step.get(name, 0) * step) for name, value in start.items()}
        for step in range(1, STEPS + 1)
    ]
    return [StepRecord(step=number, loss=1.0, seconds=0.1, **one) for number, one in enumerate(fields, 1)]


def test_tensors_that_are_kept_and_who_keeps_them() -> None:
    ranks = {0: records(), 1: records(heap_bytes=4 * KB, rss_bytes=200 * KB)}
    (found,), notes = growing(ranks, {1: KEPT})
    assert (found.kind, found.rank, notes) == ("memory", 1, [])
    assert found.message == (
        "memory grows without end on rank 1, by 4.0 KiB a step from step 21 to 200; keep numbers (.item()) "
        "or drop what steps keep\n"
        "  632.0 KiB in all; with 95 % confidence between 4.0 KiB and 4.0 KiB a step\n"
        "  held by `kept`[…] in train.py\n"
        "  +100 live tensors (400.0 KiB) in the last 100 steps"
    )
    assert grows(ranks[1])
    assert not grows(ranks[0])


def test_what_grows_on_several_ranks_is_not_told_of_one() -> None:
    """Nor where it is beyond doubt on one alone: the other has as good as the same slope."""
    jumps = [replace(r, heap_bytes=10**8 + 4 * KB * r.step + 10**6 * (r.step > 150)) for r in records()]
    worst = records(heap_bytes=5 * KB)
    assert not grows(jumps)
    (found,), _ = growing({0: jumps, 1: worst}, {1: KEPT})
    assert found.rank is None
    assert found.message.startswith(
        "memory grows without end on every rank, by up to 5.0 KiB a step from step "
    )
    (found,), _ = growing({0: jumps, 1: worst, 2: records()}, {1: KEPT})
    assert found.message.startswith(
        "memory grows without end on ranks 0-1, by up to 5.0 KiB a step from step "
    )


def test_a_measure_that_became_rarer_is_judged_by_points_that_lie_evenly() -> None:
    """As after a resumption too, in which it is measured at every step again."""

    def seldom(one: StepRecord) -> StepRecord:
        apart = 1 if one.step < 40 or one.step > 150 else 4
        return one if one.step % apart == 0 else replace(one, heap_bytes=None)

    leaks, holds = ([seldom(one) for one in records(heap_bytes=a_step)] for a_step in (4 * KB, 0))
    (found,), _ = growing({0: leaks}, {0: KEPT})
    assert found.message.startswith("memory grows without end on rank 0, by 4.0 KiB a step")
    assert growing({0: holds}, {0: None}) == ([], [])


def test_graphs_of_earlier_steps() -> None:
    held = Held(steps=100, tensors=100, tensor_bytes=0, graph_nodes=1800, holder="`losses`[…] in train.py")
    (found,), _ = growing({0: records(heap_bytes=9 * KB)}, {0: held})
    assert found.kind == "graph"
    assert found.message == (
        "the autograd graphs of earlier steps are kept on rank 0, by 18.0 nodes and 9.0 KiB a step from step "
        "21 to 200; keep loss.item() or loss.detach(), not the loss\n"
        "  1.4 MiB in all; with 95 % confidence between 9.0 KiB and 9.0 KiB a step\n"
        "  held by `losses`[…] in train.py"
    )


def test_exceptions_that_keep_the_graphs_of_their_frames() -> None:
    held = Held(
        steps=99, tensors=99, tensor_bytes=0, graph_nodes=99, holder="`errors`[…].__traceback__ > `out`"
    )
    (found,), _ = growing({0: records(heap_bytes=9 * KB)}, {0: held})
    assert (
        "; keep str(error), not the exception: its traceback keeps all variables of its frames\n"
        in found.message
    )


def test_host_memory_that_no_tensor_explains() -> None:
    held = Held(steps=100, tensors=0, tensor_bytes=0, graph_nodes=0)
    for kind in ("heap_bytes", "rss_bytes"):
        (found,), _ = growing({0: records(**{kind: 256.0 * KB})}, {0: held})
        assert found.kind == "host_memory"
        assert found.message.splitlines()[0] == (
            "host memory grows without end on rank 0, by 256.0 KiB a step from step 21 to 200, and live "
            "tensors do not; look for lists, arrays and caches that each step adds to"
        )
    assert growing({0: records(heap_bytes=500)}, {0: held}) == ([], [])


def test_what_only_waits_for_the_collector_is_a_note() -> None:
    held = Held(steps=100, tensors=0, tensor_bytes=0, graph_nodes=0, freed_bytes=700 * KB)
    found, notes = growing({0: records(heap_bytes=4 * KB)}, {0: held})
    assert not found
    assert notes == [
        "700.0 KiB on rank 0 were freed only by Python's collector: steps leave reference cycles that hold "
        "memory until it runs"
    ]
    (note,) = growing({0: records(heap_bytes=4 * KB)}, {0: replace(held, collects=False)})[1]
    assert note.endswith(" until gc.collect() is called: the program has switched the collector off")


def test_small_objects() -> None:
    held = Held(steps=100, tensors=0, tensor_bytes=0, graph_nodes=0)
    (found,), _ = growing({0: records(objects=400, rss_bytes=40 * KB), 1: records()}, {0: held})
    assert found.message == (
        "Python objects grow without end on rank 0, by 400 a step from step 21 to 200: 63,200 in all; look "
        "for lists, dicts and caches that each step adds to"
    )
    assert grows(records(objects=400))
    assert growing({0: records(objects=90)}, {0: held}) == ([], [])
    (note,) = growing({0: records(objects=400)}, {0: replace(held, freed_objects=60_000)})[1]
    assert note.startswith("60,000 objects on rank 0 were freed only by Python's collector: ")


def test_files_and_threads() -> None:
    held = Held(steps=100, tensors=0, tensor_bytes=0, graph_nodes=0)
    found, _ = growing({0: records(fds=1, threads=1, heap_bytes=5 * KB)}, {0: held})
    assert [one.message for one in found] == [
        "open files grow on rank 0, by 1 a step from step 21 to 200: 158 in all; close what each step opens",
        "threads grow on rank 0, by 1 a step from step 21 to 200: 158 in all; join what each step starts",
    ]


def timed(ready: float, late: float, *, steps: int = STEPS, update: float = 0.01) -> list[StepRecord]:
    return [
        StepRecord(
            step=step,
            loss=1.0,
            seconds=1.0,
            ready_seconds=late if step > steps // 2 else ready,
            update_seconds=update,
        )
        for step in range(1, steps + 1)
    ]


def test_steps_that_get_slower() -> None:
    (found,) = pace({0: timed(0.09, 0.19), 1: timed(0.09, 0.19)})
    assert (found.kind, found.step, found.rank) == ("step_time", 101, None)
    assert found.message == (
        "steps take 2.0 times as long from step 101 on: 200.0 ms, 100.0 ms before; look for what a step does "
        "for all steps before it\n"
        "  time in which others had the processor, or other ranks were waited for, does not count; where the "
        "work grows on purpose, name stable_training:step_time in expected_failures"
    )


def test_a_rank_that_is_waited_for() -> None:
    ranks = {0: timed(0.09, 0.09), 1: timed(0.29, 0.29)}
    (found,) = pace(ranks)
    assert (found.kind, found.step, found.rank) == ("straggler", 21, 1)
    assert found.message == (
        "rank 1 keeps the others waiting, in 100 % of the steps from step 21 on: 290.0 ms before its "
        "gradients are there, 90.0 ms on the others; give it as much to do as them\n"
        "  time in which others had the processor does not count"
    )
    assert remarks(ranks) == []


def test_remarks() -> None:
    little = {0: timed(0.001, 0.001, update=0.001), 1: timed(0.004, 0.004, update=0.001)}
    assert not pace(little)
    assert [note.split(",")[0] for note in remarks(little)] == ["rank 1 keeps the others waiting"]
    assert remarks(little)[0].endswith(
        "; give it as much to do as them; so little may be the machine's doing"
    )
    short = {0: timed(0.1, 0.1, steps=20)}
    assert remarks(short) == ["20 steps cannot show memory that grows (27 can)"]


def test_the_container_that_grows_with_it_is_told() -> None:
    held = replace(KEPT, tensors=0, tensor_bytes=0, holder="", container="`log` in train.py (list of 9,000)")
    for field in ("objects", "fds", "threads"):
        (found,), _ = growing({0: records(**{field: 200})}, {0: held})
        assert found.message.splitlines()[1:] == ["  grows with it: `log` in train.py (list of 9,000)"]
    (found,), _ = growing({0: records(hooks=1)}, {0: held})
    assert found.message.endswith("register them once, or call remove() on what registering returned")
    (found,), _ = growing({0: records(heap_bytes=40 * KB, rss_bytes=40 * KB)}, {0: held})
    assert found.message.splitlines()[-1] == "  grows with it: `log` in train.py (list of 9,000)"


def test_hooks_and_groups_come_before_the_memory_they_take() -> None:
    ranks = {0: records(groups=1, heap_bytes=4 * KB)}
    found, _ = growing(ranks, {0: KEPT})
    assert [one.kind for one in found] == ["groups", "memory"]


def shaped(is_new: Callable[[int], bool], grows: Callable[[int], bool]) -> list[StepRecord]:
    """200 KiB of malloc's in the steps that grow."""
    found, shapes, heap = [], 0, 10**8
    for one in records():
        shapes += is_new(one.step)
        heap += 200 * KB * grows(one.step)
        found.append(replace(one, heap_bytes=heap, rss_bytes=heap, shapes=shapes))
    return found


def test_what_torch_keeps_for_each_new_shape_is_a_note() -> None:
    """As of convolutions over sequences of any length; what grows in other steps too is a finding."""
    none = Held(steps=100, tensors=0, tensor_bytes=0, graph_nodes=0)
    some: Callable[[int], bool] = lambda step: step % 3 > 0  # noqa: E731
    found, (note,) = growing({0: shaped(some, some)}, {0: none})
    assert not found
    assert note.startswith("host memory grew by ")
    assert "whose batches had a shape for the first time" in note
    (unsure,), _ = growing({0: shaped(lambda step: True, lambda step: True)}, {0: none})
    assert unsure.message.splitlines()[-1].startswith("  every batch had another shape: torch keeps what")
    (found_too,), _ = growing({0: shaped(lambda step: step % 3 > 0, lambda step: True)}, {0: none})
    assert found_too.kind == "host_memory"
    (kept,), _ = growing({0: shaped(lambda step: True, lambda step: True)}, {0: KEPT})
    assert kept.kind == "memory"


def test_host_memory_that_tensors_take_is_told_with_who_holds_them() -> None:
    """In a run that ends before malloc's memory was measured often enough."""
    ranks = {0: [replace(one, heap_bytes=None) for one in records(rss_bytes=1024 * KB)]}
    (found,), _ = growing(ranks, {0: replace(KEPT, tensor_bytes=100 * 1024 * KB)})
    assert found.kind == "memory"
    assert "held by `kept`" in found.message
    (found,), _ = growing(ranks, {0: None})
    assert found.kind == "host_memory"
