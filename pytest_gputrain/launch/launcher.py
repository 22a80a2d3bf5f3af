"""``launch``: a function or a script on N ranks, and a verdict that can be believed."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..devices.visible import VARIABLE
from . import fresh, payload, request, told, warm
from .aftermath import Aftermath
from .errors import LaunchError, LaunchUsageError, ServerLost
from .folder import Folder
from .nodes import alike, where
from .records import Cause, RankResult, Verdict
from .request import LaunchDefaults
from .result import LaunchResult

Trace = bool | str | Sequence[str] | Mapping[str, bool] | None


class Launcher:
    """Starts ranks, watches them, ends them. Calling it runs a function; ``.torchrun`` runs a script.

    ``cancelled`` is asked several times a second while ranks run that are not warm: when it says True, they
    are ended and LaunchCancelled is raised. So one thread can end the launch of another.
    """

    def __init__(
        self, *, defaults: LaunchDefaults | None = None, cancelled: Callable[[], bool] | None = None
    ) -> None:
        self.defaults = defaults or LaunchDefaults()
        self._cancelled = cancelled

    def __call__(
        self,
        target: Callable[..., Any],
        *args: Any,
        world_size: int = 2,
        device: str | None = None,
        backend: str | None = None,
        isolation: str = "fresh",
        timeout: float | None = None,
        stall: float | None = None,
        env: Mapping[str, str | None] | None = None,
        trace: Trace = None,
        check: bool = True,
        **kwargs: Any,
    ) -> LaunchResult:
        """Runs ``target(*args, **kwargs)`` on ``world_size`` ranks in new processes, process group ready.

        ``target`` may be a closure, a lambda or a nested function; arguments and return values travel by
        pickle, tensors come back on CPU. The group is gloo on ``device="cpu"`` and NCCL on ``"cuda"``.
        With ``isolation="warm"`` the processes may be those of an earlier warm launch that left them clean.
        ``timeout`` (seconds, default 300) ends the launch whatever happens; ``stall`` (default 60) ends it
        when no rank uses CPU or prints any more. ``env`` goes on top of this process's environment.
        ``trace`` says what each rank records in its folder: True, False or names; nothing by default.

        Raises LaunchUsageError before any rank starts if the input is bad, and, with ``check``,
        LaunchError (an AssertionError with ``.result``) for any verdict but PASSED.
        """
        request.linux()
        size = request.whole("world_size", world_size, most=512)
        request.one_of("isolation", isolation, request.ISOLATIONS)
        environ = self._visible(request.environment(env))
        where, how, shared_gpu = request.placement(
            device or self.defaults.device, backend, size, environ, share_gpu=self.defaults.share_gpu
        )
        if not callable(target):
            raise LaunchUsageError(f"target={target!r}: must be a function; for a script use .torchrun(path)")
        spec = {
            "start_environ": environ,
            **self._times(timeout, stall),
            "trace": request.tracing(trace, environ, default=False),
            "kind": "function",
            "isolation": isolation,
            "world_size": size,
            "device": where,
            "backend": how,
            "shared_gpu": shared_gpu,
            "environ": self._environ(environ, size),
            "sys_path": [entry or os.getcwd() for entry in sys.path],
            "argv": list(sys.argv),
        }
        name = getattr(target, "__name__", "function").strip("<>")
        return self._run(spec, payload.pack_call(target, args, kwargs), size, name, check)

    def torchrun(
        self,
        script_or_module: str | os.PathLike[str],
        *argv: object,
        nproc: int = 2,
        nnodes: int = 1,
        node_rank: int | None = None,
        rdzv_endpoint: str | None = None,
        module: bool = False,
        max_restarts: int = 0,
        timeout: float | None = None,
        stall: float | None = None,
        env: Mapping[str, str | None] | None = None,
        trace: Trace = None,
        check: bool = True,
    ) -> LaunchResult:
        """Runs an unmodified script (or module) under torch's elastic agent, ``nproc`` ranks a node.

        Environment, ``argv``, exit code and error text are torchrun's. With ``nnodes`` above 1 and
        ``rdzv_endpoint="host:port"`` of node 0, every machine runs this call and is one of the nodes
        (``node_rank``; without it the machine with that address is node 0). torchrun's and Slurm's variables
        say the same where they speak of as many nodes. Else the nodes are played on this host. On node 0
        ``ranks`` of the result are those of all nodes, on another its own; verdict and cause are node 0's
        everywhere. ``trace`` as in ``__call__``, but on by default. Raises as ``__call__`` does.
        """
        request.linux()
        nproc = request.whole("nproc", nproc, most=512)
        nnodes = request.whole("nnodes", nnodes, most=where.MOST_NODES)
        max_restarts = request.whole("max_restarts", max_restarts, least=0)
        environ = self._visible(request.environment(env))
        meets = _where(nnodes, node_rank, rdzv_endpoint, environ)
        simulated = request.whole("nnodes", nnodes, most=64) if meets is None else 1
        if self.defaults.device == "cuda":  # share_gpu or not: a script chooses device and backend itself
            request.enough_gpus(nproc * simulated, environ)
        script = request.script_or_module(script_or_module, module)
        options = [f"--nproc-per-node={nproc}", f"--nnodes={nnodes}", f"--max-restarts={max_restarts}"]
        spec = {
            "start_environ": environ,
            **self._times(timeout, stall),
            "trace": request.tracing(trace, environ, default=True),
            "kind": "script",
            "nproc": nproc,
            "agents": simulated,
            "simulated_nodes": simulated > 1,
            "remote_nodes": meets is not None,
            "where": dataclasses.asdict(meets) if meets else None,
            "what": alike.what(nnodes, nproc, script, module),
            "max_restarts": max_restarts,
            "torchrun": [*options, "--monitor-interval=0.02"],
            "command": [*(["-m"] if module else []), script, *map(str, argv)],
            "environ": self._environ(environ, None),
        }
        return self._run(spec, b"", nproc * simulated, Path(script).stem, check)

    def _times(self, timeout: float | None, stall: float | None) -> dict[str, float]:
        return {
            "timeout": request.seconds("timeout", self.defaults.timeout if timeout is None else timeout),
            "stall": request.seconds("stall", self.defaults.stall if stall is None else stall),
        }

    def _visible(self, environ: dict[str, str]) -> dict[str, str]:
        return {**environ, VARIABLE: ",".join(self.defaults.gpus)} if self.defaults.gpus else environ

    def _environ(self, environ: dict[str, str], world_size: int | None) -> dict[str, str]:
        if world_size is None:
            return environ
        # As torchrun does: N ranks with a thread a core each would trip over each other.
        threads = {"OMP_NUM_THREADS": "1"} if world_size > 1 else {}
        # MASTER_PORT follows when the kernel has chosen one.
        shared = {
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "GROUP_RANK": 0,
            "GROUP_WORLD_SIZE": 1,
        }
        return {**threads, **environ, **{name: str(value) for name, value in shared.items()},
                "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip

    def _run(self, spec: dict[str, Any], call: bytes, size: int, name: str, check: bool) -> LaunchResult:
        # On disk for scripts: torchrun keeps logs of its own there, without bound.
        folder = Folder(self.defaults.artifacts, name, in_memory=spec["kind"] == "function")
        spec |= {"op": "launch", "cwd": os.getcwd()}
        try:
            if spec.get("isolation") == "warm":
                result = _warm(spec, call, size, folder)
            else:
                result = fresh.watched(spec, call, size, folder, self._cancelled)
        except BaseException:
            folder.discard()
            raise
        result.shared_gpu = spec.get("shared_gpu")
        result.simulated_nodes = spec["agents"] if spec.get("simulated_nodes") else 0
        told.tell(result)
        if check and not result.passed:
            raise LaunchError(result)
        return result


def _where(
    nnodes: int, node_rank: int | None, endpoint: str | None, environ: Mapping[str, str]
) -> where.Where | None:
    """Where the nodes meet; None where there is one, or where they are played on this host."""
    if endpoint is not None:
        return where.given(nnodes, node_rank, endpoint) if nnodes > 1 else None
    if node_rank is not None:
        raise LaunchUsageError(f"node_rank={node_rank!r} needs rdzv_endpoint='host:port' of node 0")
    found = where.by_environment(environ) if nnodes > 1 else None
    return found if found is not None and found.nnodes == nnodes else None


def _warm(spec: dict[str, Any], call: bytes, size: int, folder: Folder) -> LaunchResult:
    """The launch by ranks that may have been there already and may stay."""
    began = time.monotonic()
    try:
        return warm.watched(spec, call, folder)
    except ServerLost as error:
        ranks = [RankResult(rank, "ended") for rank in range(size)]
        lost = Cause(None, "server", str(error))
        return LaunchResult(
            Verdict.CRASHED, lost, ranks, folder, time.monotonic() - began, aftermath=Aftermath(str(error))
        )


launch = Launcher()
