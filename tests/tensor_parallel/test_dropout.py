"""Dropout: the same on replicated activations, this rank's own on divided heads and on parts of a
sequence.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pytest_gputrain import launch
from tests.tensor_parallel import families, golden


def masks(**how: Any) -> dict[str, Any]:
    """What each kind of dropout left of ones, over two steps, and the random numbers after them."""
    from pytest_gputrain.tensor_parallel import parallelize

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = families.opt(dropout=0.5, attention_dropout=0.5, attn_implementation="eager")
    parallelize(model, golden.tp_mesh(), **how)
    found: dict[str, Any] = {"heads": [], "hidden": []}
    functional: Any = torch.nn.functional
    drop = functional.dropout

    def watched(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        kept = drop(torch.ones_like(x), p, training)
        found["heads" if x.dim() == 4 else "hidden"].append(kept.flatten()[:16].tolist())
        return x * kept

    functional.dropout = watched
    torch.manual_seed(1)
    for _ in range(2):
        model(torch.randint(2, 50, (2, 8)))
    functional.dropout = drop
    return {**found, "after": torch.rand(4).tolist()}


def test_divided_heads_drop_their_own() -> None:
    one, other = launch(masks, world_size=2).values
    assert one["hidden"] == other["hidden"]
    assert one["after"] == other["after"]
    # Two layers, two steps: no mask is another's, on either rank.
    everything = [tuple(mask) for rank in (one, other) for mask in rank["heads"]]
    assert len(everything) == len(set(everything)) == 8


def test_parts_of_a_sequence_drop_their_own() -> None:
    one, other = launch(partial(masks, sequence_parallel=True), world_size=2).values
    assert one["after"] == other["after"]
    for kind in ("heads", "hidden"):
        everything = [tuple(mask) for rank in (one, other) for mask in rank[kind]]
        assert len(everything) == len(set(everything))


def test_a_model_without_dropout_leaves_the_stream_as_it_was() -> None:
    def after() -> list[float]:
        from pytest_gputrain.tensor_parallel import parallelize

        model = parallelize(families.opt(attention_dropout=0.5), golden.tp_mesh())
        torch.manual_seed(1)
        model.eval()(torch.randint(2, 50, (2, 8)))
        assert dist.get_world_size() == 2
        return torch.rand(2).tolist()

    torch.manual_seed(1)
    torch.randint(2, 50, (2, 8))
    assert launch(after, world_size=2).values == [torch.rand(2).tolist()] * 2
