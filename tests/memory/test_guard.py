"""A block of training under a limit: what it says of the peak, and what an out-of-memory in it looks like."""

from __future__ import annotations

import contextlib
import pickle
import threading
from typing import Any

import pytest
import torch

from pytest_gputrain import OutOfMemory
from pytest_gputrain.memory.guard import OomGuard

MIB = 2**20


def megabytes(count: int) -> torch.Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def test_the_peak_is_the_sum_of_what_was_alive() -> None:
    with OomGuard() as guard:
        megabytes(3)
        kept = megabytes(2)
        kept.view(2, MIB)[0].fill_(1)
    assert guard.peak_bytes == 3 * MIB
    assert guard.by_category["other"] == 3 * MIB
    assert guard.oom is None


def test_an_operation_over_the_limit_raises_and_keeps_nothing() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, OomGuard("4MiB") as guard:
        kept = megabytes(3)
        torch.cat([kept, kept])
    error = caught.value
    assert isinstance(error, OutOfMemory) and str(guard.oom) == str(error)
    assert (error.requested, error.in_use, error.limit, error.device) == (6 * MIB, 3 * MIB, 4 * MIB, "cpu")
    assert guard.peak_bytes == 3 * MIB
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.__dict__) == (str(error), error.__dict__)


def test_a_block_that_catches_an_out_of_memory_and_goes_on_is_seen() -> None:
    with OomGuard("4MiB") as guard:
        megabytes(3)
        assert guard.swallowed is None
        with contextlib.suppress(RuntimeError):
            megabytes(5)
    assert guard.oom is None and guard.swallowed is not None and guard.swallowed.requested == 5 * MIB
    assert guard.notes == (f"the block caught an out-of-memory and went on: {guard.swallowed}",)
    with pytest.raises(OutOfMemory), guard:
        megabytes(5)
    assert guard.swallowed is None


def test_the_line_says_what_was_asked_for_where_and_what_was_in_use() -> None:
    with pytest.raises(OutOfMemory) as caught, OomGuard("4MiB"):
        kept = megabytes(3)
        line = kept.add(1)
        del line
    where = f"test_guard.py:{caught.traceback[0].lineno + 1} in {caught.traceback[0].name}"
    assert str(caught.value) == (
        f"out of memory on cpu: aten.add.Tensor needs 3.0 MiB with 3.0 MiB in use, of a limit of 4.0 MiB, "
        f"at {where} (in use: other 3.0 MiB); DefaultCPUAllocator: can't allocate memory"
    )
    assert caught.value.location == where


def test_what_looks_for_torchs_words_recognises_it() -> None:
    memory = pytest.importorskip("accelerate.utils.memory")
    tried = []

    @memory.find_executable_batch_size(starting_batch_size=8)  # type: ignore[untyped-decorator]
    def train(batch_size: int) -> None:
        tried.append(batch_size)
        megabytes(batch_size)

    with OomGuard("3MiB"):
        train()
    assert tried[0] == 8 and tried[-1] <= 3


def test_a_limit_is_exact() -> None:
    with OomGuard(3 * MIB):
        megabytes(3)
    with pytest.raises(OutOfMemory), OomGuard(3 * MIB - 1):
        megabytes(3)


def test_everything_that_the_block_made_is_free_again() -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    optimizer = torch.optim.Adam(net.parameters())

    def train() -> None:
        for size in (16, 32, 4096):
            outputs = net(torch.randn(size, 256))
            outputs.square().mean().backward()
            optimizer.step()

    with pytest.raises(OutOfMemory) as caught, OomGuard("8MiB", roots=(net, optimizer)) as guard:
        train()
    assert caught.value.by_category["optimizer state"] > 2 * MIB
    assert guard.left == ()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert guard.in_use < 4 * MIB  # parameters, and the state of an optimizer that lives on


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="notes of exceptions: Python 3.11")
def test_what_a_running_function_still_holds_is_said() -> None:
    with pytest.raises(OutOfMemory) as caught, OomGuard("4MiB"):
        kept = megabytes(3)
        megabytes(2)
    assert kept.numel() == 3 * MIB
    note: Any = caught.value.__notes__[0]  # type: ignore[attr-defined,unused-ignore]
    assert note.startswith("still held: 3.0 MiB (uint8[3145728], made at test_guard.py:")
    assert "held by `kept` in test_what_a_running_function_still_holds_is_said at " in note


def test_out_of_memory_of_another_form_leaves_as_ours() -> None:
    with pytest.raises(OutOfMemory) as caught, OomGuard() as guard:
        torch.empty(2**50, dtype=torch.uint8)
    assert str(caught.value).startswith("RuntimeError at test_guard.py:")
    assert caught.value.requested == 2**50
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert guard.oom is not None


def test_another_error_is_none_of_the_guards() -> None:
    with pytest.raises(TypeError, match="mine"), OomGuard("1MiB") as guard:
        raise TypeError("mine")
    assert guard.oom is None


def test_both_limits_of_nested_guards_hold() -> None:
    with pytest.raises(OutOfMemory) as caught, OomGuard("1MiB") as outer, OomGuard("8MiB") as inner:
        megabytes(2)
    assert caught.value.limit == MIB
    assert (outer.oom is None, inner.oom is None) == (False, False)
    with OomGuard("8MiB") as outer:
        with pytest.raises(OutOfMemory), OomGuard("1MiB"):
            megabytes(2)
        megabytes(4)
    assert outer.peak_bytes == 4 * MIB


def test_a_guard_measures_its_own_thread() -> None:
    peaks = {}

    def work(size: int) -> None:
        with OomGuard() as guard:
            megabytes(size)
        peaks[size] = guard.peak_bytes

    threads = [threading.Thread(target=work, args=(size,)) for size in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peaks == {1: MIB, 2: 2 * MIB}


def test_a_guard_can_be_used_again_but_not_twice_at_once() -> None:
    guard = OomGuard("2MiB")
    with pytest.raises(OutOfMemory), guard:
        megabytes(3)
    with guard:
        megabytes(1)
        with pytest.raises(RuntimeError) as caught, guard:
            pass
    assert (
        str(caught.value) == "this oom_guard is in use already; a block within its block needs one of its own"
    )
    assert (guard.peak_bytes, guard.oom) == (MIB, None)


def test_roots_above_the_limit_end_it_before_it_begins() -> None:
    net = torch.nn.Linear(1024, 1024, bias=False)
    guard = OomGuard("1MiB", roots=[net])
    with pytest.raises(OutOfMemory) as caught, guard:
        pytest.fail("the block ran")
    assert guard.oom is not None
    assert str(caught.value).startswith(
        "out of memory on cpu: the model or optimizer given needs 4.0 MiB with 0 bytes in use, "
        "of a limit of 1.0 MiB"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": "40 parsecs"}, "'40 parsecs' is not a size above 0 such as "),
        ({"limit": "40"}, "'40' is 40 bytes; give the unit, such as "),
        ({"limit": 0}, "0 is not a size above 0 such as "),
        ({"limit": "-1GB"}, "'-1GB' is not a size above 0 such as "),
        ({"device": "gpu"}, "'gpu' is not a device; give 'cpu', 'cuda' or 'cuda:0'"),
        ({"device": "meta"}, "memory of device 'meta' is not known here; give 'cpu', 'cuda' or 'cuda:0'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there: torch sees "),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        OomGuard(**arguments)
    assert str(caught.value).startswith(message)


def test_roots_are_modules_and_optimizers() -> None:
    with (
        pytest.raises(ValueError, match=r"^roots are modules and optimizers, not list$"),
        OomGuard(roots=[[1]]),
    ):
        pass


@pytest.mark.parametrize("alone", [False, True])
def test_a_root_need_not_be_in_a_list(alone: bool) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 1))
    net.register_buffer("own", torch.zeros(2))
    with OomGuard(roots=net if alone else [net]) as guard:
        pass
    assert guard.by_category == dict.fromkeys(guard.by_category, 0) | {"parameters": 16, "buffers": 8}


def test_the_largest_tensors_with_their_line() -> None:
    with OomGuard() as guard:
        megabytes(1).add(1)
    first, second = guard.largest
    assert first.num_bytes == second.num_bytes == MIB
    assert str(first.location).startswith("test_guard.py:")
    assert guard.figures().startswith("peak 2.0 MiB on cpu: other 2.0 MiB\n  1.0 MiB other uint8[1048576], ")


@pytest.mark.slow
def test_a_compiled_function_is_said_to_run_uncompiled() -> None:
    compiled = torch.compile(lambda x: x.sin().cos(), backend="eager")
    with OomGuard() as guard:
        compiled(torch.ones(1000, 100))
    torch.compiler.reset()
    assert guard.notes == (
        "a function that torch.compile was given ran uncompiled, as torch does while operations are watched: "
        "the peak is that of eager execution",
    )


def test_what_is_loaded_uncounted_counts_once_it_is_used() -> None:
    data_set = [torch.ones(256) for _ in range(4)]
    weight = torch.ones(256)
    with OomGuard() as guard:
        with guard.uncounted():
            batch = torch.stack(data_set)
        assert guard.in_use == 0
        out = batch * weight
        assert (guard.in_use, guard.made_bytes) == (4096 + 1024 + 4096, 4096)
        del out


class Keeps:
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []


def test_what_only_an_object_in_hand_elsewhere_holds() -> None:
    keeps = [Keeps()]
    with OomGuard() as guard:
        guard.note_every_line()
        keeps[0].seen.append(torch.ones(4))
    (left,) = guard.left_in(step=keeps.pop())
    assert str(left).startswith("16 bytes (float32[4], made at test_guard.py:")
    assert str(left).endswith(" held by `step`.seen[0] in the case")
