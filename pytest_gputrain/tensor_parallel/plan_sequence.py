"""A plan's sequence-parallel form: what is gathered where, and which parameters see a part of the
sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gputrain.tensor_parallel import roles

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


def over_sequence(plan: dict[str, ParallelStyle], modules: dict[str, Any]) -> dict[str, ParallelStyle]:
    """The plan with sequences divided between the blocks that it shards.

    Raises ValueError for a model without numbered layers or without a head, where the sequence would begin
    to be divided and where it would be gathered.
    """
    from pytest_gputrain.tensor_parallel import sequence as styles
    from pytest_gputrain.tensor_parallel.styles import Replicated

    shared = styles.Sequence()
    layers = roles.layers(modules)
    _, head = roles.vocabulary(modules)
    if not layers or head is None:
        lacking = "numbered layers" if not layers else "a head from the embedding's width to its rows"
        raise ValueError(f"sequence_parallel=True needs a model with {lacking}; use it without")
    made: dict[str, ParallelStyle] = {"": styles.SequenceModel(shared)}
    made[layers[0]] = styles.SequenceDivide(shared)
    made.update(plan)
    owners = [block.owner for block in roles.blocks(modules) if block.kind == "attention"]
    for block in roles.blocks(modules):
        if block.row not in plan:
            continue
        made[block.row] = styles.SequenceRowwise(shared)
        # An MLP in the layer itself (OPT) has no module of its own whose input could be gathered.
        if any(owner.startswith(f"{block.owner}.") for owner in owners):
            made.update({name: styles.SequenceColwise(shared) for name in block.columns})
        else:
            made[block.owner] = styles.SequenceGather(shared)
    given: Any = plan[head]
    made[head] = styles.SequenceColwise(
        shared, last=True, output_layouts=given.output_layouts[0], use_local_output=given.use_local_output
    )
    for name, module in modules.items():
        if name in made or not any(parameter is not None for parameter in module._parameters.values()):
            continue
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        made[name] = Replicated(summed=True) if inside else styles.SequenceReplicated(shared)
    return made
