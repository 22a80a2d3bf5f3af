"""Data parallel beside tensor parallel, on four ranks: gradients of half a batch each are those of the
whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from pytest_gputrain import launch
from tests.tensor_parallel import families, golden

WAYS: dict[str, dict[str, Any]] = {
    "average": {},
    "average, loss and sequence": {"sequence_parallel": True, "loss_parallel": True},
    "fsdp": {"data_parallel": "fsdp"},
    "fsdp, sequence": {"data_parallel": "fsdp", "sequence_parallel": True},
}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "opt": partial(families.opt, vocab_size=251),
    "gpt": families.gpt,
}
TRIALS = (
    ("gpt", "average"),
    ("gpt", "fsdp"),
    ("opt", "average, loss and sequence"),
    ("opt", "fsdp, sequence"),
)


def all_errors() -> dict[str, dict[str, float]]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return {f"{name}, {how}": errors(name, how, mesh) for name, how in TRIALS}


def errors(name: str, how: str, mesh: Any) -> dict[str, float]:
    import copy

    from pytest_gputrain import tensor_parallel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    reference = golden.random_weights(MODELS[name]())
    model = copy.deepcopy(reference)
    if mesh.get_local_rank("dp"):
        # Only the mesh's first rank's values count.
        golden.random_weights(model)
    make: Any = tensor_parallel.parallelize
    make(model, mesh, **WAYS[how])
    torch.manual_seed(1)
    tokens = torch.randint(2, 50, (4, 9))
    golden.run(reference, tokens)
    golden.run(model, tokens.chunk(2)[mesh.get_local_rank("dp")])
    return golden.gradient_errors(reference, model)


def test_both_dimensions_together_are_as_one_process() -> None:
    for found in launch(all_errors, world_size=4).values:
        assert len(found) == len(TRIALS)
        assert not {
            (way, name): error
            for way, of in found.items()
            for name, error in of.items()
            if not error <= 1e-10
        }


class Mesh:
    """A mesh's shape and names, without ranks."""

    def __init__(self, shape: tuple[int, ...], names: tuple[str, ...] | None) -> None:
        self.shape, self.ndim, self.mesh_dim_names = shape, len(shape), names


@pytest.mark.parametrize(
    ("shape", "names", "how", "message"),
    [
        (
            (2, 2),
            ("dp", "model"),
            "average",
            "the mesh has the dimensions (2, 2) named ('dp', 'model'); legal are one dimension, or two of "
            "which "
            "one is called 'tp': init_device_mesh(..., mesh_dim_names=('dp', 'tp'))",
        ),
        (
            (2, 2, 2),
            None,
            "average",
            "the mesh has the dimensions (2, 2, 2) named nothing; legal are one dimension, or two of "
            "which one is "
            "called 'tp': init_device_mesh(..., mesh_dim_names=('dp', 'tp'))",
        ),
        ((2,), None, "ddp", "data_parallel is 'ddp'; legal are 'average' and 'fsdp'"),
    ],
)
def test_a_mesh_whose_dimensions_cannot_be_told(shape: Any, names: Any, how: str, message: str) -> None:
    from pytest_gputrain.tensor_parallel.apply import dimensions

    with pytest.raises(ValueError, match=r".") as refused:
        dimensions(Mesh(shape, names), how)  # type: ignore[arg-type]
    assert str(refused.value) == message
