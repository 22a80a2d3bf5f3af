"""Plans that cannot be carried out: one line, on a model without memory, before any rank starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from pytest_gputrain import tp_plan_for
from pytest_gputrain.tensor_parallel import validate_mesh, validate_plan
from tests.tensor_parallel import families


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def refusal(build: Callable[[], nn.Module], world_size: int, plan: Any = None) -> str:
    model = on_meta(build)
    with pytest.raises(ValueError, match=r".") as refused:
        validate_plan(model, tp_plan_for(model) if plan is None else plan, world_size)
    return str(refused.value)


@pytest.mark.parametrize(
    ("build", "world_size", "message"),
    [
        (
            families.opt,
            3,
            "model.decoder.layers.0.self_attn has 4 heads, not divisible by 3 ranks (4 = 1 x 3 + 1); "
            "legal numbers of ranks: 1, 2, 4",
        ),
        (
            partial(families.llama, num_attention_heads=6, hidden_size=48, num_key_value_heads=3),
            2,
            "model.layers.0.self_attn has 3 key-value heads, not divisible by 2 ranks (3 = 1 x 2 + 1), "
            "and 2 ranks "
            "are no multiple of 3 heads; legal numbers of ranks: 1, 3",
        ),
        (
            partial(families.opt, ffn_dim=66),
            4,
            "model.decoder.layers.0.fc1 has 66 output features, not divisible by 4 ranks (66 = 16 x 4 + 2); "
            "legal numbers of ranks: 1, 2, 3, 6, 11, 22, 33",
        ),
        (
            partial(families.opt, vocab_size=5),
            4,
            "model.decoder.embed_tokens has 5 rows: shards of 2 leave nothing for the last of 4 ranks (3 "
            "x 2 = 6); "
            "give fewer ranks",
        ),
    ],
)
def test_a_world_size_that_does_not_divide(build: Any, world_size: int, message: str) -> None:
    assert refusal(build, world_size) == message


COLUMN, ROW = ColwiseParallel(), RowwiseParallel()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"model.decoder.layers.*.self_atn.q_proj": COLUMN},
            "the plan names 'model.decoder.layers.*.self_atn.q_proj', and the model has no such module; "
            "near: "
            "model.decoder.layers.1.self_attn.q_proj, model.decoder.layers.0.self_attn.q_proj, "
            "model.decoder.layers.1.self_attn.v_proj",
        ),
        (
            {"transformer": COLUMN},
            "the plan names 'transformer', and the model has no such module; the model's own are model, "
            "lm_head",
        ),
        ({3: COLUMN}, "the plan has the key 3; legal is a module's name as text"),
        ({}, "the tensor-parallel plan is empty; give module name -> style, or use tp_plan_for(model)"),
        (
            {"lm_head": 5},
            "the plan gives 'lm_head' 5 (int); legal is a ParallelStyle of torch, as ColwiseParallel()",
        ),
        (
            {"lm_head": "columnwise"},
            "the plan gives 'lm_head' the style 'columnwise'; legal by name are colwise, "
            "colwise_gather_output, "
            "rowwise, embedding_rowwise, rowwise_split_input, replicated_with_grad_allreduce, others as a "
            "ParallelStyle",
        ),
        (
            {"model.decoder.layers.0.final_layer_norm": COLUMN},
            "the plan gives 'model.decoder.layers.0.final_layer_norm', a LayerNorm, the style "
            "ColwiseParallel; "
            "that style fits Linear and Embedding",
        ),
        (
            {"lm_head": COLUMN},
            "model.decoder.embed_tokens.weight and lm_head.weight are one tied parameter, and the plan "
            "shards it "
            "differently (model.decoder.embed_tokens: whole; lm_head: dimension 0); give them the same "
            "dimension, "
            "as RowwiseParallel on the embedding and ColwiseParallel on the head",
        ),
    ],
)
def test_a_plan_that_does_not_fit(plan: Any, message: str) -> None:
    assert refusal(families.opt, 2, plan) == message


def test_divided_keys_of_a_users_plan() -> None:
    plan = {f"model.layers.*.self_attn.{name}_proj": COLUMN for name in "qkv"}
    assert refusal(families.llama, 4, plan) == (
        "model.layers.0.self_attn has 2 key-value heads, not divisible by 4 ranks (2 = 0 x 4 + 2); legal "
        "numbers "
        "of ranks: 1, 2, or replicate them: tp_plan_for(model) does"
    )


def test_heads_with_a_norm_for_each() -> None:
    plan = {f"model.layers.*.self_attn.{name}_proj": COLUMN for name in "qkv"}
    assert refusal(families.stablelm, 2, plan) == (
        "model.layers.0.self_attn.q_layernorm.norms has an entry for each of the 4 heads of "
        "model.layers.0.self_attn, and the plan cuts those over 2 ranks; gather its projections, "
        "ColwiseParallel(output_layouts=Replicate()), as tp_plan_for(model) does"
    )


def test_a_model_with_nothing_to_shard() -> None:
    with pytest.raises(
        ValueError, match="Sequential has no numbered layers with linear modules, nor an attention"
    ):
        tp_plan_for(nn.Sequential(nn.Linear(4, 4)))


def test_sequence_parallel_needs_divided_attention_in_every_layer() -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        tp_plan_for(on_meta(families.NanoGPT), sequence_parallel=True)
    assert str(refused.value) == (
        "sequence_parallel=True needs an attention of a known family in every layer, and h.0 has none "
        "whose heads "
        "could be divided; use it without"
    )
    with pytest.raises(ValueError, match=r".") as refused:
        tp_plan_for(nn.Sequential(nn.Linear(4, 4)), sequence_parallel=True)
    assert str(refused.value) == (
        "sequence_parallel=True needs one stack of numbered layers, and the model has none; use it without"
    )


def test_loss_parallel_needs_a_head() -> None:
    model = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(ValueError, match="loss_parallel=True needs a head"):
        tp_plan_for(model, loss_parallel=True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4), "a mesh of 2 x 4 = 8 needs 8 ranks, and there are 4; give a shape whose product is 4"),
        ((8,), "a mesh of 8 needs 8 ranks, and there are 4; give a shape whose product is 4"),
    ],
)
def test_a_mesh_larger_than_the_ranks(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        validate_mesh(shape, 4)
    assert str(refused.value) == message


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_opt125m_is_planned_without_its_memory(world_size: int) -> None:
    from pytest_gputrain.reference import opt125m

    for case in (opt125m.case, opt125m.case_odd):
        model = on_meta(case.model)
        validate_plan(model, tp_plan_for(model), world_size)
    assert sum(parameter.numel() for parameter in on_meta(opt125m.case.model).parameters()) == 125_239_296
