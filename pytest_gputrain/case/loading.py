"""From "MODULE:ATTR" to objects: one clear line for everything that can be wrong with it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pytest_gputrain.case.returned import LOCATION

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase

FORM = 'give "package.module:attribute"'
_PACKAGE = Path(__file__).parent.parent
_ROOMS = tuple(str(_PACKAGE / room) for room in ("case", "checks", "trace"))
_NOT_THE_USERS = (*_ROOMS, "<frozen", "/site-packages/", "/dist-packages/")


class CaseError(ValueError):
    """A case, or its description, cannot be used; the message is one line."""


@dataclass(frozen=True)
class LazyCallable:
    """A function named as "package.module:attribute", looked up at the call.

    spec: as given; field: whose it is, for the message.
    Raises CaseError at construction when there is no colon, at the call when nothing is found.
    """

    spec: str
    field: str

    def __post_init__(self) -> None:
        split_spec(self.spec, self.field)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.resolve()(*args, **kwargs)

    def resolve(self) -> Any:
        found = find(self.spec, self.field)
        if not callable(found):
            raise CaseError(f"{self.field}: {self.spec!r} is a {type(found).__name__}; name a function")
        return found


def split_spec(spec: str, what: str) -> tuple[str, str]:
    """Module and attribute; raises CaseError when the form is wrong."""
    module, colon, attribute = spec.partition(":")
    if not colon or not module.strip() or not attribute.strip():
        raise CaseError(f"{what}: {spec!r} is not MODULE:ATTR; {FORM}")
    if "/" in module or module.endswith(".py"):
        dotted = module.removesuffix(".py").strip("/.").replace("/", ".")
        raise CaseError(f"{what}: {module!r} is a file; give its module name, {dotted}:{attribute}")
    return module.strip(), attribute.strip()


def find(spec: str, what: str) -> Any:
    """The object that ``spec`` names; raises CaseError with one line."""
    module_name, attribute = split_spec(spec, what)
    found: Any = _import(module_name, spec, what)
    walked = module_name
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CaseError(f"{what}: {walked} has no attribute {part!r}; {_alternatives(found, part)}")
        found = getattr(found, part)
        walked = f"{walked}.{part}"
    return found


def _import(module_name: str, spec: str, what: str) -> ModuleType:
    _put_cwd_on_path()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise CaseError(
                f"{what}: no module named {missing!r} for {spec!r}; give a module that can be imported "
                f"from {Path.cwd()} or is installed"
            ) from None
        raise CaseError(f"{what}: importing {module_name} failed: {describe(error)}") from error
    except Exception as error:
        raise CaseError(f"{what}: importing {module_name} failed: {describe(error)}") from error


def _put_cwd_on_path() -> None:
    # "python -m" does it, a console script does not; both must find the user's module.
    cwd = str(Path.cwd())
    if cwd not in sys.path and "" not in sys.path:
        sys.path.insert(0, cwd)


def _alternatives(holder: Any, name: str) -> str:
    close = difflib.get_close_matches(name, dir(holder), n=3)
    return f"did you mean {' or '.join(close)}?" if close else "name a TrainingCase or a function of it"


def describe(error: BaseException) -> str:
    """Type, message and the user's line of an exception, on one line."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {text}"
    where = user_line(error)
    return f"{type(error).__name__}: {text}" + (f" (at {where})" if where else "")


def user_line(error: BaseException) -> str | None:
    """``file:line`` of the innermost frame that is neither this package's nor a library's; what the exception
    itself says of it comes first.
    """
    if known := getattr(error, LOCATION, None):
        return str(known)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(mark in frame.filename for mark in _NOT_THE_USERS)]
    stdlib = str(Path(traceback.__file__).parent)
    own = [frame for frame in own if not frame.filename.startswith(stdlib)]
    # A library's line says more than nothing, this package's says less.
    foreign = [frame for frame in frames if not frame.filename.startswith(_ROOMS)]
    chosen = own[-1] if own else (foreign[-1] if foreign else None)
    return f"{chosen.filename}:{chosen.lineno}" if chosen else None


def load_case(spec: str) -> list[TrainingCase]:
    """The cases that "MODULE:ATTR" names: one, a list of them, or what a function without arguments returns.

    Raises CaseError with one line: no colon, a module that cannot be imported, an attribute that is not
    there, something that is not a TrainingCase.
    """
    found = find(spec, "case")
    if callable(found):
        try:
            found = found()
        except Exception as error:
            raise CaseError(
                f"case: {spec}() raised {describe(error)}; it must work without arguments"
            ) from error
    return _as_cases(found, spec)


def _as_cases(found: Any, spec: str) -> list[TrainingCase]:
    from pytest_gputrain.case import TrainingCase

    cases = list(found) if isinstance(found, list | tuple) else [found]
    wrong = next((case for case in cases if not isinstance(case, TrainingCase)), None)
    if wrong is not None or not cases:
        given = "an empty list" if not cases else f"of type {type(wrong).__name__}"
        raise CaseError(
            f"case: {spec} is {given}; name a TrainingCase, a list of them, or a function that returns them"
        )
    return cases
