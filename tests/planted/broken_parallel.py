"""Right on one process, broken on several: hangs, crashes, divergence, wrong averages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import WIDTH, Net, broken, case, draw, loss, rank

HANG = 12.0  # seconds


class UnusedOnOneRank(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if rank() == 1 else self.extra(x))


@broken({"ddp_completes": ""}, may_fail=("ddp_parity",), timeout=HANG)
def unused_parameter_on_one_rank() -> TrainingCase:
    return case("unused_parameter_on_one_rank", model=UnusedOnOneRank)


def conditional_collective_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    optimizer.step()
    if rank() == 0 and dist.get_world_size() > 1:
        dist.all_reduce(value.detach())  # "only the first rank logs"
    return value.detach()


@broken({"ddp_completes": "HUNG"}, may_fail=("ddp_parity",), timeout=HANG)
def conditional_collective() -> TrainingCase:
    return case("conditional_collective", step=conditional_collective_step)


class LeavesEarly:
    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.steps += 1
        if rank() == 1 and self.steps == 3:
            raise SystemExit(0)  # "the data is used up"
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward()
        optimizer.step()
        return value.detach()


@broken({"ddp_completes": "rank 1"}, may_fail=("ddp_parity",), timeout=HANG)
def rank_dependent_early_exit() -> TrainingCase:
    return case("rank_dependent_early_exit", step=LeavesEarly())


def uneven_batches() -> Iterator[Any]:
    for _ in range(4 if rank() == 0 else 3):
        yield draw(4, "cpu")


@broken({"ddp_completes": ""}, timeout=HANG)
def uneven_inputs() -> TrainingCase:
    return case("uneven_inputs", batches=uneven_batches)


def much_later_uneven_batches() -> Iterator[Any]:
    for _ in range(20 + rank()):
        yield draw(4, "cpu")


@broken({"ddp_completes": "ranks have different numbers of batches (rank 0: 20, rank 1: 21)"})
def uneven_inputs_far_away() -> TrainingCase:
    return case("uneven_inputs_far_away", batches=much_later_uneven_batches)


def sized_by_rank() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8 + rank()), nn.ReLU(), nn.Linear(8 + rank(), 4))


@broken({"ddp_completes": ""}, may_fail=("ddp_parity",), timeout=HANG)
def mismatched_shape() -> TrainingCase:
    return case("mismatched_shape", model=sized_by_rank)


class StaticGraphChanges(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            x = self.blocks[0](x)
            out: Tensor = self.head(x)
            return out
        return super().forward(x)


def static(model: Any) -> nn.Module:
    return DDP(model, static_graph=True)


@broken({"ddp_completes": ""}, may_fail=("ddp_parity",), timeout=HANG)
def changed_static_graph() -> TrainingCase:
    return case("changed_static_graph", model=StaticGraphChanges, wrap=static)


class ReentrantCheckpoint(Net):
    on = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.on else block(x)
        out: Tensor = self.head(x)
        return out


def find_unused(model: Any) -> nn.Module:
    return DDP(model, find_unused_parameters=True)


def reentrant_on(model: Any, layers: slice | None) -> None:
    model.on = True


@broken({"ddp_completes": "mark a variable ready only once"})
def reentrant_checkpoint_with_find_unused() -> TrainingCase:
    return case(
        "reentrant_checkpoint_with_find_unused",
        model=ReentrantCheckpoint,
        wrap=find_unused,
        set_checkpointing=reentrant_on,
    )


def around_the_wrapper(model: Any, batch: Any) -> Tensor:
    return loss(getattr(model, "module", model), batch)


@broken({"ddp_parity": "parameters differ across ranks after step 0"})
def training_around_the_wrapper() -> TrainingCase:
    return case("training_around_the_wrapper", loss=around_the_wrapper)


def bare(model: Any) -> Any:
    return model


@broken({"ddp_parity": "wrap returns the bare model"})
def wrap_returns_the_bare_model() -> TrainingCase:
    return case("wrap_returns_the_bare_model", wrap=bare)


def constant_draw(batch_size: int, device: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch_size, WIDTH, generator=generator)
    return {"x": x.to(device), "y": torch.randint(4, (batch_size,), generator=generator).to(device)}


@broken({"ddp_parity": "wrap returns the bare model", "ddp_data_differs": "every step"})
def bare_model_on_constant_data() -> TrainingCase:
    return case("bare_model_on_constant_data", wrap=bare, batch=constant_draw)


def summing(model: Any) -> nn.Module:
    wrapped = DDP(model)

    def hook(state: Any, bucket: Any) -> Any:  # DDP reads annotations, and these are strings here
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    hook.__annotations__.clear()
    wrapped.register_comm_hook(None, hook)
    return wrapped


@broken(
    {"ddp_parity": "gradients are 2.000 x the single-process reference on every rank (14 of 14 parameters)"}
)
def comm_hook_that_does_not_divide() -> TrainingCase:
    return case("comm_hook_that_does_not_divide", wrap=summing)


def clipping_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with torch.enable_grad() if last else model.no_sync():
            value = loss(model, batch) / len(micro_batches)
            value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    return value.detach()


@broken({"ddp_parity": "gradients are 2.000 x"})
def clipping_hides_the_scale() -> TrainingCase:
    return case("clipping_hides_the_scale", wrap=summing, step=clipping_step)


def divides_again_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    for parameter in model.parameters():
        parameter.grad /= dist.get_world_size()  # DDP has done so already
    optimizer.step()
    return value.detach()


@broken({"ddp_parity": "at the optimizer step, gradients are 0.500 x"})
def divided_twice() -> TrainingCase:
    return case("divided_twice", step=divides_again_step)


class ByHand(nn.Module):
    """Averages by hand after backward; ``finish`` has to be called by the step."""

    def __init__(self, module: nn.Module, divide: bool = True, skip: str = "nothing") -> None:
        super().__init__()
        self.module, self.divide, self.skip = module, divide, skip
        for parameter in module.parameters():
            dist.broadcast(parameter.data, 0)

    def forward(self, x: Tensor) -> Any:
        return self.module(x)

    def finish(self) -> None:
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None and name != self.skip:
                dist.all_reduce(parameter.grad)
                if self.divide:
                    parameter.grad /= dist.get_world_size()


def by_hand_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    for batch in micro_batches:
        value = loss(model, batch) / len(micro_batches)
        value.backward()
    if hasattr(model, "finish"):
        model.finish()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return value.detach()


def by_hand_without_dividing(model: Any) -> nn.Module:
    return ByHand(model, divide=False)


@broken({"ddp_parity": "gradients are 2.000 x"})
def manual_all_reduce_that_does_not_divide() -> TrainingCase:
    return case("manual_all_reduce_that_does_not_divide", wrap=by_hand_without_dividing, step=by_hand_step)


def by_hand_but_one(model: Any) -> nn.Module:
    return ByHand(model, skip="blocks.1.norm.bias")


@broken({"ddp_parity": "blocks.1.norm.bias (in blocks.1.norm, LayerNorm)"})
def one_small_parameter_not_reduced() -> TrainingCase:
    return case("one_small_parameter_not_reduced", wrap=by_hand_but_one, step=by_hand_step)


class FirstRankOnly(ByHand):
    def finish(self) -> None:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                dist.broadcast(parameter.grad, 0)


@broken({"ddp_parity": "gradients differ from the single-process reference"})
def every_rank_takes_rank_0s_gradient() -> TrainingCase:
    return case("every_rank_takes_rank_0s_gradient", wrap=FirstRankOnly, step=by_hand_step)


class Rebroadcast(ByHand):
    """Never averages; hides it by sending rank 0's weights around after the update."""

    def finish(self) -> None:
        return None


def rebroadcast_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    optimizer.step()
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    return value.detach()


@broken({"ddp_parity": "updates differ from the single-process reference"})
def weights_are_sent_around_instead() -> TrainingCase:
    return case("weights_are_sent_around_instead", wrap=Rebroadcast, step=rebroadcast_step)


class DivergesLater:
    """Synchronises for three steps, then no more."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.steps += 1
        optimizer.zero_grad()
        inner = getattr(model, "module", model) if self.steps > 3 else model
        value = sum((loss(inner, batch) for batch in micro_batches), torch.zeros(()))
        value.backward()
        optimizer.step()
        return value.detach()


@broken({"ddp_parity": "parameters differ across ranks after step 3"})
def divergence_that_begins_late() -> TrainingCase:
    return case("divergence_that_begins_late", step=DivergesLater())


def never_syncing_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = torch.zeros(())
    for batch in micro_batches:
        with model.no_sync() if len(micro_batches) > 1 else torch.enable_grad():
            value = loss(model, batch) / len(micro_batches)
            value.backward()
    optimizer.step()
    return value.detach()


@broken({"ddp_parity": "no_sync has to end before the last"})
def no_sync_on_the_last_micro_batch() -> TrainingCase:
    return case("no_sync_on_the_last_micro_batch", step=never_syncing_step)


def rate_by_rank(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3 * (1 + rank()))


@broken({"ddp_parity": "the gradients agree, so the update itself differs"})
def different_rate_on_each_rank() -> TrainingCase:
    return case("different_rate_on_each_rank", optimizer=rate_by_rank)


def seeded_by_rank() -> nn.Module:
    torch.manual_seed(rank())
    return Net()


class NoBroadcast(ByHand):
    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module, self.divide, self.skip = module, True, "nothing"


@broken({"ddp_parity": "parameters differ across ranks before the first step"})
def different_weights_without_broadcast() -> TrainingCase:
    return case(
        "different_weights_without_broadcast", model=seeded_by_rank, wrap=NoBroadcast, step=by_hand_step
    )


def ragged_draw(batch_size: int, device: Any) -> Any:
    batch = draw(batch_size, device)
    batch["y"][torch.rand(batch_size) < 0.4] = -100
    batch["y"][0] = 1
    return batch


def token_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], ignore_index=-100)


def num_targets(batch: Any) -> int:
    return int((batch["y"] != -100).sum())


def plain_average_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = torch.zeros(())
    total = sum(map(num_targets, micro_batches))
    for batch in micro_batches:
        value = token_loss(model, batch) * num_targets(batch) / total
        value.backward()
    optimizer.step()
    return value.detach()


@broken({"ddp_parity": "a plain average of each rank's token mean"})
def average_of_token_means() -> TrainingCase:
    return case(
        "average_of_token_means",
        batch=ragged_draw,
        loss=token_loss,
        loss_reduction="token_mean",
        num_targets=num_targets,
        step=plain_average_step,
    )


class Margin(nn.Module):
    """A loss with weights of its own, as metric learning has."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.centres = nn.Parameter(torch.randn(4, 4, generator=generator))

    def forward(self, model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]) @ self.centres, batch["y"])


def margin_case(name: str, *, reduce: bool = False) -> TrainingCase:
    margin = Margin()

    def optimizer(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*model.parameters(), *margin.parameters()], lr=1e-3)

    def step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        optimizer.zero_grad()
        value: Tensor = margin(model, micro_batches[0])
        value.backward()
        if reduce and margin.centres.grad is not None:
            dist.all_reduce(margin.centres.grad)
            margin.centres.grad /= dist.get_world_size()
        optimizer.step()
        return value.detach()

    return case(name, loss=margin, optimizer=optimizer, step=step)


@broken({"ddp_parity": "(outside the model)"})
def loss_weights_outside_the_wrapper() -> TrainingCase:
    return margin_case("loss_weights_outside_the_wrapper")


def typed_by_rank() -> nn.Module:
    return Net().double() if rank() == 1 else Net()


def any_type_loss(model: Any, batch: Any) -> Tensor:
    kind = next(model.parameters()).dtype
    return F.cross_entropy(model(batch["x"].to(kind)), batch["y"])


@broken({"ddp_completes": ""}, may_fail=("ddp_parity",), timeout=HANG)
def mismatched_dtype() -> TrainingCase:
    return case("mismatched_dtype", model=typed_by_rank, loss=any_type_loss)


def clips_too_early_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    if hasattr(model, "finish"):
        model.finish()
    optimizer.step()
    return value.detach()


@broken({"ddp_parity": "at the optimizer step, gradients"})
def clips_before_it_averages() -> TrainingCase:
    return case("clips_before_it_averages", wrap=ByHand, step=clips_too_early_step)


class SkipsOnRank:
    """One rank leaves a bad batch out without telling the others, at the fourth step."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor | None:
        self.steps += 1
        if rank() == 1 and self.steps == 4:
            return None
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward()
        optimizer.step()
        return value.detach()


@broken({"ddp_completes": "HUNG"}, may_fail=("ddp_parity",), timeout=HANG)
def one_rank_skips_a_batch() -> TrainingCase:
    return case("one_rank_skips_a_batch", step=SkipsOnRank())
