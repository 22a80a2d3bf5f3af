"""In a rank: assertions explained as pytest explains them (differences, truncation, the user's own hooks).

pytest's assertion plugin is driven as pytest drives it, through its hooks, with a configuration made only
when a comparison fails: that costs 30 ms.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

_INI = ("truncation_limit_lines", "truncation_limit_chars", "assertion_text_diff_style")


class Explaining(NamedTuple):
    """What a rank has to know of the session to explain assertions as it does."""

    plugin: ModuleType | None
    options: dict[str, Any]
    ini: tuple[str, ...]
    hooks: tuple[Callable[..., Any], ...]


def explaining_of(item: pytest.Item) -> Explaining:
    """Collect it, in the pytest process."""
    config = item.config
    plugin = config.pluginmanager.get_plugin("assertion")
    if plugin is None:  # -p no:assertion
        return Explaining(None, {}, (), ())
    ini = [f"verbosity_assertions={config.get_verbosity('assertions')}"]
    for name in _INI:
        with contextlib.suppress(ValueError, KeyError):  # not known to this pytest
            if (value := config.getini(name)) is not None:
                ini.append(f"{name}={value}")
    implementations = item.ihook.pytest_assertrepr_compare.get_hookimpls()
    hooks = [one.function for one in implementations if one.plugin is not plugin]
    options = {name: config.getoption(name) for name in ("verbose", "assertmode")}
    return Explaining(plugin, options, tuple(ini), tuple(filter(inspect.isfunction, hooks)))


@contextlib.contextmanager
def explained(known: Explaining) -> Iterator[None]:
    """For the time of a test's body, failing comparisons of rewritten assertions are explained."""
    protocol = getattr(known.plugin, "pytest_runtest_protocol", None)
    if protocol is None:
        yield
        return
    running = protocol(SimpleNamespace(config=_LaterConfig(known), ihook=_Hooks(_LaterConfig(known))))
    next(running)
    try:
        yield
    finally:
        running.close()


class _LaterConfig:
    """A configuration that is made when it is first asked for anything."""

    def __init__(self, known: Explaining) -> None:
        self._known = known
        self._made: pytest.Config | None = None

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            self._made = _config(self._known)
        return getattr(self._made, name)


class _Hooks:
    """The hooks that the assertion plugin asks for; nobody is told of assertions that hold."""

    pytest_assertion_pass = SimpleNamespace(get_hookimpls=list)

    def __init__(self, config: _LaterConfig) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config.hook, name)


def _config(known: Explaining) -> pytest.Config:
    arguments = ["-c", os.devnull, "--noconftest", "-p", "no:cacheprovider"]
    arguments += [part for setting in known.ini for part in ("-o", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        patch.delenv("PYTEST_ADDOPTS", raising=False)
        patch.delenv("PYTEST_PLUGINS", raising=False)
        config = pytest.Config.fromdictargs({**known.options, "plugins": []}, arguments)
    for hook in known.hooks:
        config.pluginmanager.register(SimpleNamespace(pytest_assertrepr_compare=hook))
    return config
