"""The items of a lease, in their order, and what each does in its process."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from jactri.kernels import support

from ..record import Record
from . import bench, cache, check, counters, suite
from .device import Cpu, Cuda, Device, rates, versions
from .lease import RESULT, SECONDS, Item
from .sizes import Sized, sized

WORKERS = 14
"""Processes of tests side by side, on a machine that has the cores."""
KERNELS, SUITE, SANITIZED = 14, 28, 4
"""Shards of the kernel tests, of the suite, and of the smoke tests under compute-sanitizer."""
COUNTED = ("W1-tanh", "W5", "W6")
"""Whose kernels ncu looks at."""
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""One allocation a tensor: in memory that torch hands out in pieces, an access outside of one is inside of another."""
FOUND = "86"
"""The exit code by which compute-sanitizer says that it found something."""
NAMES = [s.name for s in sized([])]


def listed(device: str, shrink: int, lease: Path, archive: Path | None = None) -> list[Item]:
    """All items on a device, sizes divided by ``shrink``; ``archive``: of compiled kernels, made by `prepare`.

    ``lease``: the file where an item looks up what others found.
    """
    cpu = device == "cpu"
    cores = os.cpu_count() or 1
    ncu, sanitizer = shutil.which("ncu"), shutil.which("compute-sanitizer")
    kept = {"TRITON_CACHE_DIR": str(cache.FOLDER / "kernels")}
    interpreted = {"TRITON_INTERPRET": "1"} if cpu else {}
    fixed = {"JACTRI_TUNE": "0"}  # what runs in a test is not for a clock to decide

    def item(name, seconds, beside=1, wrap=(), environment=None, **more) -> Item:
        command = [
            *wrap, sys.executable, "-m", __name__, name, "--device", device, "--shrink", str(shrink),
            "--seconds", SECONDS, "--json", RESULT, "--lease", str(lease),
            *(["--cache", str(archive)] if archive else []),
        ]  # fmt: skip
        return Item(name, seconds, command, min(beside, cores), kept | (environment or {}), **more)

    def shards(kind, count, seconds, beside=WORKERS, **more) -> list[Item]:
        return [item(f"{kind}:{k + 1}of{count}", seconds, beside, **more) for k in range(count)]

    def sanitized(tool) -> list[Item]:
        wrap = [sanitizer or "", "--tool", tool, "--error-exitcode", FOUND, "--print-limit", "20"]
        lacks = (
            "there is no CUDA device"
            if cpu
            else ""
            if sanitizer
            else "no compute-sanitizer on the PATH"
        )
        wrap += ["--target-processes", "all"]
        environment = ALONE | fixed
        return shards(
            tool, SANITIZED, 150, SANITIZED, wrap=wrap, environment=environment, lacks=lacks
        )

    no_ncu = "there is no CUDA device" if cpu else "" if ncu else "no ncu on the PATH"
    tests = interpreted | fixed
    return [
        item("card", 40, always=True),
        *([item("cache", 30, always=True)] if archive else []),
        *(item(f"smoke:{k}", 60, WORKERS, environment=tests) for k in suite.SMOKE),
        *(item(f"capture:{n}", 60, 6) for n in NAMES),
        *(item(f"accuracy:{n}", 90, 4) for n in NAMES),
        *(item(f"bench:{n}", 45) for n in NAMES),
        *(item(f"limits:{n}", 60, lacks=no_ncu) for n in COUNTED),
        *shards("kernels", KERNELS, 180, environment=tests),
        *shards("suite", SUITE, 150, environment=fixed),
        *sanitized("memcheck"),
        *sanitized("racecheck"),
        *(item(f"compiled:{n}", 90) for n in NAMES),
    ]  # fmt: skip


def chosen(items: list[Item], patterns: list[str]) -> list[Item]:
    """The items that a pattern is the name, or a beginning of the name up to a ":" or "-", of; and those for always.

    Raises ValueError for a pattern that is of none.
    """

    def fits(name: str, pattern: str) -> bool:
        return name == pattern or name.startswith((pattern + ":", pattern + "-"))

    for p in patterns:
        if not any(fits(i.name, p) for i in items):
            kinds = dict.fromkeys(i.kind for i in items)
            raise ValueError(
                f"there is no item {p!r}; kinds are {', '.join(kinds)}; workloads {', '.join(NAMES)}"
            )
    return [i for i in items if not patterns or i.always or any(fits(i.name, p) for p in patterns)]


# ---- in the item's process


class Task:
    """What an item's process knows."""

    def __init__(self, options: argparse.Namespace):
        self.kind, _, self.what = options.name.partition(":")
        self.shrink, self.archive = options.shrink, options.cache
        self.record = Record(options.json, options.seconds, line="")
        self._device, self._lease = options.device, options.lease

    @property
    def device(self) -> Device:
        return Cuda() if self._device == "cuda" else Cpu()

    @property
    def size(self) -> Sized:
        return next(s for s in sized([self.what], self.shrink) if s.name == self.what)

    @property
    def shard(self) -> tuple[int, int]:
        return tuple(map(int, self.what.split("of")))

    def known(self) -> dict[str, Any]:
        """The lease so far."""
        return json.loads(self._lease.read_text()) if self._lease else {}

    def card(self, device: Device) -> dict[str, float]:
        """The card's rates, as the lease has them, or measured now."""
        return self.known().get("card") or self.rates(device)

    def rates(self, device: Device) -> dict[str, float]:
        return rates(device, (4 << 30) // self.shrink, 8192 // self.shrink)


def card(task: Task) -> None:
    device = task.device
    task.record.data["machine"] = {**device.describe(), **versions()}
    task.record.write()
    found = task.record.data["card"] = task.rates(device)
    name = task.record.data["machine"]["device"]
    task.record.data["line"] = f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items())


def unpack(task: Task) -> None:
    """Use what an earlier call unpacked and added to, if it is still right; else unpack."""
    folder = cache.FOLDER / "kernels"
    manifest = folder / cache.MANIFEST
    capability = task.known().get("machine", {}).get("capability")
    target = f"sm_{capability.replace('.', '')}" if capability else None
    try:
        cache.check(json.loads(manifest.read_text()), target)
        task.record.data["line"] = "unpacked already"
    except (OSError, ValueError, cache.Mismatch):
        found = cache.unpack(task.archive, folder, target)
        task.record.add({k: found[k] for k in ("kernels", "triton", "notes") if k in found})
        task.record.data["line"] = "; ".join(["unpacked", *found["notes"]])


def accuracy(task: Task) -> None:
    check.accuracy(task.device, task.record, task.size)


def capture(task: Task) -> None:
    check.capture(task.device, task.record, task.size)


def timed(task: Task) -> None:
    device = task.device
    bench.run(device, task.record, task.size, task.card(device))


def compiled(task: Task) -> None:
    device = task.device
    known = task.known().get("items", [])
    rows = next((i.get("results", []) for i in known if i["name"] == f"bench:{task.what}"), [])
    bench.against_compiled(device, task.record, task.size, task.card(device), rows)


def limits(task: Task) -> None:
    counters.run(task.record, task.size, task.shrink)


def smoke(task: Task) -> None:
    suite.run(task.record, suite.smoke(task.what))


def sanitized(task: Task) -> None:
    """A part of the smoke tests; the item's command puts it under compute-sanitizer."""
    shard, of = task.shard
    for kernel in list(suite.SMOKE)[shard - 1 :: of]:
        suite.run(task.record, suite.smoke(kernel))


def kernels(task: Task) -> None:
    suite.run(task.record, ["tests/kernels"], *task.shard)


def whole(task: Task) -> None:
    arguments, left_out = suite.whole(task._device)
    task.record.data["left_out"] = left_out
    suite.run(task.record, arguments, *task.shard)


KINDS = {
    "card": card, "cache": unpack, "smoke": smoke, "capture": capture, "accuracy": accuracy, "bench": timed,
    "limits": limits, "kernels": kernels, "suite": whole, "memcheck": sanitized, "racecheck": sanitized,
    "compiled": compiled,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """One item, in this process; the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {__name__}", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lease", type=Path)
    parser.add_argument("--cache", type=Path)
    task = Task(parser.parse_args(arguments))
    warnings.simplefilter("ignore")
    record = task.record
    try:
        if task.kind != "cache" and support.missing() is None:
            cache.begin()
        KINDS[task.kind](task)
    except Exception as error:  # whatever it is, it is this item's
        record.failed(task.kind, error)
    record.data["cache"] = cache.counted()
    return record.close()


if __name__ == "__main__":
    sys.exit(main())
