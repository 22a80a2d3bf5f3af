"""torchrun in a forked child: torch's own command line and elastic agent, ranks forked instead of executed.

The one thing that is replaced is how a worker process comes to be: ``SubprocessHandler._popen`` forks a
process that has torch imported, where torchrun would start an interpreter. Rendezvous, environment,
restarts, monitoring and error text are torch's (``torch.distributed.run``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import place, process, rank, script


def run(spec: Mapping[str, Any], number: int, fds: Sequence[int], parent: int) -> NoReturn:
    """Plays torchrun on node ``number`` of this host and ends the process with torchrun's exit code."""
    per_node = spec["nproc"] + 1
    mine = list(fds[number * per_node : (number + 1) * per_node])
    search_path = list(sys.path)
    place.take_place(parent, Path(spec["folder"]), -1 - number, spec["environ"], spec["cwd"])
    _replace_popen(spec, mine[0], mine[1:], search_path)
    import torch.distributed.run as torchrun

    code = 0
    try:
        options = _rendezvous(spec, number)
        # run() and not main(): main's @record wants to own the exit of the process.
        with _nothing_of_where_nodes_meet():
            arguments = torchrun.parse_args([*spec["torchrun"], *options, *spec["command"]])
        torchrun.run(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # ChildFailedError above all: torchrun prints it and exits 1
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def _nothing_of_where_nodes_meet() -> Iterator[None]:
    """torchrun takes what its command line leaves out from ``PET_*``: there another machine's address and
    this one's number, which are not this launch's, or have been followed already. Ranks see them as always.
    """
    names = ("LOCAL_ADDR", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "STANDALONE")
    place = {f"PET_{name}" for name in names} | {name for name in os.environ if name.startswith("PET_RDZV_")}
    kept = {name: os.environ.pop(name) for name in place if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _rendezvous(spec: Mapping[str, Any], number: int) -> list[str]:
    """Options that let nodes meet: those of one host, or those that have met already; none for one node."""
    if (node := spec.get("node")) is not None:
        _number_ranks_by_node(node["number"])
        return [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={node['endpoint']}",
            f"--rdzv-id={node['run']}",
            f"--local-addr={node['address']}",
            "--rdzv-conf=is_host=0",  # the store is there already
        ]
    if not spec["simulated_nodes"]:
        return []
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    port_file = Path(spec["folder"]) / "rendezvous-port"
    if number == 0:
        # The kernel chooses the port; torch's rendezvous joins this store instead of opening one.
        store = TCPStore("127.0.0.1", 0, is_master=True, multi_tenant=True, wait_for_workers=False)
        globals()["_store"] = store  # closed with the process, not with this function
        part = port_file.with_suffix(".part")
        part.write_text(str(store.port))
        part.rename(port_file)
    while not port_file.exists():  # bounded by the launch's deadline
        time.sleep(0.01)
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port_file.read_text()}"]


def _number_ranks_by_node(number: int) -> None:
    """torch's rendezvous sorts nodes by their address; this one by the number that the user has given them.

    Where torch's private parts have moved it is torch's order, which ranks tell when they start.
    """
    import torch.distributed.elastic.rendezvous.dynamic_rendezvous as dynamic

    with contextlib.suppress(Exception):
        original = dynamic._NodeDescGenerator.generate

        def generate(self: Any, local_addr: str | None = None) -> Any:
            made = original(self, local_addr)
            return type(made)(made.addr, made.pid, number)

        dynamic._NodeDescGenerator.generate = generate  # type: ignore[method-assign]
        dynamic.sorted = lambda nodes: sorted(nodes, key=lambda node: node.local_id)  # type: ignore[attr-defined]


def _replace_popen(
    spec: Mapping[str, Any], agent_fd: int, rank_fds: Sequence[int], search_path: list[str]
) -> None:
    import torch.distributed.elastic.multiprocessing.api as api
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    events = rank.Link(agent_fd, -1)

    class ForkedHandler(SubprocessHandler):
        """Starts a worker by fork."""

        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return ForkedProcess(spec, args, env, rank_fds, search_path, events)

    def get_handler(*args: Any, **kwargs: Any) -> ForkedHandler:
        kwargs.setdefault("numa_options", None)
        return ForkedHandler(*args, **_accepted(SubprocessHandler.__init__, kwargs))

    api.get_subprocess_handler = get_handler  # type: ignore[attr-defined]


def _accepted(function: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``kwargs`` that this version of torch knows."""
    import inspect

    known = inspect.signature(function).parameters
    return {name: value for name, value in kwargs.items() if name in known}


class ForkedProcess:
    """The part of ``subprocess.Popen`` that the elastic agent uses, around a forked rank."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        command: Sequence[str],
        env: Mapping[str, str],
        rank_fds: Sequence[int],
        search_path: list[str],
        events: rank.Link,
    ) -> None:
        self.returncode: int | None = None
        self._events, self._rank = events, int(env["RANK"])
        self._restart = int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
        ready_read, ready_write = os.pipe()
        agent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                fd = rank_fds[int(env["LOCAL_RANK"])]
                place.take_place(agent, Path(spec["folder"]), self._rank, env, None)
                os.write(ready_write, b"1")
                _close_links(rank_fds, keep=fd)
                _threads_as_told(env)
                link = rank.Link(fd, self._rank, self._restart)
                script.run(link, command, search_path, rank.tracing(spec, self._rank))
            finally:
                traceback.print_exc()
                os._exit(70)
        os.close(ready_write)
        os.read(ready_read, 1)  # the agent signals the process group: it must exist
        os.close(ready_read)

    def poll(self) -> int | None:
        """The exit code, minus the signal number for a signal, or None while it runs."""
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
                    code, name = process.exit_of(status)
                    self._tell(code, name)
        return self.returncode

    def _tell(self, code: int | None, name: str | None) -> None:
        with contextlib.suppress(OSError):
            self._events.exited(self._rank, self._restart, code, name)

    def wait(self, timeout: float | None = None) -> int:
        """Waits at most ``timeout`` seconds. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + (timeout if timeout is not None else 3600)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 3600)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signals the rank if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _close_links(fds: Sequence[int], keep: int) -> None:
    """Closes the other ranks' links, and nothing else of the agent's.

    libuv remembers the numbers of two descriptors and closes them in every forked child: were they closed
    here, the numbers would be given to the rank's own files, and its data-loader workers would lose those.
    """
    for fd in fds:
        if fd != keep:
            os.close(fd)


def _threads_as_told(env: Mapping[str, str]) -> None:
    """torch read OMP_NUM_THREADS when the fork server started; torchrun may have set it since."""
    import torch

    with contextlib.suppress(ValueError, KeyError):
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
