"""From N ranks to one and from one to N, through ``torch.distributed.checkpoint``: every weight bit by bit.

What is saved is what the case's ``state_dict`` gives. Plain tensors that a model's code cut by hand cannot be
resharded: nothing says that they are parts, and only one rank's would be saved.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.tensor_parallel.golden_model import SEED, build
from pytest_gputrain.tensor_parallel.golden_pair import Pair
from pytest_gputrain.tensor_parallel.golden_world import is_dtensor
from pytest_gputrain.tensor_parallel.records_training import CheckpointRecord
from pytest_gputrain.trace.names import canonical_name

State = dict[str, Any]


def compare_checkpoint(case: TrainingCase, mesh: Any, *, seed: int = SEED) -> CheckpointRecord:
    """Run on every rank of ``mesh``; returns the same record on all."""
    pair = Pair(case, mesh, seed=seed)
    pair.parallelize()
    size = pair.world.size
    if pair.problem or pair.weights.problem:
        return CheckpointRecord(size, problem=pair.problem or pair.weights.problem, notes=tuple(pair.notes))
    if problem := _agreed(pair, _local_of_dtensor(pair)):
        return CheckpointRecord(size, problem=problem, notes=tuple(pair.notes))
    if reason := _agreed(pair, _unfit(pair)):
        return CheckpointRecord(size, skipped=reason, notes=tuple(pair.notes))
    made = {r: tempfile.mkdtemp(prefix="gputrain-checkpoint-") if r == 0 else "" for r in pair.world.held}
    folder = Path(pair.world.merged(made)[0])
    try:
        return _both_ways(pair, folder)
    finally:
        pair.world.merged(dict.fromkeys(pair.world.held))  # nobody reads any more
        if 0 in pair.world.held:
            shutil.rmtree(folder, ignore_errors=True)


def _agreed(pair: Pair, said: str | None) -> str | None:
    """The first rank's that has something to say, on all; collective. Their states need not be alike."""
    return next((one for one in pair.world.merged(dict.fromkeys(pair.world.held, said)) if one), None)


def _local_of_dtensor(pair: Pair) -> str | None:
    """A part in place of a DTensor, which could be joined."""
    for name, parameter in pair.parallel.named_parameters(remove_duplicate=False):
        given = _tensors(pair, pair.parallel).get(canonical_name(name)) if is_dtensor(parameter) else None
        if given is not None and given.shape != parameter.shape:
            return (
                f"the case's state_dict gives one rank's part of {name}, {tuple(given.shape)} of "
                f"{tuple(parameter.shape)}, so that a checkpoint has that of one rank only: give the DTensor"
            )
    return None


def _unfit(pair: Pair) -> str | None:
    if pair.world.simulated:
        return "simulated ranks write no checkpoint"
    golden = {name: tuple(tensor.shape) for name, tensor in _tensors(pair, pair.reference).items()}
    state = _tensors(pair, pair.parallel)
    if other := [name for name in state if name not in golden]:
        return f"the parallel model's state_dict has names that the model's has not, such as {other[0]}"
    cut = [n for n, t in state.items() if tuple(t.shape) != golden[n]]
    if not cut:
        return None
    return (
        f"the case's state_dict gives plain parts, such as {tuple(state[cut[0]].shape)} of {golden[cut[0]]} "
        f"for {cut[0]}, which no checkpoint can join: give DTensors, or a state_dict that joins them"
    )


def _tensors(pair: Pair, model: Any) -> State:
    state = pair.case.state_dict(model)
    return {canonical_name(name): t for name, t in state.items() if isinstance(t, torch.Tensor)}


def _both_ways(pair: Pair, folder: Path) -> CheckpointRecord:
    from torch.distributed.checkpoint.state_dict_saver import save

    size = pair.world.size
    golden = {name: tensor.detach().clone() for name, tensor in _tensors(pair, pair.reference).items()}
    save(_tensors(pair, pair.parallel), checkpoint_id=folder / "ranks")
    saved = sum(file.stat().st_size for file in (folder / "ranks").rglob("*") if file.is_file())
    plain = build(pair.case, pair.device, pair.seed + 1)
    into_one = _tensors(pair, plain)
    problem = _loaded(pair, folder / "ranks", into_one, golden, f"from {size} ranks into one model")
    if problem is None:
        save(golden, checkpoint_id=folder / "one")
        into_ranks = _tensors(pair, pair.parallel)
        with torch.no_grad():
            for tensor in into_ranks.values():
                tensor.zero_()
        problem = _loaded(pair, folder / "one", into_ranks, golden, f"from one model into {size} ranks")
    count = 0 if problem else len(golden)
    return CheckpointRecord(size, len(into_one), count, saved, problem=problem, notes=tuple(pair.notes))


def _loaded(pair: Pair, folder: Path, into: State, golden: State, way: str) -> str | None:
    """What is wrong with the state after loading; collective."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    there = set(FileSystemReader(folder).read_metadata().state_dict_metadata)
    missing = [name for name in into if name not in there]
    first = f"{missing[0]} is not in the checkpoint" if missing else ""
    if lost := _agreed(pair, first and f"loaded {way}: {first} ({len(missing)} of {len(into)} are not)"):
        return lost
    load(into, checkpoint_id=folder)
    wrong: dict[int, list[str]] = {rank: [] for rank in pair.world.held}
    # Buffers may have moved since (running averages): the reference was asked once more than the ranks were.
    moving = {canonical_name(name) for name, _ in pair.reference.named_buffers(remove_duplicate=False)}
    for name, tensor in into.items():
        for rank, piece in pair.world.whole(tensor).items():
            if name in golden and name not in moving and not torch.equal(piece, golden[name]):
                wrong[rank].append(name)
    for rank, names in enumerate(pair.world.merged(wrong)):
        if names:
            return (
                f"loaded {way}, {names[0]} is not what was saved on rank {rank} "
                f"({len(names)} of {len(into)} are not)"
            )
    return None
