"""Small models made parallel twice: by torch's plans, and by hand as Megatron does it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain import TrainingCase

WIDTH, HEADS, VOCABULARY, LENGTH, DEPTH = 16, 4, 32, 20, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mask = torch.full((length, length), -1e4, device=x.device, dtype=x.dtype).triu(1)
        weights = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5 + mask).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.activation: Any = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.mlp_norm, self.mlp = nn.LayerNorm(WIDTH), MLP()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


class Transformer(nn.Module):
    """Tokens (batch, length) -> logits. The head is the embedding's weight where ``tied``."""

    def __init__(self, tied: bool = False, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def draw(batch_size: int, device: Any) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch_size, LENGTH + 1))
    return {"inputs": tokens[:, :-1].to(device), "targets": tokens[:, 1:].to(device)}


def drawn_by_rank(batch_size: int, device: Any) -> dict[str, Tensor]:
    """Right for data parallel, wrong here."""
    torch.manual_seed(dist.get_rank())
    return draw(batch_size, device)


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())


def loss_under_autocast(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch["inputs"]).float()
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def case(parallelize: Any, *, model: Any = Transformer, **fields: Any) -> TrainingCase:
    given = {"model": model, "batch": draw, "loss": loss, "parallelize": parallelize, **fields}
    return TrainingCase(name="small", **given)


# --- by torch's plans


def by_plan(model: Any, mesh: Any) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {"head": ColwiseParallel(output_layouts=_replicate())}
    for index, block in enumerate(model.blocks):
        at = f"blocks.{index}"
        plan |= {f"{at}.attention.{name}": ColwiseParallel() for name in "qkv"}
        plan |= {f"{at}.attention.out": RowwiseParallel(), f"{at}.mlp.up": ColwiseParallel()}
        plan |= {f"{at}.mlp.down": RowwiseParallel()}
        block.attention.heads = HEADS // mesh.size()
    return parallelize_module(model, mesh, plan)


def swapped(model: Any, mesh: Any) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {"blocks.0.mlp.up": RowwiseParallel(), "blocks.0.mlp.down": ColwiseParallel()}
    return parallelize_module(model, mesh, plan)


def past_the_plan(model: Any, mesh: Any) -> Any:
    """One column layer's local weights are read by somebody else, past its hooks."""
    model = by_plan(model, mesh)
    mlp = model.blocks[1].mlp
    mlp.forward = lambda x: mlp.down(F.gelu(F.linear(x, mlp.up.weight.to_local(), mlp.up.bias.to_local())))
    return model


def put_back_whole(model: Any, mesh: Any) -> Any:
    """The plan, and then one block's whole weights again, without the hooks that stand in their way: right
    everywhere, and parallel nowhere in that block.
    """
    whole = {name: weight.detach().clone() for name, weight in model.blocks[1].named_parameters()}
    model = by_plan(model, mesh)
    block = model.blocks[1]
    block.attention.heads = HEADS
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.weight, module.bias = (nn.Parameter(whole[f"{name}.{of}"]) for of in ("weight", "bias"))
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
    return model


def on_two_dimensions(parallelize: Any, how: str, model: Any, mesh: Any) -> Any:
    """That plan on one dimension of a mesh of the same ranks, data parallel on the other."""
    from torch.distributed.device_mesh import init_device_mesh

    from pytest_gputrain.tensor_parallel import data_parallel

    both = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("dp", "tp"))
    model = parallelize(model, both["tp"])
    if how == "fsdp":
        data_parallel.shard_again(model, [f"blocks.{index}" for index in range(DEPTH)], both["dp"])
    else:
        data_parallel.average_gradients(model, both["dp"])
    return model


def with_activation(activation: Any) -> Transformer:
    model = Transformer()
    for module in model.modules():
        if isinstance(module, MLP):
            module.activation = activation
    return model


def one_gradient_too_large(model: Any, mesh: Any) -> Any:
    """By 2 %, that of a weight which every rank holds whole."""
    model = by_plan(model, mesh)
    model.blocks[0].mlp_norm.weight.register_hook(lambda gradient: gradient * 1.02)
    return model


def loss_of_hf(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["inputs"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def late(name: str, factor: float, model: Any, mesh: Any) -> Any:
    """The package's own plan; one weight's gradient is wrong from the third backward of three on."""
    from pytest_gputrain import tensor_parallel

    tensor_parallel.parallelize(model, mesh)
    calls = itertools.count()
    weight: Any = model.get_parameter(name)
    weight.register_hook(lambda gradient: gradient * factor if next(calls) % 3 == 2 else gradient)
    return model


def decay_on_one_rank(model: Any) -> Any:
    decay = 0.01 if dist.get_rank() == 0 else 0.0
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=decay)


def forgets_the_past(model: Any) -> Any:
    """Of second moments, where weights are DTensors."""
    from torch.distributed.tensor import DTensor

    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95 if sharded else 0.999))


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


# --- by hand


class Copy(torch.autograd.Function):
    """Megatron's f: the same forward, summed backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


class Reduce(torch.autograd.Function):
    """Megatron's g: summed forward, the same backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Gather(torch.autograd.Function):
    """Joined on the last dimension forward, the own part backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.chunk(dist.get_world_size(), -1)[dist.get_rank()]


class Column(nn.Module):
    def __init__(self, whole: nn.Linear, *, copy: bool = True, gather: bool = False) -> None:
        super().__init__()
        rank, size = dist.get_rank(), dist.get_world_size()
        self.copy, self.gather = copy, gather
        self.weight = nn.Parameter(whole.weight.detach().chunk(size)[rank].clone())
        self.bias = None
        if whole.bias is not None:
            self.bias = nn.Parameter(whole.bias.detach().chunk(size)[rank].clone())

    def forward(self, x: Tensor) -> Tensor:
        x = Copy.apply(x) if self.copy else x  # type: ignore[no-untyped-call]
        x = F.linear(x, self.weight, self.bias)
        out: Tensor = Gather.apply(x) if self.gather else x  # type: ignore[no-untyped-call]
        return out


class Row(nn.Module):
    def __init__(self, whole: nn.Linear, *, bias_everywhere: bool = False, reduce: bool = True) -> None:
        super().__init__()
        rank, size = dist.get_rank(), dist.get_world_size()
        self.bias_everywhere, self.reduce = bias_everywhere, reduce
        self.weight = nn.Parameter(whole.weight.detach().chunk(size, 1)[rank].clone())
        self.bias = nn.Parameter(whole.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias if self.bias_everywhere else None)
        if self.reduce:
            out = Reduce.apply(out)  # type: ignore[no-untyped-call]
        return out if self.bias_everywhere else out + self.bias


def by_hand(model: Any, mesh: Any, **changes: Any) -> Any:
    """Column and row layers in place of the linear ones; ``changes`` by layer name, for what is planted."""
    size = dist.get_world_size()
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        for name in "qkv":
            setattr(attention, name, Column(getattr(attention, name), **changes.get(name, {})))
        attention.out = Row(attention.out, **changes.get("out", {}))
        attention.heads = HEADS // size
        mlp.up, mlp.down = Column(mlp.up, **changes.get("up", {})), Row(mlp.down, **changes.get("down", {}))
    model.head = Column(model.head, gather=True, **changes.get("head", {}))
    return model


# --- planted


def same_shard_everywhere(model: Any, mesh: Any) -> Any:
    """Every rank cuts the first part."""
    original = dist.get_rank
    dist.get_rank = lambda group=None: 0
    try:
        return by_hand(model, mesh)
    finally:
        dist.get_rank = original


def initialised_again(model: Any, mesh: Any) -> Any:
    torch.manual_seed(dist.get_rank())
    by_hand(model, mesh).norm.weight.data.normal_()
    return model


def seeded_by_rank(model: Any, mesh: Any) -> Any:
    by_hand(model, mesh)
    torch.manual_seed(dist.get_rank())
    return model


def careless_with_one_sample(model: Any, mesh: Any) -> Any:
    """Right for every batch but that of a single sample, and there only backward is wrong."""
    up = by_hand(model, mesh).blocks[1].mlp.up
    up.register_forward_pre_hook(lambda module, args: setattr(module, "copy", args[0].size(0) > 1))
    return model


def not_a_number_later(model: Any, mesh: Any) -> Any:
    """From the fourth forward on."""
    calls = itertools.count()
    up = by_hand(model, mesh).blocks[1].mlp.up
    up.register_forward_hook(lambda module, args, out: out if next(calls) < 3 else out * torch.nan)
    return model


def whole_in_disguise(model: Any, mesh: Any) -> Any:
    """Parameters of the right size that nobody computes with."""
    for block in model.blocks:
        up = block.mlp.up
        whole = up.weight.detach().clone()
        up.forward = lambda x, whole=whole, bias=up.bias: F.linear(x, whole, bias)
        up.weight = nn.Parameter(whole.chunk(dist.get_world_size())[dist.get_rank()].clone())
    return model


def not_parallel(model: Any, mesh: Any) -> Any:
    return model


def linear_for_everybody(model: Any, mesh: Any) -> Any:
    """Changes a class of the whole process."""
    original = nn.Linear.forward
    nn.Linear.forward = lambda self, input: original(self, input) * 2  # type: ignore[method-assign]
    return by_hand(model, mesh)


def clipping_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """Right for one process and for DTensors, wrong for shards cut by hand."""
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return value.detach()


# --- healthy, and not easy to tell


class ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, gradient.contiguous())
        return torch.cat(parts, 1)


class GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous()


class SequenceNorm(nn.LayerNorm):
    """On each rank's part of the sequence: its weights' gradients are parts of a sum."""

    def forward(self, input: Tensor) -> Tensor:
        part = super().forward(ScatterSequence.apply(input))  # type: ignore[no-untyped-call]
        out: Tensor = GatherSequence.apply(part)  # type: ignore[no-untyped-call]
        return out


def sequence_parallel(model: Any, mesh: Any) -> Any:
    by_hand(model, mesh)
    for block in model.blocks:
        block.mlp_norm.__class__ = SequenceNorm
    return model


def summing_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """Sums the norms' gradients after backward, as Megatron does."""
    optimizer.zero_grad()
    value = loss(model, micro_batches[0])
    value.backward()
    for block in model.blocks:
        for parameter in block.mlp_norm.parameters():
            dist.all_reduce(parameter.grad)
    optimizer.step()
    return value.detach()


def renamed(model: Any, mesh: Any) -> Any:
    """The same shards under other names, and one of them transposed."""
    by_hand(model, mesh)
    for block in model.blocks:
        up = block.mlp.up
        up.shard = nn.Parameter(up.weight.detach().t().contiguous())
        del up._parameters["weight"]
        up.forward = lambda x, up=up: F.linear(Copy.apply(x), up.shard.t(), up.bias)  # type: ignore[no-untyped-call]
    return model


def fused(model: Any, mesh: Any) -> Any:
    """Query, key and value in one matrix of each rank's parts."""
    by_hand(model, mesh)
    for block in model.blocks:
        attention = block.attention
        joined = Column(nn.Linear(WIDTH, dist.get_world_size()))
        for name in ("weight", "bias"):
            parts = [getattr(getattr(attention, part), name).detach() for part in "qkv"]
            setattr(joined, name, nn.Parameter(torch.cat(parts)))
        attention.joined = joined
        for index, part in enumerate("qkv"):
            setattr(attention, part, _Third(joined, index))
    return model


class _Third(nn.Module):
    """One of the three outputs of a layer that is registered elsewhere."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self._layer, self._index = [layer], index

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._layer[0](x).chunk(3, -1)[self._index]
        return out


def in_float64() -> Transformer:
    return Transformer().double()


def in_bfloat16() -> Transformer:
    return Transformer().bfloat16()


def partly_frozen() -> Transformer:
    model = Transformer()
    model.embedding.requires_grad_(False)
    return model
