"""The recipes of ci/, and the shell scripts that are in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CI = ROOT / "ci"
GITHUB = sorted((CI / "github").glob("*.yml"))
GITLAB = CI / "gitlab" / "gputrain.yml"
BUILDKITE = CI / "buildkite" / "pipeline.yml"
JOB, TRAINJOB = CI / "kubernetes" / "night.yaml", CI / "kubernetes" / "trainjob.yaml"
DOCKERFILE = CI / "docker" / "Dockerfile"
SBATCH = sorted((CI / "slurm").glob("*.sbatch"))


@dataclass(frozen=True)
class Script:
    """One piece of shell. always: it runs although an earlier one failed."""

    name: str
    text: str
    environ: dict[str, str] = field(default_factory=dict)
    always: bool = False


def read(path: Path) -> dict[Any, Any]:
    """The recipe's document; YAML reads GitHub's ``on`` as True, so keys may be anything."""
    found: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def github(path: Path, job: str) -> list[Script]:
    """The steps of a job that are shell. Expressions in the environment are empty, as in a scheduled run."""
    recipe = read(path)
    found = recipe["jobs"][job]
    environ = {**recipe.get("env", {}), **found.get("env", {})}
    known = {name: "" if "${{" in value else value for name, value in environ.items()}
    always = ("always()", "${{ !cancelled() }}")
    return [
        Script(step["name"], step["run"], known, always=step.get("if") in always)
        for step in found["steps"]
        if "run" in step
    ]


def gitlab(job: str) -> list[Script]:
    """A job's script, as one shell runs it, and what comes after in any case."""
    recipe = read(GITLAB)
    environ = {name: str(value) for name, value in recipe["variables"].items()}
    found = recipe[job]
    scripts = [Script(job, "\n".join(found["script"]), environ)]
    if "after_script" in found:
        scripts.append(Script(f"{job}, after", "\n".join(found["after_script"]), environ, always=True))
    return scripts


def buildkite(step: str) -> list[Script]:
    """A step's command; ``$$`` is a dollar sign that the upload of the pipeline leaves to the shell."""
    recipe = read(BUILDKITE)
    found = next(one for one in recipe["steps"] if one["key"] == step)
    text = found["command"].replace("$$", "\0")
    assert "$" not in text, f"{step}: a single $ is expanded when the pipeline is uploaded"
    return [Script(step, text.replace("\0", "$"), {**recipe["env"], **found.get("env", {})})]


def container(path: Path) -> tuple[list[str], dict[str, str]]:
    """The command of a Kubernetes job, and its environment but for what the cluster fills in."""
    spec = read(path)["spec"]
    found = spec["trainer"] if "trainer" in spec else spec["template"]["spec"]["containers"][0]
    environ = {one["name"]: one["value"] for one in found["env"] if "value" in one}
    return [*found["command"], *found.get("args", ())], environ


def docker_runs() -> Iterator[str]:
    """The commands of the Dockerfile's RUN instructions."""
    text = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    return (line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN "))


def all_scripts() -> Iterator[Script]:
    """Every piece of shell inside a recipe."""
    for path in GITHUB:
        for job in read(path)["jobs"]:
            yield from github(path, job)
    for job in ("cpu", "gpu", "night"):
        yield from gitlab(job)
        yield from buildkite(job)
    yield Script("trainjob", container(TRAINJOB)[0][-1])
    for number, run in enumerate(docker_runs()):
        yield Script(f"Dockerfile, RUN {number}", run)
