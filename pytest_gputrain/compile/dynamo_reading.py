"""What dynamo's own objects say: a code object, a graph, a backend, an exception, a guard's text."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from types import CodeType
from typing import Any

import torch

from pytest_gputrain.compile.backend import standing_name
from pytest_gputrain.launch.stacks import Frame, user_frame

_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_(\d+)$")
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
_GUARDED_LINE = re.compile(r"# (?P<file>[^#\n]*?\.py):(?P<line>\d+) in (?P<function>[\w<>.]+)")
_STACK_LINE = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)$', re.MULTILINE)
_BREAK_AT = re.compile(r"in user code at (?P<file>.+):(?P<line>\d+)")
_ABOUT = re.compile(r"^(?:Graph Break )?Reason: (?P<reason>.*)", re.MULTILINE)
_EXPLAINED = re.compile(r"^(?P<what>.*)\n\s*Explanation: (?P<why>.*)", re.MULTILINE)
_COMPILATION = re.compile(r"^\d+/\d+(?:_\d+)?: ")


def function_of(code: CodeType, closure: Any = ()) -> str:
    """The function's name; what is left of one after a graph break is ``name, resumed at line``.

    Around torch's own modules (``nn.Sequential``) ``torch.compile`` puts a function: the module's name then.
    """
    if code.co_filename.startswith(_TORCH) and code.co_name == "inner":
        for cell in closure or ():
            with contextlib.suppress(ValueError):  # an empty cell
                if callable(inside := cell.cell_contents):
                    return _name_of(inside)
    if resumed := _RESUMED.match(code.co_name):
        return f"{resumed[1]}, resumed at line {resumed[2]}"
    return str(getattr(code, "co_qualname", code.co_name))


def _name_of(inside: Any) -> str:
    if isinstance(inside, torch.nn.Module):
        return f"{type(inside).__name__}.forward"
    return str(getattr(inside, "__qualname__", type(inside).__name__))


def is_torchs(code: CodeType) -> bool:
    """Whether the code is torch's own, whose lines tell the user nothing."""
    return code.co_filename.startswith(_TORCH)


def location_of(code: CodeType) -> str:
    """The first line of the code."""
    resumed = _RESUMED.match(code.co_name)
    name, line = (resumed[1], int(resumed[2])) if resumed else (code.co_name, code.co_firstlineno)
    return str(Frame(code.co_filename, line, name))


def calling_line() -> str | None:
    """The user's line in which this thread is now."""
    frames, frame = [], sys._getframe(1)
    here: Any = frame
    while here is not None:
        if not here.f_code.co_filename.startswith(_HERE):
            frames.append(Frame(here.f_code.co_filename, here.f_lineno, here.f_code.co_name))
        here = here.f_back
    found = user_frame(frames)
    return None if found is None else str(found)


def guarded_line(reason: str) -> str | None:
    """The innermost line outside of torch that a guard's text is about, where dynamo has put it there."""
    return _innermost(reason) or ((found := _GUARDED_LINE.search(reason)) and str(_frame(found))) or None


def guard(text: str) -> str:
    """The guard in dynamo's words, without the compilation's number and where it comes from."""
    condition = text.partition("User stack trace:")[0].partition("If this is unexpected")[0]
    condition = _COMPILATION.sub("", condition.strip())
    return " ".join(_GUARDED_LINE.sub("", condition).split())


def broken_at(text: str) -> str:
    """The innermost line outside of torch in what dynamo writes about a graph break."""
    if innermost := _innermost(text.partition("Traceback (most recent call last)")[0]):
        return innermost
    found = _BREAK_AT.search(text)
    return str(Frame(found["file"], int(found["line"]), "?")).removesuffix(" in ?") if found else "?"


def break_reason(text: str) -> str:
    """What cannot be traced, and dynamo's explanation."""
    if explained := _EXPLAINED.search(text):
        return f"{explained['what'].strip()}: {explained['why'].strip()}"
    found = _ABOUT.search(text)
    return found["reason"].strip() if found else text.strip().partition("\n")[0]


def _innermost(text: str) -> str | None:
    frames = [_frame(found) for found in _STACK_LINE.finditer(text)]
    outside = [frame for frame in frames if not frame.file.startswith(_TORCH)]
    return str(outside[-1]) if outside else None


def _frame(found: re.Match[str]) -> Frame:
    resumed = _RESUMED.match(found["function"])
    return Frame(found["file"], int(found["line"]), resumed[1] if resumed else found["function"])


def stack_of(error: BaseException) -> str | None:
    """The innermost line outside of torch that dynamo was at when it raised this."""
    stack = getattr(error, "real_stack", None) or []
    outside = [f for f in stack if f.filename and not f.filename.startswith(_TORCH)]
    if not outside:
        return None
    return str(Frame(outside[-1].filename, outside[-1].lineno or 0, outside[-1].name))


def said(error: BaseException) -> str:
    """The exception on one line: its kind and its first lines, without dynamo's advice."""
    text = str(error).partition("\n\n")[0]
    return f"{type(error).__name__}: " + " ".join(text.split())


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


def dynamic_inputs(graph: Any) -> tuple[str, ...]:
    """The sizes and numbers that the graph takes as inputs, in dynamo's names; others are constants in it."""
    names = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("example_value")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            names.append(_source(node) or str(node.name))
    return tuple(names)


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
