"""All that can be wrong with a sweep, looked at before its first branch starts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_gputrain.sweep.checkpoint import CheckpointFile, read_checkpoint
from pytest_gputrain.sweep.command import Command, torchrun_line
from pytest_gputrain.sweep.config_file import SweepError
from pytest_gputrain.sweep.gpus import Gpus
from pytest_gputrain.sweep.manifest import Manifest, PlannedBranch, read_manifest
from pytest_gputrain.sweep.results import check_results_folder

TIMEOUT = 86_400.0
"""Seconds of a branch. Every launch has an end; a day is more than a branch of a sweep should take."""
STALL = 600.0
"""Seconds without CPU time or output after which a branch is hung: cold network file systems take minutes."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A sweep as asked for. nproc None: the ranks planned; k_values None: all; jobs: branches at once.

    device: ``cpu``, where branches see no GPU, or ``cuda``, where each leases ``nproc`` of them.
    """

    folder: Path
    checkpoint: Path
    command: Command
    out: Path | None = None
    nproc: int | None = None
    device: str = "cpu"
    jobs: int | None = None
    k_values: Sequence[int] | None = None
    rerun: bool = False
    timeout: float = TIMEOUT
    stall: float = STALL
    lease_dir: Path | None = None
    lease_timeout: float | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A sweep that may start. branches: those to run, in the manifest's order. gpus: None on the CPU."""

    asked: Asked
    manifest: Manifest
    branches: tuple[PlannedBranch, ...]
    checkpoint: CheckpointFile
    out: Path
    num_ranks: int
    jobs: int
    gpus: Gpus | None
    script_sha256: str
    order: tuple[int, ...] = field(default=())

    def metrics(self, branch: PlannedBranch) -> Path:
        return self.out / f"{branch.name}.metrics.jsonl"

    def log(self, branch: PlannedBranch) -> Path:
        return self.out / f"{branch.name}.log"

    def launched(self, branch: PlannedBranch) -> Path:
        """Where the launch writes while it runs."""
        return self.out / f".{branch.name}"

    def arguments(self, branch: PlannedBranch) -> list[str]:
        return self.asked.command.arguments_of(branch, self.checkpoint.path, self.metrics(branch))

    def line(self, branch: PlannedBranch) -> str:
        """The branch's command as a shell takes it."""
        return torchrun_line(self.asked.command, self.arguments(branch), self.num_ranks)

    @property
    def command_text(self) -> str:
        """What results are compared by: the script with its arguments as given, and the ranks."""
        return f"torchrun --nproc-per-node={self.num_ranks} {self.asked.command}"


def prepare(asked: Asked, *, dry: bool = False) -> Prepared:
    """Check everything; makes the results folder unless ``dry``. Raises SweepError, LaunchUsageError."""
    manifest = read_manifest(asked.folder)
    branches = _chosen(manifest, asked.k_values)
    asked.command.check(manifest)
    script_sha256 = _checked_script(asked.command)
    num_ranks = _ranks(branches, asked.nproc)
    checkpoint = read_checkpoint(asked.checkpoint)
    gpus = _gpus(asked, num_ranks)
    out = asked.out or asked.folder / "results"
    if not dry:
        check_results_folder(out)
        if gpus:
            gpus.prepare()
    return Prepared(
        asked=asked,
        manifest=manifest,
        branches=branches,
        checkpoint=checkpoint,
        out=out,
        num_ranks=num_ranks,
        jobs=asked.jobs or (gpus.at_once if gpus else 1),
        gpus=gpus,
        script_sha256=script_sha256,
        order=tuple(branch.k for branch in manifest),
    )


def _chosen(manifest: Manifest, k_values: Sequence[int] | None) -> tuple[PlannedBranch, ...]:
    if k_values is None:
        return manifest.branches
    there = [branch.k for branch in manifest]
    for number, k in enumerate(k_values):
        if k not in there:
            raise SweepError(f"k {k} is not in {manifest.folder}; it has {', '.join(map(str, there))}")
        if k in k_values[:number]:
            raise SweepError(f"k {k} is given twice; give each k once")
    return tuple(branch for branch in manifest if branch.k in k_values)


def _checked_script(command: Command) -> str:
    """The digest of a script, empty for a module. Raises LaunchUsageError."""
    from pytest_gputrain.launch import request

    request.linux()
    name = request.script_or_module(command.script, command.module, way="-m")
    return "" if command.module else hashlib.sha256(Path(name).read_bytes()).hexdigest()


def _ranks(branches: Sequence[PlannedBranch], nproc: int | None) -> int:
    planned = {branch.values["world_size"]: branch for branch in branches}
    if len(planned) > 1:
        raise SweepError(
            f"the configurations are for {' and '.join(map(str, sorted(planned)))} ranks (world_size); "
            "run them apart, by --k"
        )
    ranks, branch = next(iter(planned.items()))
    if nproc is not None and nproc != ranks:
        raise SweepError(
            f"--nproc {nproc}, but {branch.config} is planned for {ranks} (world_size); leave --nproc out, "
            f"or plan again with gputrain branches plan --world-size {nproc}"
        )
    return int(ranks)


def _gpus(asked: Asked, num_ranks: int) -> Gpus | None:
    if asked.device != "cuda":
        return None
    from pytest_gputrain.launch import request

    request.enough_gpus(num_ranks, dict(os.environ))
    gpus = Gpus(num_ranks, asked.lease_dir)
    return gpus if asked.lease_timeout is None else Gpus(num_ranks, asked.lease_dir, asked.lease_timeout)
