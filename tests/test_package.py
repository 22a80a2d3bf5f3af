"""What is released: the wheel holds what runs, the sdist what tests it, and both hold the same package."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    environ = {**os.environ, "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if path is not None:
        environ["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, timeout=300, check=False,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked sdist, which was made from this checkout."""
    pytest.importorskip("hatchling", reason="building needs hatchling (pip install hatchling)")
    out = tmp_path_factory.mktemp("sdist")
    python("-m", "hatchling", "build", "-t", "sdist", "-d", str(out), cwd=ROOT)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(out, filter="data") if hasattr(tarfile, "data_filter") else file.extractall(out)
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from the sdist, as an index's users get it where none is there."""
    out = tmp_path_factory.mktemp("wheel")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", str(out), cwd=unpacked)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        there = {name for name in file.namelist() if name.startswith("pytest_gputrain/")}
        metadata = Parser().parsestr(
            file.read(next(n for n in file.namelist() if n.endswith("METADATA"))).decode()
        )
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pytest_gputrain").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there == ours
    assert {"pytest_gputrain/py.typed", "pytest_gputrain/report/schema/report-1.json"} <= there
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata["License-Expression"] == "MIT"


def test_the_wheel_runs_where_nothing_else_of_the_repository_is(wheel: Path, tmp_path: Path) -> None:
    installed, here = tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    python(*pip, "--target", str(installed), str(wheel), cwd=here)
    (here / "test_it.py").write_text(
        "import pytest_gputrain\n"
        "def test_it(ddp_launcher):\n"
        "    import os\n"
        "    assert ddp_launcher(lambda: int(os.environ['RANK'])).values == [0, 1]\n"
        f"    assert pytest_gputrain.__file__.startswith({str(installed)!r})\n"
    )
    assert "usage: gputrain" in python("-m", "pytest_gputrain", "--help", cwd=here, path=installed)
    check = ["check", "pytest_gputrain.reference.gpt:case", "--checks", "ddp_parity", "--report", "out"]
    checked = python("-m", "pytest_gputrain", *check, cwd=here, path=installed)
    assert "1 passed, 0 failed, 0 skipped" in checked
    assert (here / "out" / "index.html").is_file()  # its templates came along
    ran = python("-m", "pytest", "-c", "/dev/null", "-p", "pytest_gputrain", "-q", cwd=here, path=installed)
    assert "1 passed" in ran


@pytest.mark.nightly
def test_the_sdist_tests_itself(unpacked: Path) -> None:
    """All tests can be collected there, and pages and scripts that tests read have come along."""
    assert (unpacked / "ci" / "setup").is_file() and (unpacked / "LICENSE").is_file()
    arguments = ("-m", "pytest", "-p", "no:cacheprovider", "-q")
    assert "tests/test_rooms.py" in python(*arguments, "--collect-only", cwd=unpacked, path=unpacked)
    pure = ("tests/test_variables.py", "tests/docs/test_reference.py", "tests/report/test_model.py")
    assert "passed" in python(*arguments, *pure, cwd=unpacked, path=unpacked)
