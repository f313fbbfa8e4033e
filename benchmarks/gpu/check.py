"""``check``: the kernel tests and the whole suite on the device, accuracy at GPU sizes, and memory.

``--parts sanitizer`` runs the kernel tests of small sizes under compute-sanitizer, for accesses outside of tensors and
for races.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import jactri

from .. import operators
from ..machine import ROOT
from ..peers import BY_OPERATOR
from ..record import Record
from ..workloads import Workload
from .device import SETTINGS, Device, precision
from .sizes import Sized, distance, problem, truth

NEEDS = ("hypothesis", "sklearn", "matplotlib", "rich", "ruff")
"""What a test file may import that a GPU machine need not have."""

ENDS = (0, 5)
"""pytest's codes for: all passed, and nothing to run (a shard of which every file is about the CPU)."""

SHARDS = 6
PARTS = ("kernels", "suite", "accuracy", "sanitizer")
TOOLS = ("memcheck", "racecheck")
SANITIZED = "not whole_suite and not end_to_end and not networks and not infrastructure"
"""The kernel tests that run under compute-sanitizer, some hundred times slower; the time that is left cuts them off."""
FOUND = 86
"""The exit code by which compute-sanitizer says that it found something."""
SLACK = {"ieee": 2.0**-22, "tf32": 1e-3, "bf16": 2.0**-6}
"""What jactri may be off by beside twice the error of torch.func at the same setting."""


def run(device: Device, record: Record, workloads: list[Sized], parts: list[str]) -> None:
    """Fill the record."""
    running = []
    if "kernels" in parts:
        running.append(_pytest("kernel tests", ["tests/kernels"], {}))
    if "suite" in parts:
        files, left_out = suite_files()
        record.data["test_files_left_out"] = left_out
        for shard in range(SHARDS):
            some = [str(f.relative_to(ROOT)) for f in files[shard::SHARDS]]
            if some:
                options = [f"--device={device.name}", *some]
                running.append(
                    _pytest(f"suite {shard + 1} of {SHARDS}", options, {"JACTRI_TUNE": "0"})
                )
    # the tests leave cores to spare, and the accuracy of a result does not depend on what else runs
    if "accuracy" in parts:
        for size in workloads:
            if record.has_time(f"accuracy {size.name}", 20):
                _accuracy(device, record, size)
                device.release()
    for one in running:
        _finish(record, *one)
    if "sanitizer" in parts:
        _sanitize(record)


def _sanitize(record: Record) -> None:
    """The kernel tests under each of compute-sanitizer's `TOOLS`, in the time that is left."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        record.data["not_run"].append("sanitizer: compute-sanitizer is not on the PATH")
        return
    # one allocation a tensor: in memory that torch hands out in pieces, an access outside of one is inside of another
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "JACTRI_TUNE": "0"}
    for k, tool in enumerate(TOOLS):
        until = record.left / (len(TOOLS) - k)
        wrap = [
            sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20",
            "--target-processes", "all",
        ]  # fmt: skip
        running = _pytest(f"kernel tests, {tool}", ["tests/kernels", "-k", SANITIZED], alone, wrap)
        _finish(record, *running, seconds=until)


def suite_files() -> tuple[list[Path], dict[str, str]]:
    """The test files of the main suite, and those left out here with the module that they lack."""
    files, left_out = [], {}
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        imported = re.findall(r"^\s*(?:import|from) (\w+)", file.read_text(), re.MULTILINE)
        lacking = [m for m in NEEDS if m in imported and importlib.util.find_spec(m) is None]
        if lacking:
            left_out[file.name] = f"needs {', '.join(lacking)}"
        else:
            files.append(file)
    return files, left_out


def _pytest(what: str, options: list[str], more: dict[str, str], wrap: Sequence[str] = ()):
    """Start pytest in a process of its own, under ``wrap``: (what, process, its files, started)."""
    folder = tempfile.TemporaryDirectory()
    report = Path(folder.name) / "junit.xml"
    command = [
        *wrap, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options,
    ]  # fmt: skip
    log = (Path(folder.name) / "log").open("w+")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **more}
    )
    return what, process, (folder, report, log), time.monotonic()


def _finish(
    record: Record, what: str, process, files, started: float, seconds: float | None = None
) -> None:
    """Wait for a pytest process, within the budget or so many ``seconds``, and note what failed."""
    folder, report, log = files
    with contextlib.closing(log), folder:
        try:
            code = process.wait(timeout=max(record.left if seconds is None else seconds, 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            record.data["not_run"].append(f"the rest of: {what}")
            code = None
        log.seek(0)
        tail = log.read()[-3000:]
        found: dict[str, Any] = {
            "what": what,
            "seconds": round(time.monotonic() - started, 1),
            "code": code,
        }
        failed: list[tuple[str, str]] = []
        if report.exists():
            counts, failed = _read(report)
            found |= counts
            for name, message in failed:
                record.failed(f"{what}: {name}", message)
        if code is not None and code not in ENDS and not failed:
            record.failed(what, f"pytest ended with code {code}: {tail}")
        record.add(found)
        print(", ".join(f"{k} {v}" for k, v in found.items()), flush=True)


def _read(report: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Counts and failures of a junit file."""
    failed, skipped, total = [], 0, 0
    for case in ET.parse(report).getroot().iter("testcase"):
        total += 1
        skipped += case.find("skipped") is not None
        for kind in ("failure", "error"):
            bad = case.find(kind)
            if bad is not None:
                failed.append(
                    (f"{case.get('classname')}::{case.get('name')}", bad.get("message", ""))
                )
    return {"tests": total, "failed": len(failed), "skipped": skipped}, failed


def _accuracy(device: Device, record: Record, size: Sized) -> None:
    """jactri's error against float64 beside that of torch.func, and its memory beside the answer's."""
    w = size.workload
    net, x = problem(w, device.device)
    want = truth(w, net, x, min(w.samples, 8))
    few = replace(w, samples=len(want))
    for setting in SETTINGS if w.operator else (*SETTINGS, "bf16"):
        half = setting == "bf16"
        f, given = (net.bfloat16(), x.bfloat16()) if half else (net, x)
        found: dict[str, Any] = {"what": "accuracy", "workload": w.name, "setting": setting}
        with precision("ieee" if half else setting):
            theirs = distance(_plain(few, f)(given[: len(want)]), want, w.operator)
            found["torch.func"] = theirs
            for backend in (*device.backends, "compiled"):
                try:
                    call = _ours(w, f, given, backend, found)
                    off = found[backend] = distance(call(), want, w.operator)
                    if not off <= 2 * theirs + SLACK[setting]:
                        raise AssertionError(f"off by {off:.1e}, torch.func by {theirs:.1e}")
                    if backend == "auto" and not half:
                        peak = device.peak(call)
                        found["peak_of_answer"] = peak / w.answer_bytes
                        if w.operator is None:
                            told = jactri.explain(f, given, per_sample=True)
                            found["peak_of_predicted"] = peak / told.peak_bytes
                except Exception as error:  # one backend may fail in any way: the others go on
                    record.failed(f"accuracy {w.name} {setting} {backend}", error)
                device.release()
        record.add(found)
        print(
            ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else str(v) for k, v in found.items()),
            flush=True,
        )


def _plain(w: Workload, net: torch.nn.Module) -> Callable[[torch.Tensor], Any]:
    """torch's way to compare with; of an operator, the first that its peers have."""
    if w.operator is not None:
        return next(p for p in BY_OPERATOR[w.operator] if p.kind == "torch").make(w, net)
    mode = torch.func.jacfwd if w.columns < w.rows and not w.no_forward else torch.func.jacrev
    return torch.func.vmap(mode(net))


def _ours(
    w: Workload, net, x: torch.Tensor, backend: str, found: dict[str, Any]
) -> Callable[[], Any]:
    """jactri's call by a backend; compiled ones, for another input of that shape, say how they run."""
    if backend != "compiled":
        if w.operator is not None:
            return partial(w.operator.jactri, net, x, backend=backend)
        return partial(jactri.jacobian, net, x, per_sample=True, backend=backend)
    like = torch.zeros_like(x)
    if w.operator is not None:
        made = operators.compiled(w, net, like)
    else:
        made = jactri.compile(net, like, per_sample=True)
    found["compiled_how"] = repr(made)
    return partial(made, x)
