"""The reference models: sizes, causality, branches, and that the checks pass on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_gputrain.case import CaseError
from pytest_gputrain.checks import run_checks
from pytest_gputrain.reference import gpt, opt, reference_cases, sparse_attention
from pytest_gputrain.reference.sparse_attention import BRANCHES, sparse_attention_case


def test_embedded_cases() -> None:
    assert [case.name for case in reference_cases()] == ["gpt", "opt"]


def test_gpt_width_follows_depth() -> None:
    model = gpt.gpt_case(depth=3).model()
    assert model.embedding.embedding_dim == 192
    assert len(model.blocks) == 3
    assert gpt.gpt_case(depth=3).name == "gpt-d3"


@pytest.mark.parametrize("case", [gpt.case, sparse_attention.case], ids=lambda case: case.name)
def test_model_looks_at_no_later_token(case: object) -> None:
    assert case in (gpt.case, sparse_attention.case)
    chosen = gpt.case if case is gpt.case else sparse_attention.case
    torch.manual_seed(0)
    model = chosen.model().eval()
    torch.nn.init.normal_(model.head.weight)
    tokens = chosen.batch(2, "cpu")["inputs"]
    later = tokens.clone()
    later[:, 20:] = (later[:, 20:] + 1) % 64
    assert torch.equal(model(tokens)[:, :20], model(later)[:, :20])
    assert not torch.equal(model(tokens)[:, 20:], model(later)[:, 20:])


def test_opt_by_name() -> None:
    with torch.device("meta"):
        model = opt.case_125m.model()
    assert sum(parameter.numel() for parameter in model.parameters()) == 125_239_296
    with pytest.raises(CaseError, match="no OPT of size 'opt-1t'; give one of opt-tiny, opt-125m"):
        opt.opt_case("opt-1t")


@pytest.mark.parametrize("branch", BRANCHES)
def test_disabled_branch_gets_no_gradient(branch: str) -> None:
    fixed: dict[str, Any] = {branch: 0.0}
    case = sparse_attention_case(depth=1, **fixed)
    (result,) = run_checks(case, checks=["gradients_arrive"])
    assert result.outcome == "failed"
    assert f"key_value.{branch}.weight" in result.message


def test_lengths_that_do_not_fit_are_told() -> None:
    with pytest.raises(CaseError, match="sequence_length 30 is not a multiple of block_size 4"):
        sparse_attention_case(sequence_length=30)


@pytest.mark.parametrize(
    "case",
    [
        # The same as ci/check, and beside it.
        pytest.param(gpt.case, id="gpt", marks=pytest.mark.nightly),
        pytest.param(sparse_attention.case, id="sparse-attention", marks=pytest.mark.slow),
    ],
)
def test_all_checks_pass(case: object) -> None:
    chosen = gpt.case if case is gpt.case else sparse_attention.case
    for result in run_checks(chosen):
        assert result.outcome in ("passed", "skipped"), str(result)


def test_checks_pass_whose_branches_are_all_needed() -> None:
    """The others are slow: what compiles, and what looks for a batch size."""
    for result in run_checks(sparse_attention.case, checks=["gradients_arrive", "ddp_parity"]):
        assert result.outcome == "passed", str(result)
