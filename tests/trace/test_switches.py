"""What is asked to be traced: environment and argument, and one line for nonsense, before any rank starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pytest_gputrain
from pytest_gputrain.cli import main
from pytest_gputrain.launch import LaunchUsageError, client
from pytest_gputrain.trace.switches import DEFAULT_TRACERS, Switches, resolve, tracers_of

launch: Any = pytest_gputrain.launch
NAMES = "'grads', 'module_bwd', 'ddp_buckets', 'heartbeat', 'watchdog', 'rates'"
HOW = "must be True, False, names, or a mapping of names to True or False; the names are " + NAMES
LEGAL = "must be one of 1, true, yes, on, 0, false, no, off"
RANGE = (
    "must be start:end with start below end, counted from 0 and without end itself; "
    "either may be left out, such as 0:4, 2: or :"
)

NONSENSE = [
    ({"GPUTRAIN_TRACE_GRADS": "maybe"}, f"GPUTRAIN_TRACE_GRADS='maybe': {LEGAL}"),
    ({"GPUTRAIN_TRACE_MODULE_BWD": "2"}, f"GPUTRAIN_TRACE_MODULE_BWD='2': {LEGAL}"),
    ({"GPUTRAIN_TRACE_DDP_BUCKETS": "all"}, f"GPUTRAIN_TRACE_DDP_BUCKETS='all': {LEGAL}"),
    ({"GPUTRAIN_HEARTBEAT": "5s"}, f"GPUTRAIN_HEARTBEAT='5s': {LEGAL}"),
    ({"GPUTRAIN_WATCHDOG": "dog"}, f"GPUTRAIN_WATCHDOG='dog': {LEGAL}"),
    ({"GPUTRAIN_DDP_STATIC_GRAPH": "-1"}, f"GPUTRAIN_DDP_STATIC_GRAPH='-1': {LEGAL}"),
    ({"GPUTRAIN_DDP_FIND_UNUSED": "x"}, f"GPUTRAIN_DDP_FIND_UNUSED='x': {LEGAL}"),
    ({"GPUTRAIN_GC_RANGE": "5:2"}, f"GPUTRAIN_GC_RANGE='5:2': {RANGE}"),
    ({"GPUTRAIN_GC_RANGE": "3:3"}, f"GPUTRAIN_GC_RANGE='3:3': {RANGE}"),
    ({"GPUTRAIN_GC_RANGE": "-1:4"}, f"GPUTRAIN_GC_RANGE='-1:4': {RANGE}"),
    ({"GPUTRAIN_GC_RANGE": "4"}, f"GPUTRAIN_GC_RANGE='4': {RANGE}"),
    (
        {"GPUTRAIN_WATCHDOG_SECONDS": "soon"},
        "GPUTRAIN_WATCHDOG_SECONDS: 'soon' is not a number of seconds above 0",
    ),
]
NONSENSE += [
    (
        {"GPUTRAIN_TRACE_GRAD": "1"},
        "GPUTRAIN_TRACE_GRAD='1': there is no such variable; did you mean GPUTRAIN_TRACE_GRADS?",
    ),
    (
        {"GPUTRAIN_LUNCHTIME_X": "12"},
        "GPUTRAIN_LUNCHTIME_X='12': there is no such variable; unset it: names with this prefix are "
        "pytest-gputrain's",
    ),
]
MISTAKEN = [
    ("loss", f"trace='loss': {HOW}"),
    (3, f"trace=3: {HOW}"),
    (["grads", "gradz"], f"trace=['grads', 'gradz']: {HOW}"),
    ({"grads": 1}, f"trace={{'grads': 1}}: {HOW}"),
]


@pytest.mark.parametrize(("env", "message"), NONSENSE, ids=[message[:34] for _, message in NONSENSE])
def test_a_nonsense_switch_is_refused_before_any_rank(
    env: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "borrow", lambda environ: pytest.fail("a server was asked for"))
    with pytest.raises(LaunchUsageError) as raised:
        launch(print, env=env)
    assert str(raised.value) == message
    with pytest.raises(LaunchUsageError) as raised:
        launch.torchrun(__file__, env=env)
    assert str(raised.value) == message


@pytest.mark.parametrize(("trace", "message"), MISTAKEN, ids=["word", "number", "list", "mapping"])
def test_a_nonsense_argument_is_refused_before_any_rank(
    trace: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "borrow", lambda environ: pytest.fail("a server was asked for"))
    for start in (launch, launch.torchrun):
        with pytest.raises(LaunchUsageError) as raised:
            start(__file__ if start is not launch else print, trace=trace)
        assert str(raised.value) == message


def test_a_nonsense_switch_ends_the_command_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPUTRAIN_TRACE_GRADS", "maybe")
    monkeypatch.setattr(client, "borrow", lambda environ: pytest.fail("a server was asked for"))
    assert main(["check", "pytest_gputrain.reference.gpt:case", "--checks", "ddp_completes"]) == 2
    assert f"gputrain check: GPUTRAIN_TRACE_GRADS='maybe': {LEGAL}\n" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["1", "TRUE", "yes", "on", "0", "no", "Off", "false", ""])
def test_the_words_of_a_switch(word: str) -> None:
    on = word in ("1", "TRUE", "yes", "on")
    found = resolve(False, {"GPUTRAIN_TRACE_GRADS": word}, default=True)
    assert found == (Switches(tracers=("grads",), printed=("grads",)) if on else Switches())


def test_true_is_the_default_set_and_nothing_of_it_is_printed() -> None:
    assert resolve(True, {}, default=False) == Switches(tracers=DEFAULT_TRACERS)
    assert resolve(None, {}, default=True) == Switches(tracers=DEFAULT_TRACERS)
    assert not resolve(None, {}, default=False)


def test_names_select_and_a_mapping_changes_the_default_set() -> None:
    assert tracers_of("grads") == {"grads"}
    assert tracers_of(("grads", "watchdog")) == {"grads", "watchdog"}
    assert tracers_of({"module_bwd": True, "watchdog": False}) == {
        "grads", "module_bwd", "ddp_buckets", "heartbeat",
    }  # fmt: skip


def test_an_off_switch_takes_away_what_nobody_asked_for() -> None:
    off = {"GPUTRAIN_WATCHDOG": "off"}
    assert "watchdog" not in resolve(None, off, default=True).tracers
    assert "watchdog" in resolve(["watchdog"], off, default=True).tracers


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0:4", (0, 4)), (":2", (None, 2)), ("3:", (3, None)), (":", (None, None)), ("", None)],
)
def test_layer_ranges(text: str, layers: tuple[int | None, int | None] | None) -> None:
    assert resolve(False, {"GPUTRAIN_GC_RANGE": text}, default=True).layers == layers


def test_switches_cross_to_a_rank_as_plain_json() -> None:
    environ = {"GPUTRAIN_GC_RANGE": "1:", "GPUTRAIN_TRACE_GRADS": "1", "GPUTRAIN_FORCE_BRANCH": "sliding"}
    switches = resolve({"module_bwd": True}, environ, default=False)
    assert Switches.from_record(json.loads(json.dumps(switches.as_record()))) == switches
    assert switches.branch == "sliding"


def test_a_rank_without_switches_is_left_alone(tmp_path: Path) -> None:
    assert not Switches(watchdog_seconds=3.0)
    assert Switches(static_graph=True)
