"""torch.compile on a case: ``pytest --pyargs pytest_gputrain.checks --gputrain-case MODULE:ATTR``.

On a CPU dynamo's backends stand in for inductor: ``eager`` where it is dynamo that decides, ``aot_eager``
where numbers are compared; on CUDA inductor compiles, and speed counts. Without a case, the reference
models and fine-tuning on documents. Training by the package's script, on ranks too, and inductor on a CPU
are in ``test_compiled_training``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gputrain.checks.parametrize import BoundCheck
from pytest_gputrain.plugin.settings import settings_of
from pytest_gputrain.plugin.shipped import parametrize
from pytest_gputrain.reference import sft

if TYPE_CHECKING:
    import pytest

    from pytest_gputrain.plugin.launcher import PytestLauncher

# Which code is compiled anew, and what is saved, is the same whatever compiles the graph.
DYNAMO_ALONE = ("test_compile_no_recompiles", "test_compile_checkpoint_keys", "test_batch_shapes_constant")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    backend = "eager" if metafunc.function.__name__ in DYNAMO_ALONE else None
    more = [] if settings_of(metafunc.config).cases else [sft.case]
    parametrize(metafunc, num_gpus=1, more=more, backend_on_cpu=backend)


def test_batch_shapes_constant(check: BoundCheck, ddp_launcher: PytestLauncher) -> None:
    check(launcher=ddp_launcher)


def test_compile_no_recompiles(check: BoundCheck, ddp_launcher: PytestLauncher) -> None:
    check(launcher=ddp_launcher)


def test_compile_parity(check: BoundCheck, ddp_launcher: PytestLauncher) -> None:
    check(launcher=ddp_launcher)


def test_compile_checkpoint_keys(check: BoundCheck, ddp_launcher: PytestLauncher) -> None:
    check(launcher=ddp_launcher)


def test_compile_speed(check: BoundCheck, ddp_launcher: PytestLauncher) -> None:
    check(launcher=ddp_launcher)
