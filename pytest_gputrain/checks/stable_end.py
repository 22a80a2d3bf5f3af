"""What a rank looks at when a stability run has ended well: losses, buffers, flags, floating point."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pytest_gputrain.checks.flops import Flops
from pytest_gputrain.checks.stable_probe import Probe, of_steps
from pytest_gputrain.checks.stable_weights import weights
from pytest_gputrain.checks.stable_words import ill_buffers, ill_state


def close(run: Any, probe: Probe) -> None:
    """A collective, after the last step of a run in which nothing went wrong; ``run`` is the rank's."""
    import torch

    from pytest_gputrain.case.defaults import DefaultStep
    from pytest_gputrain.trace.optimizers import optimizers_in

    # First of all: what follows runs the model again, and more steps of it.
    run.ended.finding, notes = run.untrained.end(run.ended.steps)
    run.ended.notes += notes
    run.ended.after = probe.losses()
    if probe.stands_still(run.ended.before, run.ended.after):
        others = probe.losses(with_first_buffers=True)
        run.ended.after = min(run.ended.after, others, key=sum) if others else run.ended.after
    if not run.feed.repeats and probe.stands_still(run.ended.before, run.ended.after):
        run.ended.again = probe.trained_on_alone()
    if run.feed.repeats:
        run.ended.own_first, run.ended.own_last = of_steps(run.losses)
    own_step = not isinstance(run.case.step, DefaultStep)
    run.ended.takes_turns = own_step and len(optimizers_in(run.optimizer)) > 1
    run.ended.flags = determinism()
    run.ended.moved = weights(run.trained)[0] != run.first_digest
    run.ended.epochs = 0 if run.feed.repeats else run.feed.epochs
    if probe.problem:
        run.ended.before, run.ended.after = run.ended.own_first, run.ended.own_last
        run.ended.notes.append(
            f"the loss of the same batches before and after training could not be had: {probe.problem}"
        )
    spoilt = sorted(run.well_buffers & not_finite_buffers(run.wrapped))
    ranks = run.peers.flagged([bool(spoilt)])[0]
    if spoilt and run.ended.finding is None:
        run.ended.finding = ill_buffers(spoilt, run.ended.steps, ranks, run.peers.world_size)
    of_state = not_finite_state(run.optimizer, run.parameters)
    ranks = run.peers.flagged([bool(of_state)])[0]
    if of_state and run.ended.finding is None:
        run.ended.finding = ill_state(of_state, run.ended.steps, ranks, run.peers.world_size)
    if run.vote.skipped:
        run.ended.notes.append(
            f"{run.vote.skipped} steps on rank {run.peers.rank} returned a loss that is not finite and "
            "were kept from the optimizer"
        )
    if run.sharded:
        run.ended.notes.append("ranks hold parts of the weights, so they are not compared between ranks")
    if run.device.type == "cuda":
        run.ended.peak_bytes = torch.cuda.max_memory_allocated(run.device)
        run.ended.flops = _flops(run, probe.batches[0])  # of a CPU no peak is known to hold it against


def not_finite_buffers(module: Any) -> set[str]:
    """Names of floating buffers that hold a NaN; of normalisation's statistics, or an infinite value.

    A mask that is made when it is first used holds -inf, and is well.
    """
    from torch.nn.modules.batchnorm import _NormBase

    found = set()
    for prefix, one in module.named_modules():
        for name, buffer in one.named_buffers(prefix, recurse=False):
            if buffer.is_floating_point():
                ill = ~buffer.isfinite() if isinstance(one, _NormBase) else buffer.isnan()
                if ill.any():
                    found.add(name.removeprefix("module."))
    return found


def not_finite_state(optimizer: Any, parameters: Mapping[str, Any]) -> list[str]:
    """What an optimizer keeps of a parameter, ``exp_avg_sq of head.weight``, that holds a NaN.

    Or an infinite value, where it has an element for each of the parameter's, which is never updated again.
    """
    import torch

    from pytest_gputrain.trace.optimizers import optimizers_in

    names, found = {id(parameter): name for name, parameter in parameters.items()}, []
    for one in optimizers_in(optimizer):
        for parameter, state in one.state.items():
            for key, value in state.items() if isinstance(state, dict) else ():
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    continue
                local = value.to_local() if hasattr(value, "to_local") else value
                ill = ~local.isfinite() if value.shape == parameter.shape else local.isnan()
                if ill.any():
                    found.append(f"{key} of {names.get(id(parameter), 'a parameter')}")
    return found


def _flops(run: Any, batch: Any) -> Flops | None:
    """A collective: one step more, counted; nothing where it cannot run under a counter."""
    from pytest_gputrain.checks.flops import count_flops
    from pytest_gputrain.checks.session import seed_for, take_step

    seed = seed_for(run.ctx, 0, run.peers.rank)
    with contextlib.suppress(Exception):
        return count_flops(lambda: take_step(run.case, run.wrapped, run.optimizer, [batch], seed))
    return None


def determinism() -> dict[str, Any]:
    """torch's flags that decide whether the same step gives the same bits, as the program has set them."""
    import torch

    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
    }
