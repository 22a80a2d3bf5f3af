"""``@parametrize_with_checks`` and the shipped test modules, through pytest itself."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import (
    Run,
    _no_settings_of_the_caller,
    run,
    run_child,
    run_with_torch,
    torch_is_there,
)

__all__ = ["_no_settings_of_the_caller", "run", "run_child", "run_with_torch", "torch_is_there"]

CASES = """
import torch
from torch import nn
from pytest_gputrain import TrainingCase

class Net(nn.Linear):
    pass

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)
    def forward(self, x):
        return self.used(x)

def small():
    return nn.Linear(3, 1)

def draw(batch_size, device):
    return torch.randn(batch_size, 3).to(device)

def loss(model, batch):
    return model(batch).square().mean()

good = TrainingCase(name="good", model=small, batch=draw, loss=loss)
bad = TrainingCase(name="bad", model=Unused, batch=draw, loss=loss)
known = TrainingCase(name="known", model=Unused, batch=draw, loss=loss,
                     expected_failures={"gradients_arrive": "spare"})
wrong = TrainingCase(name="wrong", model=small, batch=draw, loss=loss,
                     expected_failures={"gradients_arrive": "not really"})
def raising(batch_size, device):
    raise ValueError("no data")
unusable = TrainingCase(name="unusable", model=small, batch=raising, loss=loss,
                        expected_failures={"gradients_arrive": "spare"})
"""

TESTS = """
from pytest_gputrain import parametrize_with_checks
from my_cases import good, bad, known, wrong, unusable

CHECKS = ["gradients_arrive", "checkpointing_parity"]

@parametrize_with_checks([good, bad, known, wrong, unusable], checks=CHECKS)
def test_training(case, check):
    check(case)

@parametrize_with_checks(["my_cases:good"], checks=["gradients_arrive"])
def test_alone(check):
    result = check()
    assert result.outcome == "passed"
"""


def test_one_test_a_pair_with_the_right_outcome(pytester: pytest.Pytester, run_with_torch: Run) -> None:
    pytester.makepyfile(my_cases=CASES, test_it=TESTS)
    result = run_with_torch("-v", "-rxXs")
    result.stdout.fnmatch_lines(
        [
            "*test_training?good-gradients_arrive? PASSED*",
            "*test_training?good-checkpointing_parity? SKIPPED*",
            "*test_training?bad-gradients_arrive? FAILED*",
            "*test_training?known-gradients_arrive? XFAIL*",
            "*test_training?wrong-gradients_arrive? FAILED*",
            "*test_training?unusable-gradients_arrive? FAILED*",
            "*test_alone?good-gradients_arrive? PASSED*",
        ]
    )
    text = result.stdout.str()
    assert "gradients_arrive[bad] FAILED: 2 of 4 trainable parameters got no gradient" in text
    assert "XPASS(strict)" in text
    assert "case 'unusable': batch() raised ValueError: no data (at " in text
    result.assert_outcomes(passed=2, failed=4, xfailed=1, skipped=4)


def test_collection_builds_no_model_and_imports_no_torch(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makepyfile(
        conftest="""
            import sys
            def pytest_collection_finish(session):
                print("IMPORTED", [name for name in ("torch", "transformers") if name in sys.modules])
        """,
        test_it="""
            from pytest_gputrain import parametrize_with_checks
            from pytest_gputrain.reference import reference_cases

            @parametrize_with_checks(reference_cases())
            def test_training(case, check):
                check(case)
        """,
    )
    result = run_child("--collect-only", "-q", "-s", "-n0")
    result.stdout.fnmatch_lines(["*test_training?gpt-ddp_parity?", "*IMPORTED []*"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("@parametrize_with_checks([case], checks=['nope'])", "no check is called 'nope'; give some of"),
        ("@parametrize_with_checks(case)", "give a list of cases"),
        ("@parametrize_with_checks([3])", "a case is a int; give a TrainingCase or 'MODULE:ATTR'"),
        ("@parametrize_with_checks([case])", "test_it takes no argument called check; write (case, check)"),
    ],
)
def test_misuse_is_told_at_collection(pytester: pytest.Pytester, run: Run, line: str, message: str) -> None:
    pytester.makepyfile(
        "from pytest_gputrain import parametrize_with_checks\n"
        "from pytest_gputrain.reference.gpt import case\n"
        f"{line}\n"
        "def test_it(): pass\n"
    )
    result = run()
    assert message in result.stdout.str()
    result.assert_outcomes(errors=1)


def test_shipped_modules_run_the_users_case_on_both_devices(
    pytester: pytest.Pytester, run_with_torch: Run
) -> None:
    pytester.makepyfile(my_cases=CASES)
    arguments = ("--pyargs", "pytest_gputrain.checks", "--gputrain-case", "my_cases:good", "-v")
    result = run_with_torch(*arguments, "-k", "gradients_arrive or data_differs")
    result.stdout.fnmatch_lines(
        [
            "*test_data_parallel.py::test_ddp_data_differs?good-cpu? PASSED*",
            "*test_data_parallel.py::test_ddp_data_differs?good-cuda? SKIPPED*",
            "*test_gradient_flow.py::test_gradients_arrive?good-cpu? PASSED*",
            "*test_gradient_flow.py::test_gradients_arrive?good-cuda? SKIPPED*",
        ]
    )


def test_shipped_modules_tell_a_bad_case_in_one_line(pytester: pytest.Pytester, run_child: Run) -> None:
    pytester.makepyfile(my_cases=CASES)
    result = run_child("--pyargs", "pytest_gputrain.checks", "--gputrain-case", "my_cases:goods", "-n0")
    result.stderr.fnmatch_lines(["*case: my_cases has no attribute 'goods'; did you mean good?*"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in result.stdout.str()
