"""Items in a time that is given, most valuable first: each in a process of its own, nothing lost where one fails.

An item's process leads a group, which is killed whole when the item's limit, or the time of the lease, is over. What
it found it writes to a file, step by step, so that what is killed keeps what it had; what it prints goes to the log
beside the JSON file, which is written anew after each item. Nothing here touches a device.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..record import write_json
from .cache import ROOT

RESULT, SECONDS = "{result}", "{seconds}"
"""In an item's command: the file that it writes, and the seconds it has."""

ENOUGH = 1 / 3
"""The part of an item's limit that must be left for it to be begun."""
SPARE = 0.01
"""The part of a lease that is kept for its end: killing, writing, the table."""
GRACE = 0.1
"""The part of an item's limit that it is not told of: it may end by itself before it is killed."""
TAIL, LOGGED = 2000, 100_000
"""Characters of a dead item's output in the JSON file; bytes of an item's output in the log."""
KEPT = ("line", "results", "failures", "not_run", "left_out", "cache", "machine", "card")
"""What of an item's own file goes to the lease's: the last two to its top."""
SAME = ("device", "torch", "cuda", "triton", "python")
"""What of the machine must be equal for an earlier result to stand."""
STATES = ("done", "failed", "timeout", "not run")

# a group, and no session: whoever ends the lease's session ends its items
OWN_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


@dataclass(frozen=True)
class Item:
    """One thing to find out: a command, its limit in seconds, and how many of its kind may run at once.

    ``name`` is "kind" or "kind:what". ``always``: also where an earlier lease did it. ``lacks``: why it cannot run.
    """

    name: str
    seconds: float
    command: Sequence[str]
    beside: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    always: bool = False
    lacks: str = ""

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]


class Child:
    """An item's process, which has a folder to itself."""

    def __init__(self, item: Item, seconds: float, folder: Path):
        self.item, self.seconds, self._late = item, seconds, False
        self._result, self._printed = (folder / n for n in ("result.json", "printed"))
        known = {RESULT: str(self._result), SECONDS: f"{seconds * (1 - GRACE):.1f}"}
        self._start = time.monotonic()
        with self._printed.open("wb") as printed:
            self._process = subprocess.Popen(
                [known.get(word, word) for word in item.command], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=printed, stderr=subprocess.STDOUT, env={**os.environ, **item.environment}, **OWN_GROUP,
            )  # fmt: skip

    def over(self) -> bool:
        """Whether it has ended, or has to."""
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT  # not reaped: its group is still its own
        if os.waitid(os.P_PID, self._process.pid, how) is not None:
            return True
        self._late = time.monotonic() - self._start > self.seconds
        return self._late

    def kill(self) -> None:
        """The whole group, whoever of it is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # hangs in the driver: others go on
            self._process.wait(5)

    def end(self) -> tuple[dict[str, Any], bytes]:
        """What became of it, as an entry for the lease's file, and what it printed."""
        self.kill()
        seconds = round(time.monotonic() - self._start, 1)
        found, printed = self._found(), _ends(self._printed)
        entry = {"name": self.item.name, "state": "done", "seconds": seconds, "line": ""}
        entry |= {k: found[k] for k in KEPT if found.get(k)}
        code, said = self._process.returncode, printed.decode(errors="replace")[-TAIL:].strip()
        if self._late:
            entry |= {"state": "timeout", "error": f"killed after {seconds} s"}
        elif code or not found:
            entry["state"] = "failed"
            if not entry.get("failures"):
                how = f"killed by signal {-code}" if code < 0 else f"ended with {code}"
                entry["error"] = f"{how if code else 'left no result'}: {said}"
        elif entry.get("not_run"):
            entry["state"] = "timeout"
        return entry, printed

    def _found(self) -> dict[str, Any]:
        try:
            found = json.loads(self._result.read_text())
        except (OSError, ValueError):  # it died before it wrote, or wrote something else
            return {}
        return found if isinstance(found, dict) else {}


def _ends(file: Path) -> bytes:
    """A file's content, without the middle where it is long."""
    with file.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
        if size <= LOGGED:
            return f.read()
        head = f.read(LOGGED // 4)
        f.seek(-3 * LOGGED // 4, os.SEEK_END)
        return head + b"\n...\n" + f.read()


class Lease:
    """Runs items within ``seconds`` since ``start`` and keeps what they found in the file ``path``.

    ``kernels``: a hash of the kernels' sources. ``earlier``: the data of another lease, whose items that are done need
    not run again where the kernels, the card and the versions are the same.
    """

    def __init__(
        self,
        path: Path,
        seconds: float,
        kernels: str,
        earlier: dict[str, Any] | None = None,
        start: float | None = None,
    ):
        self.path, self.log = path, path.with_suffix(".log")
        self._start = time.monotonic() if start is None else start
        self._end = self._start + seconds * (1 - SPARE)
        self._earlier = earlier or {}
        self.data: dict[str, Any] = {
            "kind": "gpu", "kernels": kernels, "seconds": 0.0, "machine": {}, "card": {}, "items": [],
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self._write()

    def run(self, items: Iterable[Item]) -> None:
        """All of them, in their order; those of one kind side by side, as many as they allow."""
        waiting, running = list(items), []
        folder = tempfile.TemporaryDirectory()
        try:
            while waiting or running:
                while waiting and self._taken(waiting[0], running, folder.name):
                    waiting.pop(0)
                for child in [c for c in running if c.over()]:
                    running.remove(child)
                    self._note(*child.end())
                time.sleep(0.02 if running else 0)
        finally:
            for child in running:
                child.kill()
            folder.cleanup()

    def _taken(self, item: Item, running: list[Child], folder: str) -> bool:
        """Begin an item, or note why not; False where it has to wait for others."""
        if running and (running[0].item.kind != item.kind or len(running) >= item.beside):
            return False
        before = None if item.always else self._before(item.name)
        left = self._end - time.monotonic()
        if before and before["state"] == "done":
            self._note(before)
        elif item.lacks:
            self._note({"name": item.name, "state": "not run", "line": item.lacks})
        elif left < ENOUGH * item.seconds:
            why = f"{max(left, 0):.0f} s were left, it may take {item.seconds:.0f}"
            self._note(before or {"name": item.name, "state": "not run", "line": why})
        else:
            try:
                own = Path(tempfile.mkdtemp(dir=folder))
                running.append(Child(item, min(item.seconds, left), own))
            except OSError as error:
                self._note({"name": item.name, "state": "failed", "error": str(error)})
        return True

    def _stands(self) -> bool:
        """Whether what an earlier lease found is of these kernels, this card and these versions."""
        earlier, own = self._earlier.get("machine", {}), self.data["machine"]
        same = bool(own) and all(earlier.get(k) == own.get(k) for k in SAME)
        return same and self._earlier.get("kernels") == self.data["kernels"]

    def _before(self, name: str) -> dict[str, Any] | None:
        """What an earlier lease found, if that still stands."""
        if not self._stands():
            return None
        found = next((i for i in self._earlier.get("items", []) if i["name"] == name), None)
        return found and found | {"earlier": True}

    def _note(self, entry: dict[str, Any], printed: bytes = b"") -> None:
        for key in ("machine", "card"):
            self.data[key] = entry.pop(key, None) or self.data[key]
        if self._stands():  # one bound for all rows
            self.data["card"] = self._earlier.get("card") or self.data["card"]
        entry.setdefault("commit", self.data["machine"].get("commit"))
        self.data["items"].append(entry)
        self._write()
        with self.log.open("ab") as log:
            log.write(f"\n==== {entry['name']}: {entry['state']}\n".encode() + printed)
        print(row(entry), flush=True)

    def _write(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self._start, 1)
        write_json(self.path, self.data)

    def close(self) -> int:
        """Print the table; the exit code: 1 where something failed or was cut off."""
        self._write()
        print("\n" + table(self.data), flush=True)
        return int(any(i["state"] in ("failed", "timeout") for i in self.data["items"]))


def row(entry: dict[str, Any], width: int = 200) -> str:
    """An item in a line."""
    bad = [f["error"] for f in entry.get("failures", ())]
    what = entry.get("line", "")
    if bad:
        what = f"{bad[0]} ({len(bad)} failures)"
    if "error" in entry:
        first, *rest = entry["error"].splitlines() or [""]
        what = "; ".join(filter(None, [f"{first[:60]} ... {rest[-1]}" if rest else first, what]))
    state = entry["state"] + (", earlier" if entry.get("earlier") else "")
    text = f"{state:8} {entry['name']:20} {entry.get('seconds', 0):6.1f} s  "
    return (text + " ".join(what.split()))[:width].rstrip()


def table(data: dict[str, Any], figures: Sequence[str] = ("bench", "compiled")) -> str:
    """How many items of each kind are in which state; then the lines with figures, and what failed or was cut off."""
    kinds: dict[str, Counter[str]] = {}
    seconds: Counter[str] = Counter()
    for item in data["items"]:
        kind = item["name"].partition(":")[0]
        kinds.setdefault(kind, Counter())[item["state"]] += 1
        seconds[kind] += item.get("seconds", 0)
    lines = [f"{'':10}" + "".join(f"{s:>9}" for s in STATES) + "  seconds"]
    for kind, states in kinds.items():
        counts = "".join(f"{states[s] or '-':>9}" for s in STATES)
        lines.append(f"{kind:10}{counts}  {seconds[kind]:7.1f}")
    measured = [i for i in data["items"] if i["name"].startswith(tuple(figures)) and i.get("line")]
    lines += [f"{i['name']:20} {i['line']}"[:220] for i in measured if i["state"] != "not run"]
    answered = [i["cache"] for i in data["items"] if i.get("cache")]
    if answered:
        hits, misses, took = (
            sum(c[k] for c in answered) for k in ("hits", "misses", "compile_seconds")
        )
        lines.append(f"kernel cache: {hits} hits, {misses} misses, compiled in {took:.0f} s")
    bad = [i for i in data["items"] if i["state"] in ("failed", "timeout")]
    lines += [row(i) for i in bad[:20]]
    if len(bad) > 20:
        lines.append(f"... and {len(bad) - 20} more")
    return "\n".join(lines) + f"\n{data['seconds']} s"
