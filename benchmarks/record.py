"""What a run found, written to its file after every step: a run that is cut short keeps what it had."""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a file by the data; whoever is killed in between leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)


class Record:
    """The JSON file of one run (None: no file), its failures, and its time."""

    def __init__(self, path: Path | None, budget: float, **about: Any):
        self.path, self.budget, self.start = path, budget, time.monotonic()
        self.data: dict[str, Any] = {**about, "results": [], "failures": [], "not_run": []}
        self.write()

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.start)

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for something that takes so long; noted where there is none."""
        if self.left > seconds:
            return True
        self.data["not_run"].append(what)
        self.write()
        return False

    def failed(self, what: str, error: BaseException | str) -> None:
        """Note a failure, and where in the project it came from."""
        entry = {"what": what, "error": str(error)[:2000]}
        if isinstance(error, BaseException):
            entry["type"] = type(error).__name__
            frames = traceback.extract_tb(error.__traceback__)
            entry["at"] = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-4:]]
        self.data["failures"].append(entry)
        print(f"FAILED {what}: {entry['error'][:300]}", flush=True)
        self.write()

    def add(self, result: dict[str, Any]) -> None:
        self.data["results"].append(result)
        self.write()

    def write(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self.start, 1)
        if self.path is not None:
            write_json(self.path, self.data)

    def close(self) -> int:
        """Say how it ended; the exit code."""
        self.write()
        failures, left_out = self.data["failures"], self.data["not_run"]
        for what in left_out:
            print(f"not run, for want of time: {what}")
        where = f": {self.path.name}" if self.path else ""
        print(f"{len(failures)} failures, {len(left_out)} not run, {self.data['seconds']} s{where}")
        return 1 if failures else 0
