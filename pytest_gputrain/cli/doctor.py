"""``gputrain doctor``: what this machine has, who holds it, and whether two ranks really work here."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pytest_gputrain.cli.arguments import EXIT_FAILED, EXIT_OK, UsageError, file
from pytest_gputrain.devices import Gpu, Inventory, describe_found, discover, visible_gpus
from pytest_gputrain.devices.inventory import FAKE_VARIABLE
from pytest_gputrain.devices.topology import links
from pytest_gputrain.devices.visible import named_twice
from pytest_gputrain.schemas import head
from pytest_gputrain.values import format_size

# DataLoader workers and NCCL pass tensors through it; a container's default of 64 MiB is too little for both.
LEAST_SHM = 1 << 30
# A rank has 50 to 100 files open, and so has the server that forks it, for each of its ranks.
LEAST_OPEN_FILES = 1024


class Finding(NamedTuple):
    """One line: ``FAIL`` is what makes tests fail on this machine, ``warn`` what may."""

    state: Literal["ok", "warn", "FAIL"]
    name: str
    text: str
    way_out: str = ""

    def __str__(self) -> str:
        return f"{self.state:4}  {self.name:11}  {self.text}" + (f"; {self.way_out}" if self.way_out else "")


def declare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand's parser."""
    parser = commands.add_parser(
        "doctor",
        help="show GPUs, leases and versions, and whether two ranks work here",
        description="Show this machine's GPUs, who holds them, the versions that matter, and whether a "
        "training step on two ranks really works here.",
        epilog="Exit codes: 0 nothing stands in the way (a machine without GPUs is fine), 1 something would "
        "fail, 2 bad input, 130 interrupted.",
    )
    parser.set_defaults(run=_doctor)
    parser.add_argument("--json", type=file, metavar="FILE", help="also write the findings there")


def _doctor(options: argparse.Namespace) -> int:
    try:
        inventory = discover()
    except ValueError as error:
        raise UsageError(str(error)) from None
    findings = []
    for finding in _findings(inventory):
        print(finding, flush=True)  # as they come: the last ones take seconds
        findings.append(finding)
    failing = [finding for finding in findings if finding.state == "FAIL"]
    if options.json is not None:
        _write_json(findings, inventory, options.json)
    if failing:
        names = ", ".join(finding.name for finding in failing)
        print(f"\ngputrain doctor: something would fail here: {names}; see what to do above")
        return EXIT_FAILED
    print("\ngputrain doctor: nothing stands in the way")
    return EXIT_OK


def _findings(inventory: Inventory) -> Iterator[Finding]:
    yield from _host()
    yield from _gpus(inventory)
    busy = yield from _leases(inventory)
    yield from _torch(inventory, busy)


def _host() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()}, {sys.executable}")
    yield Finding("ok", "packages", ", ".join(_versions("pytest", "pytest-xdist", "pytest-gputrain")))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "cores", f"{cores} for this process")
    if Path("/dev/shm").is_dir():
        yield _shared_memory(shutil.disk_usage("/dev/shm").total)
    try:
        import resource
    except ImportError:  # Windows
        return
    yield _open_files(*resource.getrlimit(resource.RLIMIT_NOFILE), unlimited=resource.RLIM_INFINITY)


def _versions(*names: str) -> Iterator[str]:
    for name in names:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} (not installed, a bare checkout)"


def _shared_memory(size: int) -> Finding:
    text = f"/dev/shm has {format_size(size)}"
    if size >= LEAST_SHM:
        return Finding("ok", "memory", text)
    way_out = "DataLoader workers and NCCL need 1 GiB and more: docker run --shm-size=8g, or --ipc=host"
    return Finding("warn", "memory", text, way_out)


def _open_files(soft: int, hard: int, *, unlimited: int) -> Finding:
    text = "no limit" if soft == unlimited else f"at most {soft} a process"
    if soft == unlimited or soft >= LEAST_OPEN_FILES:
        return Finding("ok", "open files", text)
    most = "unlimited" if hard == unlimited else hard
    return Finding("warn", "open files", text, f"many ranks need more: ulimit -n {most}")


def _gpus(inventory: Inventory) -> Iterator[Finding]:
    pretended = inventory.source == FAKE_VARIABLE
    twice = named_twice(inventory, os.environ)
    driver = f", driver {inventory.driver}" if inventory.driver else ""
    found = f"{describe_found()}{driver}"
    if twice is not None:
        yield Finding("FAIL", "GPUs", found)
    elif pretended:
        way_out = f"tests select and skip by them, nothing can run on them; unset {FAKE_VARIABLE}"
        yield Finding("warn", "GPUs", f"pretended: {found}", way_out)
    elif not inventory.gpus and inventory.driver:
        way_out = "tests that need GPUs skip; in a container, give it GPUs (docker run --gpus all)"
        yield Finding("warn", "GPUs", found, way_out)
    else:
        yield Finding("ok", "GPUs", found, "" if inventory.gpus else "tests that need GPUs skip")
    visible = visible_gpus(inventory, os.environ)
    for gpu in inventory.gpus:
        yield Finding("ok", _name(gpu, pretended), _described(gpu, gpu in visible))
    if linked := links(inventory.gpus):
        yield Finding("ok", "links", "; ".join(f"{kind}: {_pairs(linked[kind])}" for kind in linked))


def _pairs(pairs: Iterable[Sequence[int]]) -> str:
    return ", ".join(f"{pair[0]}-{pair[1]}" for pair in pairs)


def _name(gpu: Gpu, pretended: bool) -> str:
    return f"{'pretended' if pretended else 'MIG' if gpu.mig else 'GPU'} {gpu.index}"


def _described(gpu: Gpu, visible: bool) -> str:
    memory = format_size(gpu.memory_bytes) if gpu.memory_bytes else "memory not told"
    slice_of = f", a MIG slice of GPU {gpu.index}" if gpu.mig else ""
    return f"{gpu.name}, {memory}, {gpu.uuid}{slice_of}{'' if visible else ', hidden from CUDA'}"


def _leases(inventory: Inventory) -> Generator[Finding, None, set[str]]:
    """The leases and other users of the GPUs; returns the UUIDs that are taken."""
    from pytest_gputrain.devices.lease_folder import LeaseFolder, LeaseFolderError, default_path
    from pytest_gputrain.devices.leases import holders
    from pytest_gputrain.devices.occupancy import in_use

    path = Path(os.environ.get("GPUTRAIN_LEASE_DIR", "").strip() or default_path())
    held = []
    if not path.exists():  # the first lease makes it; looking at leases should not
        yield Finding("ok", "leases", f"none: {path} is not there yet")
    else:
        try:
            held = holders(LeaseFolder(path))
            yield Finding("ok", "leases", f"{len(held) or 'none'} in {path}")
        except LeaseFolderError as error:
            yield Finding("FAIL", "leases", str(error))
    names = {gpu.uuid: gpu.index for gpu in inventory.gpus}
    for holder in held:
        where = f"GPU {names[holder.uuid]}" if holder.uuid in names else "elsewhere"
        yield Finding("ok", "lease", f"{where}: {holder}")
    used = in_use(inventory.gpus)
    leased = {holder.uuid for holder in held}
    for uuid, line in used.items():
        if uuid not in leased:
            yield Finding("warn", "in use", line, "tests wait for it; end that process or hide the GPU")
    return leased | set(used)


def _torch(inventory: Inventory, busy: set[str]) -> Iterator[Finding]:
    from pytest_gputrain.cli.doctor_torch import NoAnswer, ask_torch

    pretended = inventory.source == FAKE_VARIABLE
    visible = () if pretended else visible_gpus(inventory, os.environ)
    try:
        answer = ask_torch()
    except NoAnswer as error:
        yield Finding("FAIL", "torch", str(error), "reinstall torch; nothing that trains can run")
        return
    yield from _torch_findings(answer, None if pretended else len(visible))
    yield _step("cpu")
    if len(visible) < 2 or answer.get("broken") or not answer["num_gpus"]:
        return
    free = [gpu.uuid for gpu in visible if gpu.uuid not in busy][:2]
    if len(free) == 2:
        yield _step("cuda", free)
    else:
        yield Finding("warn", "step, NCCL", "not tried: fewer than 2 GPUs are free", "ask again later")


def _torch_findings(answer: dict[str, Any], num_visible: int | None) -> Iterator[Finding]:
    """What torch says, against the number of real GPUs that it should see; None where that is not known."""
    build = f"built for CUDA {answer['cuda']}" if answer["cuda"] else "built without CUDA"
    text = f"{answer['version']}, {build}, sees {answer['num_gpus']} GPUs"
    if num_visible and not answer["cuda"]:
        yield Finding("FAIL", "torch", text, "install a torch that is built for CUDA")
    elif num_visible is not None and answer["num_gpus"] != num_visible:
        expected = f"it should see {num_visible}: is the driver new enough for this build?"
        yield Finding("FAIL", "torch", text, expected)
    else:
        yield Finding("ok", "torch", text)
    if answer["cuda"]:
        yield Finding("ok", "NCCL", answer["nccl"] or "none in this build")
    if broken := answer.get("broken"):
        yield Finding("FAIL", "CUDA", f"a GPU cannot be used: {broken}", "see nvidia-smi and dmesg")
    if peers := answer.get("peers"):
        without = [pair for pair in peers if not pair[2]]
        text = f"{len(peers) - len(without)} of {len(peers)} pairs of GPUs"
        missing = f"none between {_pairs(without[:8])}: NCCL goes through host memory" if without else ""
        yield Finding("warn" if without else "ok", "peer access", text, missing)


def _step(device: str, gpus: list[str] | None = None) -> Finding:
    from pytest_gputrain.cli.doctor_torch import try_step

    name = "step, NCCL" if device == "cuda" else "step, gloo"
    if not sys.platform.startswith("linux"):
        return Finding("warn", name, f"launching ranks needs Linux, this is {sys.platform!r}")
    if why := try_step(device, gpus or ()):
        return Finding(
            "FAIL", name, f"2 ranks, one DDP step: {why}", "no test with ranks can pass before this"
        )
    return Finding("ok", name, "2 ranks, one DDP step: gradients are right")


def _write_json(findings: list[Finding], inventory: Inventory, path: Path) -> None:
    from pytest_gputrain.origin import origin

    document = {
        **head("gputrain.doctor"),
        "origin": origin(),
        "pretended": inventory.source == FAKE_VARIABLE,
        "findings": [finding._asdict() for finding in findings],
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
