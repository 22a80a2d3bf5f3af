"""Which node of how many this is, and where they meet: by argument, torchrun's variables or Slurm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import LaunchUsageError

FIRST_PORT, PORTS = 20000, 12000
"""Ports derived from a Slurm job's number: below those that the kernel hands out (32768 and up)."""
MOST_NODES = 1024


@dataclass(frozen=True)
class Where:
    """The meeting place. ``node_rank`` None: who has the endpoint's address is node 0, others as they come.

    ``origin`` is what said so; the same place is the same, whoever named it.
    """

    nnodes: int
    node_rank: int | None
    host: str
    port: int
    origin: str = field(compare=False)

    @property
    def endpoint(self) -> str:
        """``host:port``, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def given(nnodes: int, node_rank: int | None, endpoint: str) -> Where:
    """By arguments. Raises LaunchUsageError."""
    host, colon, port = str(endpoint).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise LaunchUsageError(f"rdzv_endpoint={endpoint!r}: must be 'host:port', such as '10.0.0.1:29400'")
    return Where(nnodes, checked_rank(node_rank, nnodes), host, int(port), "rdzv_endpoint")


def checked_rank(node_rank: int | None, nnodes: int, name: str = "node_rank") -> int | None:
    """The node's number. Raises LaunchUsageError where there is no such node."""
    if node_rank is None:
        return None
    if isinstance(node_rank, bool) or not isinstance(node_rank, int) or not 0 <= node_rank < nnodes:
        raise LaunchUsageError(f"{name}={node_rank!r}: must be from 0 to {nnodes - 1}, as nnodes={nnodes}")
    return node_rank


def by_environment(environ: Mapping[str, str]) -> Where | None:
    """What torchrun's variables (PET_*, set by Kubeflow) or Slurm's say; None where neither says anything.

    Raises LaunchUsageError where what they say is not enough.
    """
    return _pet(environ) or _slurm(environ)


def _pet(environ: Mapping[str, str]) -> Where | None:
    nnodes = environ.get("PET_NNODES", "").rpartition(":")[2]  # an elastic min:max starts with all
    if not nnodes:
        return None
    number = _number("PET_NNODES", nnodes)
    if number < 2:
        return None
    endpoint = environ.get("PET_RDZV_ENDPOINT", "")
    if not endpoint:
        host, port = (_either(environ, name) for name in ("MASTER_ADDR", "MASTER_PORT"))
        endpoint = f"{host}:{port}" if host and port else ""
    if not endpoint:
        raise LaunchUsageError(
            f"PET_NNODES={nnodes} and no PET_RDZV_ENDPOINT (or MASTER_ADDR and MASTER_PORT); "
            "give host:port of node 0 with --rdzv-endpoint"
        )
    rank = environ.get("PET_NODE_RANK") or environ.get("NODE_RANK") or environ.get("GROUP_RANK")
    found = given(number, _number("PET_NODE_RANK", rank) if rank else None, endpoint)
    return Where(found.nnodes, found.node_rank, found.host, found.port, "PET_NNODES")


def _either(environ: Mapping[str, str], name: str) -> str:
    return environ.get(f"PET_{name}") or environ.get(name, "")


def _slurm(environ: Mapping[str, str]) -> Where | None:
    """Within ``srun`` only: a batch script's own process is alone, however many nodes the job has."""
    nnodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES", "")
    if not nnodes or not environ.get("SLURM_STEP_ID") or _number("SLURM_NNODES", nnodes) < 2:
        return None
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or nnodes
    if _number("SLURM_STEP_NUM_TASKS", tasks) != int(nnodes):
        raise LaunchUsageError(
            f"srun started {tasks} tasks on {nnodes} nodes; one a node is needed, which starts the ranks of "
            "its node: srun --ntasks-per-node=1"
        )
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    try:
        first = next(iter(host_names(hosts)))
    except (ValueError, StopIteration):
        raise LaunchUsageError(
            f"SLURM_JOB_NODELIST={hosts!r} names no host; give host:port of node 0 with --rdzv-endpoint"
        ) from None
    rank = _number("SLURM_NODEID", environ.get("SLURM_NODEID", ""))
    return Where(
        int(nnodes), checked_rank(rank, int(nnodes), "SLURM_NODEID"), first, _slurm_port(environ), "Slurm"
    )


def _slurm_port(environ: Mapping[str, str]) -> int:
    """A port that Slurm has reserved for the step (``srun --resv-ports``), else one by the job's number.

    All nodes compute the same. Where another program has it, node 0 says so before a rank starts.
    """
    if reserved := re.match(r"\d+", environ.get("SLURM_STEP_RESV_PORTS", "")):
        return int(reserved[0])
    job = _number("SLURM_JOB_ID", environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID", ""))
    return FIRST_PORT + job % PORTS


def _number(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise LaunchUsageError(f"{name}={text!r}: must be a whole number")
    return int(text)


def host_names(text: str) -> list[str]:
    """The hosts of a Slurm list such as ``gpu[01-03,7],login``, at most 65536. Raises ValueError."""
    found: list[str] = []
    for part in _outside_brackets(text):
        found += _expanded(part)
        if len(found) > 65536:
            raise ValueError(f"{text!r} names more than 65536 hosts")
    return found


def _outside_brackets(text: str) -> list[str]:
    if text.count("[") != text.count("]"):
        raise ValueError(f"{text!r}: brackets do not match")
    return [part for part in re.split(r",(?![^\[]*\])", text.strip()) if part]


def _expanded(text: str) -> list[str]:
    head, bracket, rest = text.partition("[")
    if not bracket:
        return [text]
    inner, bracket, tail = rest.partition("]")
    if not bracket:
        raise ValueError(f"{text!r}: brackets do not match")
    numbers = [number for span in inner.split(",") for number in _span(span)]
    return [f"{head}{number}{end}" for number in numbers for end in _expanded(tail)]


def _span(text: str) -> list[str]:
    low, dash, high = text.strip().partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        raise ValueError(f"{text!r} is no range of numbers")
    last = int(high) if dash else int(low)
    if last < int(low) or last - int(low) > 65536:
        raise ValueError(f"{text!r} is no range of numbers")
    return [str(number).zfill(len(low)) for number in range(int(low), last + 1)]
