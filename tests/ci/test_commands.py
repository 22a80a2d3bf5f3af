"""The commands of each recipe, run here as its CI runs them, in a user's project on a machine without GPUs.

A recipe's text is run as it stands. That there is no GPU is told by its own variable, NIGHT_DEVICE=cpu. pip
is told to stay off the network and, but for one run, only to say what it would install. Variables that CI,
Slurm or Kubernetes add are set as they set them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ci import recipes
from tests.ci.conftest import Machine
from tests.ci.recipes import CI, JOB, ROOT, Script

pytestmark = [
    pytest.mark.skipif("sys.platform != 'linux'", reason="launching ranks needs Linux"),
    pytest.mark.timeout(600),
]
NIGHT = {"NIGHT_DEVICE": "cpu", "NIGHT_CHECKS": "gradients_arrive", "NIGHT_NEW_BASELINE": "1"}
PIP = {"PYTEST_GPUTRAIN": str(ROOT), "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0",
       "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_DRY_RUN": "1"}  # fmt: skip
GPU_YML = CI / "github" / "gpu.yml"


def slurm(name: str) -> list[Script]:
    return [Script(name, (CI / "slurm" / name).read_text(), {"GPUTRAIN_CASE": "my_package.cases:gpt"})]


def verdict(folder: Path) -> str:
    found = json.loads((folder / "report.json").read_text())
    return f"{found['verdict']}, {len(found['tests'])} tests"


@pytest.mark.slow
def test_a_night_on_github_from_the_installation_to_the_summary(machine: Machine, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    environ = {**PIP, **NIGHT, "PIP_DRY_RUN": "0", "GITHUB_STEP_SUMMARY": str(summary)}
    code, said = machine.carry_out(recipes.github(GPU_YML, "night"), environ)
    assert code == 0, said
    # What runs is what the recipe has installed, beside a torch that was there.
    assert (machine.project / ".venv" / "bin" / "gputrain").exists()
    assert "Requirement already satisfied: torch" in said
    assert summary.read_text().startswith("## gputrain: ✅ passed\n")
    assert verdict(machine.project / "report") == "passed, 2 tests"
    assert len(list((machine.project / "nights").glob("*/report.json"))) == 1


@pytest.mark.parametrize(
    "scripts",
    [
        pytest.param(recipes.gitlab("night"), id="gitlab"),
        pytest.param(recipes.buildkite("night"), id="buildkite"),
        pytest.param(slurm("night.sbatch"), id="slurm"),
    ],
)
@pytest.mark.nightly
def test_a_night_elsewhere(machine: Machine, tmp_path: Path, scripts: list[Script]) -> None:
    told = tmp_path / "annotation.md"
    environ = {**PIP, **NIGHT, "NIGHTS": str(tmp_path / "nights"), "NIGHT_REPORT": "report",
               "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7", "BUILDKITE_ANNOTATION": str(told)}  # fmt: skip
    code, said = machine.carry_out(scripts, environ)
    assert code == 0, said
    assert verdict(machine.project / "report") == "passed, 2 tests"
    assert len(list((tmp_path / "nights").glob("*/report.json"))) == 1
    if scripts[0].name == "night" and "buildkite" in scripts[0].text:
        assert told.read_text().startswith("## gputrain: ✅ passed\n")


@pytest.mark.nightly
def test_a_night_on_kubernetes(machine: Machine, tmp_path: Path) -> None:
    command, environ = recipes.container(JOB)
    paths = {
        name: value.replace("/gputrain", str(tmp_path)).replace("$(POD)", "pod-1")
        for name, value in environ.items()
    }
    code, said = machine.bash(*command[1:], **{**paths, **NIGHT})
    assert command[0] == "bash" and code == 0, said
    assert verdict(tmp_path / "reports" / "pod-1") == "passed, 2 tests"
    assert len(list((tmp_path / "nights").glob("*/report.json"))) == 1


@pytest.mark.parametrize(
    "scripts",
    [
        pytest.param(recipes.github(GPU_YML, "pull-request"), id="github"),
        pytest.param(recipes.gitlab("gpu"), id="gitlab"),
        pytest.param(recipes.buildkite("gpu"), id="buildkite"),
    ],
)
@pytest.mark.nightly
def test_without_gpus_a_pull_request_is_red(machine: Machine, tmp_path: Path, scripts: list[Script]) -> None:
    summary = tmp_path / "summary.md"
    code, said = machine.carry_out(
        scripts, {**PIP, "GPUTRAIN_FAKE_GPUS": "0", "GITHUB_STEP_SUMMARY": str(summary)}
    )
    assert code == 1, said
    assert "--require-gpus 2: needs 2 GPUs, found 0" in said
    told = machine.project / "report" / "summary.md" if len(scripts) == 1 else summary
    assert "no test was run" in told.read_text()


@pytest.mark.parametrize(
    "scripts",
    [
        pytest.param(recipes.github(CI / "github" / "cpu.yml", "cpu"), id="github"),
        pytest.param(recipes.gitlab("cpu"), id="gitlab"),
        pytest.param(recipes.buildkite("cpu"), id="buildkite"),
    ],
)
@pytest.mark.nightly
def test_the_cpu_job_runs_all_checks_although_a_test_fails(
    machine: Machine, tmp_path: Path, scripts: list[Script]
) -> None:
    summary = tmp_path / "summary.md"
    summary.touch()
    code, said = machine.carry_out(scripts, {**PIP, "TESTS": "fail", "GITHUB_STEP_SUMMARY": str(summary)})
    assert code == 1, said
    assert verdict(machine.project / "report" / "tests") == "failed, 1 tests"
    assert verdict(machine.project / "report" / "checks").startswith("passed, ")
    if len(scripts) > 1:
        assert summary.read_text().count("## gputrain: ") == 2


@pytest.mark.nightly
def test_the_image_keeps_its_torch(machine: Machine) -> None:
    (run,) = recipes.docker_runs()
    code, said = machine.carry_out([Script("RUN", run)], PIP)
    assert code == 0, said
    assert "Requirement already satisfied: torch" in said
    assert not (machine.project / "torch.txt").exists()
