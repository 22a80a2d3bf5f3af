"""What dynamo's own objects say: a code object, a graph, a backend, an exception, a guard's text."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import sysconfig
from types import CodeType
from typing import Any

import torch

from pytest_gputrain.compile.backend import standing_name
from pytest_gputrain.launch.stacks import Frame, user_frame

_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_(\d+)$")
_TORCH = os.path.dirname(torch.__file__) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_HERE = os.path.dirname(__file__) + os.sep
_GUARDED_LINE = re.compile(r"# (?P<file>[^#\n]*?\.py):(?P<line>\d+) in (?P<function>[\w<>.]+)")
_STACK_LINE = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)$', re.MULTILINE)
_BREAK_AT = re.compile(r"in user code at (?P<file>.+):(?P<line>\d+)")
_ABOUT = re.compile(r"^(?:Graph Break )?Reason: (?P<reason>.*)", re.MULTILINE)
_EXPLAINED = re.compile(r"^(?P<what>.*)\n\s*Explanation: (?P<why>.*)", re.MULTILINE)
_COMPILATION = re.compile(r"^\d+/\d+(?:_\d+)?: ")


def function_of(code: CodeType, variables: Any = None, closure: Any = ()) -> str:
    """The function's name; what is left of one after a graph break is ``name, resumed at line``.

    Around torch's own modules (``nn.Sequential``) ``torch.compile`` puts a function: the module's name then.
    A decorator's inner function says nothing alone: with the module that it is called for.
    """
    if resumed := _RESUMED.match(code.co_name):
        return f"{resumed[1]}, resumed at line {resumed[2]}"
    if is_around(code):
        for cell in closure or ():
            with contextlib.suppress(ValueError):  # an empty cell
                if callable(inside := cell.cell_contents):
                    return _name_of(inside)
    name = str(getattr(code, "co_qualname", code.co_name))
    first = (variables or {}).get(code.co_varnames[0]) if code.co_varnames else None
    is_decorators = name.rpartition("<locals>.")[2] == code.co_name
    if is_decorators and name != code.co_name and isinstance(first, torch.nn.Module):
        return f"{type(first).__name__}, {name}"
    return name


def _name_of(inside: Any) -> str:
    if isinstance(inside, torch.nn.Module):
        return f"{type(inside).__name__}.forward"
    return str(getattr(inside, "__qualname__", type(inside).__name__))


def is_around(code: CodeType) -> bool:
    """Whether this is the function that torch.compile puts around a module whose forward is torch's own."""
    return code.co_name == "inner" and code.co_filename.startswith(_TORCH)


def is_machinery(file: str) -> bool:
    """Whether this is torch or the standard library, or generated code: lines that tell the user nothing."""
    if file.startswith((_TORCH, "<")):
        return True
    return file.startswith(_STDLIB) and "site-packages" not in file


def location_of(code: CodeType) -> str:
    """The first line of the code."""
    resumed = _RESUMED.match(code.co_name)
    name, line = (resumed[1], int(resumed[2])) if resumed else (code.co_name, code.co_firstlineno)
    return str(Frame(code.co_filename, line, name))


def calling_line() -> str | None:
    """The user's line in which this thread is now."""
    frames = []
    here: Any = sys._getframe(1)
    while here is not None:
        code = here.f_code
        if not code.co_filename.startswith(_HERE):
            frames.append(Frame(code.co_filename, here.f_lineno, _unresumed(code.co_name)))
        here = here.f_back
    found = user_frame(frames)
    return None if found is None else str(found)


def guarded_line(reason: str) -> str | None:
    """The innermost of the user's lines that a guard's text is about, where dynamo has put it there.

    The line in the comment is for an older torch, which adds no stack; its file is cut short at the front.
    """
    if "User stack trace:" in reason:
        return _innermost(reason)
    found = _GUARDED_LINE.search(reason)
    return str(_frame(found)) if found else None


def guard(text: str) -> str:
    """The guard in dynamo's words, without the compilation's number and where it comes from."""
    condition = _COMPILATION.sub("", text.strip())
    for advice in ("User stack trace:", "If this is unexpected", "(HINT:"):
        condition = condition.partition(advice)[0]
    return " ".join(_GUARDED_LINE.sub("", condition).split())


def broken_at(text: str) -> str:
    """The innermost of the user's lines in what dynamo writes about a graph break."""
    if innermost := _innermost(_told(text)):
        return innermost
    found = _BREAK_AT.search(text)
    return str(Frame(found["file"], int(found["line"]), "?")).removesuffix(" in ?") if found else "?"


def broken_in_torch(text: str) -> bool:
    """Whether the line of the break itself is torch's own, as of DistributedDataParallel's forward."""
    files = [found["file"] for found in _STACK_LINE.finditer(_told(text))]
    return bool(files) and is_machinery(files[-1])


def _told(text: str) -> str:
    """The stack of the code that is compiled, without dynamo's own below it."""
    return text.partition("Traceback (most recent call last)")[0]


def break_reason(text: str) -> str:
    """What cannot be traced, and dynamo's explanation."""
    if explained := _EXPLAINED.search(text):
        return f"{explained['what'].strip()}: {explained['why'].strip()}"
    found = _ABOUT.search(text)
    return found["reason"].strip() if found else text.strip().partition("\n")[0]


def _innermost(text: str) -> str | None:
    frames = [_frame(found) for found in _STACK_LINE.finditer(text)]
    outside = [frame for frame in frames if not is_machinery(frame.file)]
    return str(outside[-1]) if outside else None


def _frame(found: re.Match[str]) -> Frame:
    return Frame(found["file"], int(found["line"]), _unresumed(found["function"]))


def _unresumed(function: str) -> str:
    resumed = _RESUMED.match(function)
    return resumed[1] if resumed else function


def stack_of(error: BaseException) -> str | None:
    """The innermost of the user's lines that dynamo was at when it raised this."""
    stack = getattr(error, "real_stack", None) or []
    outside = [f for f in stack if f.filename and not is_machinery(f.filename)]
    if not outside:
        return None
    return str(Frame(outside[-1].filename, outside[-1].lineno or 0, outside[-1].name))


def said(error: BaseException) -> str:
    """The exception on one line: its kind and what it says first, without dynamo's advice."""
    text = str(error)
    if not _EXPLAINED.search(text):
        text = " ".join(text.partition("\n\n")[0].split())
    return f"{type(error).__name__}: {break_reason(text)}"


def backend_name(backend: Any) -> str:
    """What the user calls the backend behind dynamo's wrappers around it."""
    for _ in range(8):
        inner = getattr(backend, "_torchdynamo_orig_backend", None)
        if inner is None and hasattr(backend, "__self__"):
            inner = getattr(backend.__self__, "backend_compile_fn", None)  # DDPOptimizer.compile_fn
        if inner is None:
            break
        backend = inner
    for attribute in ("compiler_name", "__name__"):
        if isinstance(name := getattr(backend, attribute, None), str):
            return standing_name() or name if name == "inductor" else name
    return str(getattr(getattr(backend, "func", None), "__name__", type(backend).__name__))


def operations(graph: Any) -> int:
    """How many operations a captured graph has."""
    return sum(node.op in ("call_function", "call_method", "call_module") for node in graph.nodes)


def facts_of(graph: Any, backend: Any) -> dict[str, Any]:
    """The figures of a captured graph that ``records.Graph`` has."""
    return {
        "ops": operations(graph),
        "backend": backend_name(backend),
        "dynamic_dims": dynamic_inputs(graph),
        "parameters": num_parameters(graph),
    }


def num_parameters(graph: Any) -> int:
    """How many parameters the graph takes as inputs, or has within, as in torches that inline no modules."""
    owner = getattr(graph, "owning_module", None)
    values = [node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder"]
    inputs = sum(isinstance(value, torch.nn.Parameter) for value in values)
    return inputs + (sum(1 for _ in owner.parameters()) if isinstance(owner, torch.nn.Module) else 0)


def dynamic_inputs(graph: Any) -> tuple[str, ...]:
    """The sizes and numbers that the graph takes as inputs, in dynamo's names; others are constants in it."""
    names = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("example_value")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) or _is_float(node, value):
            names.append(_source(node) or str(node.name))
    return tuple(names)


def _is_float(node: Any, value: Any) -> bool:
    """Whether this input is a Python float, which dynamo passes as a tensor without dimensions."""
    as_tensor = getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
    return bool(as_tensor) and isinstance(value, torch.Tensor) and value.dim() == 0


def _source(node: Any) -> str | None:
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    try:
        return str(name() if callable(name) else name) if name is not None else None
    except NotImplementedError:  # of a source that dynamo itself has made up
        return None


def buckets(compiled: Any) -> int:
    """Into how many graphs DDPOptimizer has split what a backend returned."""
    if not isinstance(compiled, torch.fx.GraphModule):
        return 1
    parts = [
        n for n in compiled.graph.nodes if n.op == "call_module" and str(n.target).startswith("compiled_")
    ]
    return max(1, len(parts))
