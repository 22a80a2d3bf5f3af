"""The plugin loads in every way people load plugins, once, lightly, and on machines that cannot launch ranks.

Real child processes: what is loaded in this one is already loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

HOW_OFTEN = """
def test_how_often(request):
    registered = request.config.pluginmanager.list_name_plugin()
    names = [name for name, plugin in registered if getattr(plugin, "__name__", "") == "pytest_gputrain"]
    assert names == ["pytest_gputrain"], names
"""

# Stands in the way of `importlib.metadata`, so that an installed pytest-gputrain looks not installed.
HIDE_DISTRIBUTION = """
import importlib.metadata
found = importlib.metadata.distributions
def others(**context):
    return (d for d in found(**context) if (d.metadata["Name"] or "").lower() != "pytest-gputrain")
importlib.metadata.distributions = others
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds pytest-gputrain as pip installs it from its wheel."""
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling (pip install hatchling)")
    target = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(ROOT)],
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    return target


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that makes an installed pytest-gputrain look not installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDE_DISTRIBUTION)
    return tmp_path


def pytest_in(
    pytester: pytest.Pytester, autoload: bool, paths: list[Path], *arguments: str
) -> pytest.RunResult:
    environ = {key: value for key, value in os.environ.items() if key != "PYTEST_DISABLE_PLUGIN_AUTOLOAD"}
    environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    if not autoload:
        environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--strict-markers", *arguments],
        cwd=pytester.path,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    print(done.stdout, done.stderr)
    return pytest.RunResult(done.returncode, done.stdout.splitlines(), done.stderr.splitlines(), 0)


def assert_loaded_once(result: pytest.RunResult) -> None:
    assert result.ret == 0
    assert sum(line.startswith("gputrain: GPUs found") for line in result.outlines) == 1


@pytest.mark.parametrize("autoload", [True, False], ids=["autoload", "no-autoload"])
def test_bare_checkout_loads_by_name(pytester: pytest.Pytester, bare: Path, autoload: bool) -> None:
    pytester.makepyfile(test_often=HOW_OFTEN)
    assert_loaded_once(pytest_in(pytester, autoload, [bare, ROOT], "-p", "pytest_gputrain"))


def test_bare_checkout_is_not_loaded_unasked(pytester: pytest.Pytester, bare: Path) -> None:
    pytester.makepyfile("def test_nothing(): pass")
    result = pytest_in(pytester, True, [bare, ROOT])
    assert result.ret == 0
    assert "gputrain" not in "\n".join(result.outlines)


def test_installed_loads_by_itself(pytester: pytest.Pytester, installed: Path) -> None:
    pytester.makepyfile(test_often=HOW_OFTEN)
    assert_loaded_once(pytest_in(pytester, True, [installed]))


@pytest.mark.parametrize("autoload", [True, False], ids=["autoload", "no-autoload"])
def test_installed_and_named_is_loaded_once(
    pytester: pytest.Pytester, installed: Path, autoload: bool
) -> None:
    pytester.makepyfile(test_often=HOW_OFTEN)
    pytester.makeconftest("pytest_plugins = ['pytest_gputrain']")
    named_twice = ["-p", "pytest_gputrain", "-p", "pytest_gputrain"]
    assert_loaded_once(pytest_in(pytester, autoload, [installed], *named_twice))


def test_installed_and_named_is_loaded_once_in_xdist_workers(
    pytester: pytest.Pytester, installed: Path
) -> None:
    pytester.makepyfile(test_often=HOW_OFTEN)
    assert_loaded_once(pytest_in(pytester, True, [installed], "-p", "pytest_gputrain", "-n", "2"))


def test_wheel_holds_all_rooms(installed: Path) -> None:
    there = {path.relative_to(ROOT) for path in (ROOT / "pytest_gputrain").rglob("*.py")}
    shipped = {path.relative_to(installed) for path in (installed / "pytest_gputrain").rglob("*.py")}
    assert shipped == there
    assert (installed / "pytest_gputrain" / "py.typed").is_file()


def in_child(program: str) -> object:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        # One that pretends another platform leaves no bytecode to others and gets none of their signals.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # shown when the test fails
    return json.loads(done.stdout.splitlines()[-1])


SEE_HEAVY = "print(json.dumps(sorted({'torch', 'numpy', 'pynvml', 'transformers'} & set(sys.modules))))"


@pytest.mark.parametrize(
    "what", ["pytest_gputrain", "pytest_gputrain.launch", "pytest_gputrain.case", "pytest_gputrain.checks"]
)
def test_import_is_light(what: str) -> None:
    assert in_child(f"import json, sys, {what}; {SEE_HEAVY}") == []


def test_public_names_are_light_to_look_at() -> None:
    names = "launch, LaunchError, Verdict, TrainingCase, run_checks, requires_gpus"
    assert in_child(f"import json, sys; from pytest_gputrain import {names}; {SEE_HEAVY}") == []


def test_a_whole_session_is_light(pytester: pytest.Pytester) -> None:
    arguments = ["-p", "pytest_gputrain", str(pytester.makepyfile("def test_nothing(gpu_count): pass"))]
    heavy = in_child(f"import json, sys, pytest; pytest.main({arguments!r}); print(); {SEE_HEAVY}")
    assert heavy in ([], ["pynvml"])  # the header asks the driver, where there is one


ELSEWHERE = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pynvml", "fcntl", "resource", "termios", "pwd", "grp"):
            raise ModuleNotFoundError(name)
import psutil, pytest  # these load what this platform has
for name in ("pynvml", "fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())
sys.platform = {platform!r}
code = pytest.main(["-p", "pytest_gputrain", "-p", "no:cacheprovider", "-s", "-rs", {path!r}])
print()
print(json.dumps(int(code)))
"""


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_loads_and_skips_where_there_is_no_linux_and_no_nvml(
    pytester: pytest.Pytester, platform: str
) -> None:
    if platform == "win32" and sys.version_info >= (3, 12):
        pytest.skip("shutil.which of this Python asks Windows itself")
    # Its root is then this folder: on Windows pytest looks at all that lies beside the file's parents up to
    # the root (its issue 11895), in the temporary folder at what others remove in that moment.
    pytester.makeini("[pytest]")
    path = pytester.makepyfile(
        """
        import pytest

        def test_runs(gpu_count):
            assert gpu_count == 0

        @pytest.mark.requires_gpus(1)
        def test_skips(): assert False

        def test_launch_skips(ddp_launcher):
            ddp_launcher(print)
            assert False
        """
    )
    assert in_child(ELSEWHERE.format(platform=platform, path=str(path))) == 0


def test_launch_is_callable_however_it_is_imported() -> None:
    program = """
        import json
        import pytest_gputrain.launch
        from pytest_gputrain import launch
        assert launch is pytest_gputrain.launch
        assert callable(launch) and callable(launch.torchrun)
        from pytest_gputrain.launch import Launcher, Verdict
        assert Verdict.PASSED.value == "PASSED" and isinstance(Launcher, type)
        print(json.dumps("ok"))
    """
    assert in_child("\n".join(line.strip() for line in program.splitlines())) == "ok"


def test_unknown_name_is_an_attribute_error() -> None:
    import pytest_gputrain

    with pytest.raises(AttributeError, match="module 'pytest_gputrain' has no attribute 'lunch'"):
        pytest_gputrain.lunch  # noqa: B018


def test_every_public_name_can_be_had() -> None:
    import pytest_gputrain

    assert [name for name in pytest_gputrain.__all__ if not hasattr(pytest_gputrain, name)] == []
