"""Are two measurements of the same thing? What differs is named; figures are compared only where none does.

Verdicts are compared in any case: a check that passed and fails now is worse on any machine. Pure.
"""

from __future__ import annotations

from pytest_gputrain.report.reading import Json

# A check's own settings among its figures, by every name that checks use: what ran under other ones measured
# something else.
SETTINGS = (
    "world_size",
    "world size",
    "ranks",
    "simulated ranks",
    "iterations",
    "depth",
    "device_batch_size",
    "batch_size",
    "accumulation",
    "dtype",
    "compile_backend",
)
# How many fitted into a minute may differ from night to night; only the loss depends on it.
STEPS = ("steps", "steps run")


def apart(old: Json | None, new: Json | None) -> list[str]:
    """What makes figures of two machines different figures: ``torch 2.12.0 against 2.13.0``.

    Not the host's name, Python or this package: a cluster gives another node of the same kind each night.
    """
    if not old or not new:
        return []
    found = []
    if (one := _gpus(old)) != (other := _gpus(new)):
        found.append(f"GPUs {one} against {other}")
    elif _pretended(old) != _pretended(new):
        found.append("pretended GPUs against real ones")
    for name, words in (("cpu", "CPU"), ("cores", "CPU cores"), ("torch", "torch")):
        if old.get(name) != new.get(name):
            found.append(f"{words} {old.get(name)} against {new.get(name)}")
    return found


def settings_apart(old: Json, new: Json) -> list[str]:
    """What differs between two runs of a test: labels (simulated, shared GPU), device, ranks, iterations."""
    found = []
    if _labels(old) != _labels(new):
        found.append(f"{_labels(old)} against {_labels(new)}")
    if old.get("device") != new.get("device"):
        found.append(f"device {old.get('device')} against {new.get('device')}")
    before, now = old.get("figures") or {}, new.get("figures") or {}
    for name in SETTINGS:
        one, other = before.get(name), now.get(name)
        # One side only: asked for in one run, left to the check in the other.
        if one != other:
            words = name.replace("_", " ")
            found.append(f"{words} {_said(one)} against {_said(other)}")
    return found


def steps_apart(old: Json, new: Json) -> str:
    """Where a run took another number of steps: its loss at the end is of another moment."""
    before, now = old.get("figures") or {}, new.get("figures") or {}
    for name in STEPS:
        one, other = before.get(name), now.get(name)
        if isinstance(one, int) and isinstance(other, int) and one != other:
            return f"{one} steps against {other}"
    return ""


def key(test: Json) -> tuple[str, ...]:
    """What makes two entries the same test; of a check, from pytest or the command line, case and check."""
    if test.get("kind") == "check" and test.get("case") and test.get("check"):
        return (str(test["case"]), str(test["check"]), str(test.get("device") or ""))
    return (str(test["id"]), str(test.get("device") or ""))


def machine_of(report: Json, test: Json) -> Json | None:
    """The machine that the test ran on."""
    machines, place = report.get("machines") or (), test.get("machine") or 0
    found: Json | None = machines[place] if isinstance(place, int) and place < len(machines) else None
    return found


def _said(value: object) -> str:
    return "not given" if value is None else str(value)


def _gpus(machine: Json) -> str:
    names = [str(gpu.get("name")) for gpu in machine.get("gpus") or ()]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"


def _pretended(machine: Json) -> bool:
    origin = str(machine.get("gpu_origin") or "").lower()
    return "pretended" in origin or "fake" in origin


def _labels(test: Json) -> str:
    return ", ".join(sorted(map(str, test.get("labels") or ()))) or "no label"
