"""What counts as out-of-memory: every form of it, and nothing else."""

from __future__ import annotations

import errno

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from pytest_gputrain import OutOfMemory
from pytest_gputrain.memory.oom import is_oom

# Each as the library prints it.
TEXTS = [
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "HIP error: out of memory",
    "XPU out of memory. Tried to allocate 2.00 GiB",
    "MPS backend out of memory (MPS allocated: 17.00 GiB)",
    "Triton Error [CUDA]: out of memory",
    "NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled cuda error\nCuda failure 2 'out of memory'",
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8000000000000 bytes.",
    "unable to mmap 8000 bytes from file </model.bin>: Cannot allocate memory (12)",
    "std::bad_alloc",
]
OTHERS = [
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a "),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("out of resource: shared memory, Required: 135168, Hardware limit: 101376"),
    RuntimeError("this queue is out of memory slots"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x9)"),
    ValueError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    AssertionError("CUDA out of memory"),
    TypeError("DefaultCPUAllocator: can't allocate memory"),
    NotImplementedError("CUDA out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_torch_and_its_libraries_print(text: str) -> None:
    assert is_oom(RuntimeError(text))


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: f"{type(error).__name__}: {str(error)[:40]}")
def test_what_is_none(error: BaseException) -> None:
    assert not is_oom(error)


def test_exceptions_that_say_it_by_their_type() -> None:
    for error in (torch.OutOfMemoryError("x"), OutOfMemory("x"), MemoryError(), OSError(errno.ENOMEM, "")):
        assert is_oom(error)


def test_the_real_allocator_of_the_cpu() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_oom(caught.value)


def test_what_was_raised_from_one_is_one() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as error:
            raise ValueError("step 3 failed") from error
    assert is_oom(caught.value)


def test_a_wrapper_raised_while_handling_one_is_one() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError:
            raise RuntimeError("step 3 failed")  # noqa: B904
    assert is_oom(caught.value)


def test_a_bug_in_the_code_that_handles_one_is_none() -> None:
    with pytest.raises(TypeError) as caught:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError:
            len(3)  # type: ignore[arg-type]
    assert not is_oom(caught.value)


def test_raised_from_none_hides_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError:
            raise RuntimeError("the loader is empty") from None
    assert not is_oom(caught.value)


class Group(Exception):
    """As an exception group of Python 3.11."""

    def __init__(self, *exceptions: Exception) -> None:
        super().__init__("ranks failed")
        self.exceptions = exceptions


def test_a_group_is_one_when_all_of_it_is() -> None:
    out = torch.OutOfMemoryError("CUDA out of memory")
    assert is_oom(Group(out, RuntimeError("CUDA error: out of memory")))
    assert not is_oom(Group(out, TypeError("x")))
    assert not is_oom(Group())


def test_the_printed_traceback_of_another_process() -> None:
    text = (
        '\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n  File "a"'
    )
    assert is_oom(ProcessRaisedException(f"{text}\ntorch.OutOfMemoryError: CUDA out of memory. Tried", 1, 2))
    assert is_oom(ProcessRaisedException(f"{text}\nRuntimeError: CUDA error: out of memory", 1, 2))
    assert not is_oom(ProcessRaisedException(f"{text}\nTypeError: CUDA out of memory", 1, 2))
    handled = f"{text}\ntorch.OutOfMemoryError: CUDA out of memory\n\nDuring handling:\n\nTypeError: a bug"
    assert not is_oom(ProcessRaisedException(handled, 1, 2))


@pytest.mark.slow
def test_one_inside_of_a_compiler_backend() -> None:
    def backend(graph: object, inputs: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError) as caught:
        torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    torch.compiler.reset()
    assert is_oom(caught.value)
