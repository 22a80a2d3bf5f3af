"""A case's defaults are right, its fields are checked, and "MODULE:ATTR" is told in one line."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_gputrain.case import CaseError, TrainingCase, load_case
from pytest_gputrain.case.loading import describe
from pytest_gputrain.case.returned import LOCATION, stream_of, wrapped_by

REFERENCE = "pytest_gputrain.reference.gpt"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def batch(batch_size: int, device: Any) -> dict[str, Tensor]:
    return {"x": torch.randn(batch_size, 3), "y": torch.randn(batch_size, 1)}


def mean_loss(model: Any, batch: Any) -> Tensor:
    value: Tensor = (model(batch["x"]) - batch["y"]).square().mean()
    return value


def sum_loss(model: Any, batch: Any) -> Tensor:
    value: Tensor = (model(batch["x"]) - batch["y"]).square().sum()
    return value


def make(**fields: Any) -> TrainingCase:
    return TrainingCase(**{"name": "tiny", "model": model, "batch": batch, "loss": mean_loss, **fields})


def gradient(case: TrainingCase, parts: list[Any]) -> Tensor:
    """What the case's step leaves in the weight's gradient."""
    net = case.model()
    case.step(net, torch.optim.SGD(net.parameters(), lr=0.0), parts)
    weight = net.weight.grad
    assert isinstance(weight, Tensor)
    return weight


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": mean_loss},
        {"loss": sum_loss, "loss_reduction": "sum"},
        {"loss": mean_loss, "loss_reduction": "token_mean", "num_targets": lambda batch: len(batch["x"])},
    ],
    ids=["mean", "sum", "token_mean"],
)
def test_default_step_on_ragged_micro_batches_gives_the_whole_batchs_gradient(fields: Any) -> None:
    case = make(**fields)
    whole = batch(7, "cpu")
    parts = case.split(whole, 3)
    assert [len(part["x"]) for part in parts] == [2, 2, 3]
    torch.testing.assert_close(gradient(case, parts), gradient(case, [whole]))


def test_a_loss_that_is_an_output_is_told_where_the_loss_is() -> None:
    output = type("Output", (), {"loss": torch.ones(()), "__repr__": lambda self: "Output"})()
    case = make(loss=lambda model, batch: output)
    with pytest.raises(ValueError, match=r"returned a Output; legal is a scalar tensor, such as its \.loss$"):
        gradient(case, [batch(2, None)])


def optimizer_and_scheduler(model: nn.Module) -> Any:
    sgd = torch.optim.SGD(model.parameters())
    return sgd, torch.optim.lr_scheduler.ConstantLR(sgd)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"optimizer": optimizer_and_scheduler},
            "optimizer(model) returned a tuple (SGD, ConstantLR); legal",
        ),
        ({"optimizer": lambda model: [torch.optim.SGD(model.parameters())]}, "returned a list (SGD); legal"),
        ({"optimizer": lambda model: None}, "the case's optimizer(model) returned None; legal is one object"),
        ({"optimizer": lambda model: torch.optim.SGD}, "returned the class SGD; legal is one object with"),
        ({"loss": lambda model, batch: None}, "loss(model, batch) returned None; legal is a scalar tensor"),
        ({"loss": lambda model, batch: (1, 2)}, "returned a tuple (int, int); legal is a scalar tensor"),
        ({"loss": lambda model, batch: mean_loss(model, batch).item()}, "legal is a scalar tensor"),
        (
            {"loss": lambda model, batch: mean_loss(model, batch).detach()},
            "returned a tensor of torch.float32 that leads to no parameter; legal is a scalar tensor that",
        ),
        (
            {"loss_reduction": "token_mean", "num_targets": lambda batch: None},
            "num_targets(batch) returned None; legal is the number of targets that count in the loss",
        ),
    ],
)
def test_what_a_function_returned_is_told_at_its_line(fields: Any, line: str) -> None:
    case = make(**fields)
    net = case.model()
    with pytest.raises(ValueError, match=re.escape(line)) as raised:
        case.step(net, case.optimizer(net), [batch(2, None)])
    where = getattr(raised.value, LOCATION)
    assert re.search(r"test_case\.py:\d+ in (<lambda>|optimizer_and_scheduler)$", where)
    assert describe(raised.value).endswith(f"(at {where})")


def test_a_wrap_that_returns_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"the case's wrap\(model\) returned None; legal is the data-parallel"
    ):
        wrapped_by(make(wrap=lambda model: None), nn.Linear(1, 1))


def test_batches_that_cannot_be_iterated() -> None:
    with pytest.raises(ValueError, match=r"the case's batches\(\) returned None; legal is an iterable of"):
        stream_of(make(batches=lambda: None))


def test_an_optimizer_of_any_kind_is_legal_beside_an_own_step() -> None:
    case = make(optimizer=optimizer_and_scheduler, step=lambda model, pair, micro_batches: pair[0].step())
    net = case.model()
    assert case.step(net, case.optimizer(net), [batch(2, None)]) is None


def test_default_step_returns_the_detached_loss() -> None:
    case = make()
    net, whole = case.model(), batch(4, "cpu")
    expected = mean_loss(net, whole)
    returned = case.step(net, case.optimizer(net), case.split(whole, 2))
    assert not returned.requires_grad
    torch.testing.assert_close(returned, expected.detach())


def test_replacing_the_loss_replaces_it_in_the_default_step() -> None:
    case = dataclasses.replace(make(), loss=lambda model, batch: 3 * mean_loss(model, batch))
    whole = batch(4, "cpu")
    torch.testing.assert_close(gradient(case, [whole]), 3 * gradient(make(), [whole]))
    assert not case.has_own_step
    assert dataclasses.replace(case, step=lambda *given: None).has_own_step


def test_default_batches_repeat_batch_and_state_dict_is_the_inner_models() -> None:
    case = make()
    assert len(next(iter(case.batches()))["x"]) == 4
    assert list(case.state_dict(nn.DataParallel(case.model()))) == ["weight", "bias"]


def test_functions_may_be_given_by_name() -> None:
    case = make(model=f"{REFERENCE}:case.model", wrap="no_such_module:function")
    assert type(case.model()).__name__ == "GPT"
    with pytest.raises(CaseError, match=r"^tiny\.wrap: no module named 'no_such_module'"):
        case.wrap(None)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"name": ""}, "a case's name is ''; give a non-empty string, it shows in test ids"),
        (
            {"model": 3},
            "case 'tiny': model is 3 (int); give a function or \"package.module:attribute\"",
        ),
        (
            {"model": nn.Linear(3, 1)},
            "case 'tiny': model is a Linear; give a function that builds one with fresh weights, for checks "
            "train several",
        ),
        (
            {"step": lambda model, optimizer: None},
            "case 'tiny': step is <lambda>(model, optimizer), and is called as "
            "step(model, optimizer, micro_batches): too many positional arguments",
        ),
        (
            {"set_checkpointing": nn.Module.train, "batch": lambda batch_size, device, length: None},
            "case 'tiny': batch is <lambda>(batch_size, device, length), and is called as "
            "batch(batch_size, device): missing a required argument: 'length'",
        ),
        ({"loss": "no_colon"}, "tiny.loss: 'no_colon' is not MODULE:ATTR; give \"package.module:attribute\""),
        (
            {"loss_reduction": "max"},
            "case 'tiny': loss_reduction is 'max'; give one of mean, sum, token_mean",
        ),
        (
            {"loss_reduction": "token_mean"},
            "case 'tiny': loss_reduction 'token_mean' needs num_targets(batch), "
            "the number of tokens that count in the loss",
        ),
        (
            {"expected_failures": ["ddp_parity"]},
            "case 'tiny': expected_failures is ['ddp_parity']; give a mapping from check id to the reason",
        ),
    ],
)
def test_bad_field_is_told_in_one_line(fields: Any, line: str) -> None:
    with pytest.raises(CaseError) as raised:
        make(**fields)
    assert str(raised.value) == line


def test_what_a_decorator_gives_is_not_asked_for() -> None:
    def with_scale(function: Any) -> Any:
        @functools.wraps(function)
        def given(*arguments: Any) -> Any:
            return function(2.0, *arguments)

        return given

    @with_scale
    def scaled_loss(scale: float, model: Any, batch: Any) -> Any:
        return scale * mean_loss(model, batch)

    assert make(loss=scaled_loss).loss is scaled_loss


def test_case_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        TrainingCase("tiny", model, batch, mean_loss)  # type: ignore[call-arg]


CASES = """
from pytest_gputrain.reference.gpt import case, gpt_case
pair = [gpt_case(name="one"), gpt_case(name="two")]
empty = []
number = 3
class holder:
    inner = case
def made():
    return pair
def broken():
    return 1 / 0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_cases.py").write_text(CASES)
    (tmp_path / "bad_import.py").write_text("import not_there_at_all\n")
    (tmp_path / "bad_syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_cases", raising=False)
    yield "my_cases"
    sys.modules.pop("my_cases", None)  # the cases of other tests have this name as well


@pytest.mark.parametrize(
    ("attribute", "names"),
    [("case", ["gpt"]), ("pair", ["one", "two"]), ("made", ["one", "two"]), ("holder.inner", ["gpt"])],
)
def test_load_case_finds_cases_from_the_working_folder(module: str, attribute: str, names: list[str]) -> None:
    assert [case.name for case in load_case(f"{module}:{attribute}")] == names


@pytest.mark.parametrize(
    ("spec", "fragment"),
    [
        ("my_cases", "'my_cases' is not MODULE:ATTR; give \"package.module:attribute\""),
        ("my_cases.py:case", "'my_cases.py' is a file; give its module name, my_cases:case"),
        ("my_case:case", "no module named 'my_case' for 'my_case:case'; give a module that can be imported"),
        ("my_cases:cas", "my_cases has no attribute 'cas'; did you mean case?"),
        ("my_cases:number", "my_cases:number is of type int; name a TrainingCase, a list of them"),
        ("my_cases:empty", "my_cases:empty is an empty list"),
        ("my_cases:broken", "my_cases:broken() raised ZeroDivisionError: division by zero (at "),
        ("bad_import:case", "importing bad_import failed: ModuleNotFoundError: No module named 'not_there"),
        ("bad_syntax:case", "importing bad_syntax failed: SyntaxError: "),
    ],
)
def test_load_case_tells_what_is_wrong_in_one_line(module: str, spec: str, fragment: str) -> None:
    with pytest.raises(CaseError) as raised:
        load_case(spec)
    assert fragment in str(raised.value)
    assert "\n" not in str(raised.value)


def test_cases_checks_and_references_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from pytest_gputrain.case import TrainingCase, load_case\n"
        "from pytest_gputrain.checks import run_checks, parametrize_with_checks, get_check, all_check_ids\n"
        "from pytest_gputrain.reference import reference_cases, sparse_attention\n"
        "reference_cases(); [get_check(name) for name in all_check_ids()]\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
