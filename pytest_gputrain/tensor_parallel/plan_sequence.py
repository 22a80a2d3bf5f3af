"""A plan's sequence-parallel form: what is gathered where, and which parameters see a part of the
sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gputrain.tensor_parallel import roles

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


def over_sequence(plan: dict[str, ParallelStyle], modules: dict[str, Any]) -> dict[str, ParallelStyle]:
    """The plan with sequences divided from the first layer to the last, between the blocks that it shards.

    Raises ValueError for a model in which it cannot be told where that begins and ends, or that has an
    attention which would see a part of the sequence only.
    """
    from pytest_gputrain.tensor_parallel import sequence as styles
    from pytest_gputrain.tensor_parallel.conv1d import Conv1DRowwise
    from pytest_gputrain.tensor_parallel.styles import Replicated

    shared = styles.Sequence()
    layers = _one_stack(roles.layers(modules))
    _attention_everywhere(plan, modules, layers)
    made: dict[str, ParallelStyle] = {}
    for name in (layers[0], layers[-1]):
        made[name] = styles.SequenceLayer(shared, first=name == layers[0], last=name == layers[-1])
    made.update(plan)
    owners = [block.owner for block in roles.blocks(modules) if block.kind != "mlp"]
    for block in roles.blocks(modules):
        if block.row not in plan:
            continue
        is_conv1d = roles.is_conv1d(modules[block.row])
        made[block.row] = Conv1DRowwise(shared) if is_conv1d else styles.SequenceRowwise(shared)
        # An MLP in the layer itself (OPT) has no module of its own whose input could be gathered.
        if any(owner.startswith(f"{block.owner}.") for owner in owners):
            made.update({name: styles.SequenceColwise(shared) for name in block.columns})
        else:
            made[block.owner] = styles.SequenceGather(shared)
    for name, module in modules.items():
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        if inside and name not in made and any(value is not None for value in module._parameters.values()):
            made[name] = Replicated(summed=True)
    return made


def _one_stack(layers: list[str]) -> list[str]:
    stacks = sorted({name.rpartition(".")[0] for name in layers})
    if len(stacks) != 1:
        raise ValueError(
            f"sequence_parallel=True needs one stack of numbered layers, and the model has "
            f"{', '.join(stacks) or 'none'}; use it without"
        )
    return layers


def _attention_everywhere(plan: dict[str, Any], modules: dict[str, Any], layers: list[str]) -> None:
    """Raises ValueError for a layer whose attention would see a part of the sequence only."""
    found = [block.owner for block in roles.blocks(modules) if block.kind != "mlp" and block.row in plan]
    for layer in layers:
        if not any(owner.startswith(f"{layer}.") for owner in found):
            raise ValueError(
                f"sequence_parallel=True needs an attention of a known family in every layer, and {layer} "
                f"has "
                "none whose heads could be divided; use it without"
            )
