"""What a call leaves behind gets the next one new ranks, and says why; what it does not keeps them.

One table: a body a row. ``None`` stands for clean, text for what the reason has to say.
"""

from __future__ import annotations

import atexit
import builtins
import contextvars
import faulthandler
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from pytest_gputrain import launch
from pytest_gputrain.launch import warm

Body = Callable[[], Any]
CASES: dict[str, tuple[str | None, Body]] = {}


def leaves(reason: str | None) -> Callable[[Body], Body]:
    """Enters a body into the table."""

    def enter(body: Body) -> Body:
        CASES[body.__name__] = (reason, body)
        return body

    return enter


def rank() -> int:
    return int(os.environ["RANK"])


# -- clean ------------------------------------------------------------------------------------------


@leaves(None)
def nothing() -> None:
    pass


@leaves(None)
def collectives() -> None:
    import torch
    import torch.distributed as dist

    for _ in range(20):
        dist.all_reduce(torch.ones(3))
    dist.barrier()
    dist.all_gather_object([None, None], {"rank": rank()})
    work = dist.all_reduce(torch.ones(3), async_op=True)
    work.wait()


@leaves(None)
def point_to_point() -> None:
    import torch
    import torch.distributed as dist

    if rank() == 0:
        dist.send(torch.ones(3), 1)
        dist.isend(torch.ones(3), 1).wait()  # type: ignore[union-attr]
    else:
        dist.recv(torch.ones(3), 0)
        dist.irecv(torch.ones(3)).wait()  # type: ignore[union-attr]


@leaves(None)
def a_group_that_is_destroyed() -> None:
    import torch
    import torch.distributed as dist

    group = dist.new_group()
    dist.all_reduce(torch.ones(1), group=group)
    dist.destroy_process_group(group)


@leaves(None)
def training_with_ddp() -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()


@leaves(None)
def seeds() -> None:
    import numpy as np
    import torch

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


@leaves(None)
def context_managers_that_end() -> None:
    import torch

    with torch.no_grad(), torch.device("meta"), torch.autograd.set_detect_anomaly(True):
        torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")


@leaves(None)
def threads_and_processes_that_end() -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    subprocess.run(["true"], check=True)


@leaves(None)
def a_context_variable() -> None:
    contextvars.ContextVar[int]("left").set(1)


@leaves(None)
def output() -> None:
    print("x" * 1000)
    os.write(2, b"y" * 1000)


@leaves(None)
def a_data_loader_with_workers() -> None:
    import torch
    from torch.utils.data import DataLoader

    numbers: Any = list(range(4))
    assert len(list(DataLoader(numbers, batch_size=2, num_workers=1))) == 2
    assert torch.is_grad_enabled()


@leaves(None)
def a_temporary_file() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x")


@leaves(None)
def a_dump_of_faulthandler_later() -> None:
    faulthandler.dump_traceback_later(3600)


@leaves(None)
def an_exit_handler() -> None:
    atexit.register(print)  # ranks leave by os._exit, warm or fresh: it never runs


# -- dirty: the process -------------------------------------------------------------------------------


@leaves("environment: LAUNCH_TEST_LEFT left")
def a_variable_more() -> None:
    os.environ["LAUNCH_TEST_LEFT"] = "1"


@leaves("environment: HOME gone")
def a_variable_less() -> None:
    os.environ.pop("HOME")


@leaves("environment: WORLD_SIZE changed")
def a_variable_changed_on_one_rank() -> None:
    if rank() == 1:
        os.environ["WORLD_SIZE"] = "7"


@leaves("working directory: ")
def a_working_directory() -> None:
    os.chdir("/")


@leaves("working directory cannot be read any more: FileNotFoundError")
def a_working_directory_that_is_gone() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)


@leaves("sys.path: changed")
def a_search_path() -> None:
    sys.path.insert(0, "/nowhere")


@leaves("sys.argv: changed")
def arguments() -> None:
    sys.argv.append("--left")


@leaves("threads: helper")
def a_thread() -> None:
    threading.Thread(target=time.sleep, args=(600,), name="helper", daemon=True).start()


@leaves("child processes: ")
def a_child_process() -> None:
    subprocess.Popen(["sleep", "600"])


@leaves("child processes left running: ")
def a_daemon() -> None:
    if rank() == 0:
        subprocess.run(["sh", "-c", "sleep 600 &"], check=True)


@leaves("signal handlers: SIGUSR2 changed")
def a_signal_handler() -> None:
    signal.signal(signal.SIGUSR2, lambda *_: None)


@leaves("signal mask: ")
def a_blocked_signal() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


@leaves("timers: ")
def an_alarm() -> None:
    signal.alarm(3600)


@leaves("umask: ")
def a_umask() -> None:
    os.umask(0o111)


@leaves("priority: ")
def a_priority() -> None:
    os.nice(1)


@leaves("resource limits: RLIMIT_NOFILE changed")
def a_resource_limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))


@leaves("open files: grew from ")
def open_files() -> None:
    for _ in range(100):
        os.open("/dev/null", os.O_RDONLY)


@leaves("memory: grew from ")
def memory() -> None:
    sys.left = b"x" * (1200 << 20) if rank() == 0 else b""  # type: ignore[attr-defined]


@leaves("standard streams: sys.stdout changed")
def a_stream() -> None:
    import io

    sys.stdout = io.StringIO()


@leaves("standard streams: sys.stderr changed")
def a_closed_stream() -> None:
    sys.stderr.close()


@leaves("interpreter hooks: sys.excepthook changed")
def a_hook_of_the_interpreter() -> None:
    sys.excepthook = lambda *_: None


@leaves("interpreter hooks: sys.settrace changed")
def a_trace_function() -> None:
    sys.settrace(lambda *_: None)


@leaves("interpreter limits: ")
def a_recursion_limit() -> None:
    sys.setrecursionlimit(5000)


@leaves("garbage collector: ")
def a_garbage_collector_that_is_off() -> None:
    gc.disable()


@leaves("warnings filters: changed")
def warnings_as_errors() -> None:
    warnings.simplefilter("error")


@leaves("logging: root changed")
def a_log_level() -> None:
    logging.basicConfig(level=logging.DEBUG)


@leaves("logging: disable changed")
def logging_that_is_off() -> None:
    logging.disable(logging.CRITICAL)


@leaves("replaced functions: builtins.print left, time.sleep left")
def functions_of_python() -> None:
    builtins.print = time.sleep = lambda *_, **__: None  # type: ignore[assignment]


# -- dirty: torch -------------------------------------------------------------------------------------


@leaves("default dtype: torch.float32 became torch.float64")
def a_default_dtype() -> None:
    import torch

    torch.set_default_dtype(torch.float64)


@leaves("default device: cpu became meta")
def a_default_device() -> None:
    import torch

    torch.set_default_device("meta")


@leaves("autograd: is_grad_enabled changed")
def grad_mode() -> None:
    import torch

    torch.set_grad_enabled(False)


@leaves("autograd: is_anomaly_enabled changed")
def anomaly_detection() -> None:
    import torch

    torch.autograd.set_detect_anomaly(True)


@leaves("flags: deterministic_algorithms changed")
def deterministic_algorithms() -> None:
    import torch

    torch.use_deterministic_algorithms(True)


@leaves("flags: cudnn_benchmark changed")
def a_flag_of_cudnn() -> None:
    import torch

    torch.backends.cudnn.benchmark = True


@leaves("float32_matmul_precision changed")
def matmul_precision() -> None:
    import torch

    torch.set_float32_matmul_precision("medium")


@leaves("threads of torch: ")
def a_thread_count() -> None:
    import torch

    torch.set_num_threads(2)


@leaves("function modes: 0 became 1")
def a_function_mode() -> None:
    from torch.overrides import TorchFunctionMode

    class Refuses(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise RuntimeError("no torch any more")

    Refuses().__enter__()  # type: ignore[no-untyped-call]


@leaves("dispatch modes: 0 became 1")
def a_dispatch_mode() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise RuntimeError("no torch any more")

    Refuses().__enter__()  # type: ignore[no-untyped-call]


@leaves("saved tensor hooks: ")
def saved_tensor_hooks() -> None:
    import torch

    torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x).__enter__()


@leaves("global hooks: forward_hooks changed")
def a_hook_on_all_modules() -> None:
    from torch.nn.modules.module import register_module_forward_hook

    register_module_forward_hook(lambda *_: None)


@leaves("global hooks: optimizer_post_hooks changed")
def a_hook_on_all_optimizers() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: None)


@leaves("replaced functions: torch.distributed.all_reduce left")
def a_function_of_torch() -> None:
    import torch.distributed as dist

    dist.all_reduce = lambda *_, **__: None


@leaves("print options: precision changed")
def print_options() -> None:
    import torch

    torch.set_printoptions(precision=2)


@leaves("compiled code: ")
def compiled_code() -> None:
    import torch

    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))


# -- dirty: between the ranks -------------------------------------------------------------------------


@leaves("collectives: 1 started and not completed")
def a_collective_on_one_rank() -> None:
    import torch
    import torch.distributed as dist

    if rank() == 0:
        dist.all_reduce(torch.ones(1), async_op=True)


@leaves("point-to-point operations: 1 not waited for")
def receives_that_are_open() -> None:
    import torch
    import torch.distributed as dist

    dist.irecv(torch.ones(1), 1 - rank())


@leaves("functional collectives: 1 not waited for")
def a_functional_collective() -> None:
    import torch
    import torch.distributed._functional_collectives as functional

    sys.left = functional.all_reduce(torch.ones(1), "sum", [0, 1])  # type: ignore[attr-defined]


@leaves("process group: group '1' left")
def a_process_group() -> None:
    import torch.distributed as dist

    dist.new_group()


@leaves("process group: ")
def no_process_group() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


@leaves("process group: ")
def another_process_group() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
    dist.init_process_group("gloo")
    dist.barrier()


def healthy() -> int:
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    return os.getpid()


@pytest.mark.parametrize("name", CASES)
def test_ranks_are_kept_exactly_if_the_call_left_nothing(name: str) -> None:
    reason, body = CASES[name]
    before = launch(healthy, isolation="warm")
    assert before.recycled is None
    result = launch(body, isolation="warm")
    after = launch(healthy, isolation="warm")
    if reason is None:
        assert result.recycled is None
        assert after.values == before.values
    else:
        assert result.recycled is not None
        assert reason in result.recycled
        assert warm.POOL.recycled[-1] == result.recycled
        assert not set(after.values) & set(before.values)
