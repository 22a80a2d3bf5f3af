"""A user's project and the machine on which a recipe's commands are run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ci.recipes import ROOT, Script

PROJECT = {
    "pyproject.toml": """
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"
        [project]
        name = "my-package"
        version = "1.0"
        [tool.hatch.build]
        dev-mode-dirs = ["."]
        [tool.pytest.ini_options]
        addopts = "-p no:randomly -p no:cacheprovider"
    """,
    "my_package/__init__.py": "",
    "my_package/cases.py": """
        import torch
        from pytest_gputrain import TrainingCase

        def model():
            return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))

        def batch(batch_size, device):
            return torch.randn(batch_size, 8, device=device)

        def loss(model, batch):
            return model(batch).square().mean()

        gpt = TrainingCase(name="gpt", model=model, batch=batch, loss=loss)
    """,
    "tests/test_training.py": """
        import os, time, pytest

        def test_on_any_machine():
            if os.environ.get("TESTS") == "wait":
                print("waiting", flush=True)
                open("waiting", "w").close()
                time.sleep(60)
            assert os.environ.get("TESTS") != "fail"

        @pytest.mark.requires_gpus(2)
        def test_on_two_gpus(gpus):
            assert len(gpus) == 2
    """,
}
TOOLS = {
    "pytest": "-m pytest",
    "gputrain": "-m pytest_gputrain",
    "torchrun": "-m torch.distributed.run",
    "python": "",
}
# What CI itself has set here says nothing about a user's machine.
NOT_THEIRS = ("GPUTRAIN_", "NIGHT", "PYTEST_", "SLURM_", "PET_", "GITHUB_", "COV_", "CI")


@dataclass(frozen=True)
class Machine:
    """A folder with the user's checkout, and an environment with this package in it."""

    project: Path
    environ: dict[str, str]

    def start(self, command: list[str], **environ: str) -> subprocess.Popen[str]:
        """The command in the project's folder."""
        return subprocess.Popen(
            command, cwd=self.project, env={**self.environ, **environ}, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def bash(self, *arguments: str, **environ: str) -> tuple[int, str]:
        """The exit code and what was said."""
        process = self.start(["bash", *arguments], **environ)
        try:
            said = process.communicate(timeout=580)[0]
        finally:
            end(process)
        return process.returncode, said

    def carry_out(self, scripts: Iterable[Script], environ: Mapping[str, str]) -> tuple[int, str]:
        """The scripts as CI runs them: after one that failed only those that run always."""
        code, said = 0, ""
        for script in scripts:
            if code and not script.always:
                continue
            added = self.project / "path.txt"
            more = added.read_text().split() if added.exists() else []
            path = ":".join([*reversed(more), self.environ["PATH"]])
            own, text = self.bash(
                "--noprofile", "--norc", "-eo", "pipefail", "-c", script.text,
                **{**script.environ, "PATH": path, "GITHUB_PATH": str(added), **environ},
            )  # fmt: skip
            said += f"-- {script.name}\n{text}"
            code = code or own
        return code, said


def end(process: subprocess.Popen[str]) -> None:
    """Ends it, with all that it started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One that has everything installed already."""
    project, tools = tmp_path / "project", tmp_path / "bin"
    for name, text in PROJECT.items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    tools.mkdir()
    for name, arguments in TOOLS.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
    # A new venv sees the packages of this machine's Python, pip among them: seconds less than making its own.
    site = sysconfig.get_path("purelib")
    inside = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/machine.pth"
    (tools / "python3").write_text(
        '#!/bin/sh\nfor folder in "$@"; do :; done\n'
        f'"{sys.executable}" "$@" --without-pip && echo "{site}" > "$folder/{inside}"\n'
    )
    (tools / "buildkite-agent").write_text('#!/bin/sh\ncat > "$BUILDKITE_ANNOTATION"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (project / "ci").mkdir()
    (project / "ci" / "night").write_bytes((ROOT / "ci" / "night").read_bytes())
    environ = {name: value for name, value in os.environ.items() if not name.startswith(NOT_THEIRS)}
    environ |= {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": f"{project}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return Machine(project, environ)
