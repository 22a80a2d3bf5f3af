"""Which room may know which: so that ranks start quickly and the lower rooms work without pytest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pytest_gputrain"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "numpy", "pynvml", "transformers"}
# Only ever imported inside a rank, or by a check at run time; the rest must import without torch.
TORCH_AT_THE_TOP = (
    "reference/",
    "checks/",
    "trace/",
    "launch/",
    "memory/",
    "batch/probe",
    "compile/dynamo_",
    "tensor_parallel/golden",
    "tensor_parallel/conv1d",
    "tensor_parallel/data_parallel",
    "tensor_parallel/dropout",
    "tensor_parallel/finish",
    "tensor_parallel/local",
    "tensor_parallel/sequence",
    "tensor_parallel/styles",
)


def imports(path: Path, *, at_the_top: bool) -> Iterator[str]:
    """The modules that a file imports; with ``at_the_top``, those that importing it imports."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if at_the_top and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        todo += ast.iter_child_nodes(node)


def ids(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_only_the_plugin_knows_pytest(path: Path) -> None:
    name = ids(path)
    allowed = name.startswith(("plugin/", "checks/test_")) or name == "__init__.py"
    if not allowed:
        roots = {module.split(".")[0] for module in imports(path, at_the_top=True)}
        assert "pytest" not in roots
        assert not any(
            module.startswith("pytest_gputrain.plugin") for module in imports(path, at_the_top=False)
        )


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_nothing_heavy_at_the_top(path: Path) -> None:
    if not ids(path).startswith(TORCH_AT_THE_TOP):
        assert not {module.split(".")[0] for module in imports(path, at_the_top=True)} & HEAVY


@pytest.mark.parametrize("path", [path for path in MODULES if ids(path).startswith("devices/")], ids=ids)
def test_devices_know_no_other_room(path: Path) -> None:
    own = {module for module in imports(path, at_the_top=False) if module.startswith("pytest_gputrain")}
    assert all(module.startswith(("pytest_gputrain.devices", "pytest_gputrain.values")) for module in own)
