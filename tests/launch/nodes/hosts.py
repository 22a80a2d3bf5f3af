"""Hosts made of network namespaces on this machine, joined by a bridge; gone with the ``with`` block."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_numbers = itertools.count()
PORT = 29400


def why_not() -> str:
    """Why there can be none here; empty if they can."""
    if shutil.which("ip") is None:
        return "needs `ip` (Debian: iproute2)"
    name = f"gpt{os.getpid()}x{next(_numbers)}"
    made = _ip("netns", "add", name)
    if made.returncode:
        return f"network namespaces are not allowed here ({made.stderr.strip()[:80]})"
    _ip("netns", "del", name)
    return ""


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)


def _must(*arguments: str) -> None:
    done = _ip(*arguments)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclass
class Host:
    """One host: ``name`` is what its processes read as their host's name."""

    name: str
    space: str
    address: str
    known: str
    """The text of /etc/hosts: all hosts by name."""
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, command: Sequence[str], cwd: Path, **environ: str) -> Command:
        """Starts a Python command on this host."""
        names = cwd / "hosts"  # within the mount namespace that `ip netns exec` makes, and nowhere else
        names.write_text(f"127.0.0.1 localhost\n{self.known}")
        prepare = f"hostname {self.name} && mount --bind {names} /etc/hosts"
        inside = ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c"]
        inside += [f'{prepare} && exec "$0" "$@"', sys.executable, *command]
        own = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "PYTEST_"))}
        process = subprocess.Popen(
            inside,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**own, "GLOO_SOCKET_IFNAME": "eth0", **environ},
            start_new_session=True,
        )
        self.running.append(process)
        return Command(process)

    def cut_off(self) -> None:
        """Pulls the cable."""
        _must("-n", self.space, "link", "set", "eth0", "down")


class Command:
    """A command on a host, whose output is read as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._new = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._new:
                self.lines.append(line.rstrip("\n"))
                self._new.notify_all()

    def wait_for(self, text: str, within: float = 60.0) -> None:
        """Until a line has ``text`` in it."""
        with self._new:
            assert self._new.wait_for(lambda: any(text in line for line in self.lines), within), self.lines

    def wait(self, within: float = 90.0) -> int:
        """The exit code."""
        code = self.process.wait(within)
        self._reader.join(5)
        return code

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@contextlib.contextmanager
def hosts(count: int = 2) -> Iterator[list[Host]]:
    """``count`` hosts 10.213.0.1, …; traffic goes between them and nowhere else."""
    tag = f"gpt{os.getpid()}x{next(_numbers)}"
    switch = f"{tag}s"
    names = {f"host-{chr(97 + number)}": f"10.213.0.{number + 1}" for number in range(count)}
    known = "".join(f"{address} {name}\n" for name, address in names.items())
    _sweep()
    found = [Host(name, f"{tag}{name[-2:]}", address, known) for name, address in names.items()]
    try:
        _must("netns", "add", switch)
        _must("-n", switch, "link", "add", "br0", "type", "bridge")
        _must("-n", switch, "link", "set", "br0", "up")
        for number, host in enumerate(found):
            _must("netns", "add", host.space)
            port = f"p{number}"
            _must(
                "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.space
            )
            _must("-n", switch, "link", "set", port, "master", "br0", "up")
            _must("-n", host.space, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _must("-n", host.space, "link", "set", device, "up")
        yield found
    finally:
        for process in [process for host in found for process in host.running]:
            with contextlib.suppress(Exception):  # whatever happens, the hosts go
                _end(process)
        for space in (*(host.space for host in found), switch):
            _ip("netns", "del", space)


def _sweep() -> None:
    """Hosts of a run that was killed."""
    for line in _ip("netns", "list").stdout.splitlines():
        if (owner := re.match(r"gpt(\d+)x", line)) and not psutil.pid_exists(int(owner[1])):
            _ip("netns", "del", line.split()[0])


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a command with all below it, if it still runs."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.kill()
    process.wait(10)
    if process.stdout is not None:
        process.stdout.close()
