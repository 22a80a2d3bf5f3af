"""A program that test_lease_fuzz.py runs: processes that lease at random and are killed at random.

    python lease_fuzz.py FOLDER NUM_PROCESSES NUM_LEASES NUM_KILLS SEED

Prints JSON. The witness that no GPU is held twice is a second lock a GPU, in another folder and by the system
call alone. Its files are opened first: a process that dies loses them, by the order of their numbers, before
it loses the lease, so that whoever has the lease next finds them free.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from pytest_gputrain.devices.inventory import Gpu, parse_fake
from pytest_gputrain.devices.lease_folder import LeaseFolder
from pytest_gputrain.devices.lease_place import Request
from pytest_gputrain.devices.leases import acquire, holders

GPUS = parse_fake("8").gpus
DEADLINE = 100.0


def lease_at_random(folder: Path, seed: int) -> None:
    """Lease until killed. Anything unexpected is written to the file ``errors``."""
    rng = random.Random(seed)
    witnesses = {gpu: os.open(folder / f"witness-{gpu.index}", os.O_RDWR | os.O_CREAT) for gpu in GPUS}
    counter = os.open(folder / "leases-done", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    leases = LeaseFolder(folder / "leases")
    while True:
        lease = acquire(leases, wish(rng), deadline=DEADLINE)
        for gpu in lease.gpus:
            fcntl.flock(witnesses[gpu], fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: held twice
        time.sleep(rng.choice([0, 0, 0.001, 0.005]))
        for gpu in lease.gpus:
            fcntl.flock(witnesses[gpu], fcntl.LOCK_UN)
        lease.release()
        os.write(counter, b"." if lease.waited < 10 else b"!")


def wish(rng: random.Random) -> Request:
    num_gpus = rng.choice([1, 1, 1, 2, 2, 4, 8])
    subset: tuple[Gpu, ...] = tuple(rng.sample(GPUS, rng.randint(num_gpus, 8)))
    return Request(num_gpus, subset, f"process {os.getpid()}", rng.choice([None, 0.001, 0.01]))


def start(folder: Path, seed: int) -> int:
    if pid := os.fork():
        return pid
    try:
        lease_at_random(folder, seed)
    except BaseException:
        with (folder / "errors").open("a") as errors:
            errors.write(traceback.format_exc())
    finally:
        os._exit(1)


def main() -> None:
    folder = Path(sys.argv[1])
    num_processes, num_leases, num_kills, seed = map(int, sys.argv[2:])
    rng = random.Random(seed)
    LeaseFolder(folder / "leases").prepare()
    (folder / "errors").touch()
    done, kills = folder / "leases-done", 0
    pids = [start(folder, rng.random().__hash__()) for _ in range(num_processes)]
    while not (folder / "errors").stat().st_size:
        made = done.stat().st_size if done.exists() else 0
        if made >= num_leases and kills >= num_kills:
            break
        time.sleep(0.01)
        if kills < num_kills and made >= num_leases * kills // num_kills:
            victim = rng.randrange(num_processes)
            os.kill(pids[victim], signal.SIGKILL)
            os.waitpid(pids[victim], 0)
            pids[victim] = start(folder, rng.random().__hash__())
            kills += 1
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    report(folder, kills)


def report(folder: Path, kills: int) -> None:
    began = time.monotonic()
    leases = LeaseFolder(folder / "leases")
    acquire(leases, Request(8, GPUS, "the last"), deadline=30).release()
    done = (folder / "leases-done").read_bytes()
    result = {
        "leases": len(done),
        "long_waits": done.count(b"!"),
        "kills": kills,
        "errors": (folder / "errors").read_text(),
        "held_at_the_end": len(holders(leases)),
        "all_free_after_s": round(time.monotonic() - began, 3),
        "waiting_at_the_end": leases.names("wait"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
