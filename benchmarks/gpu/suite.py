"""pytest inside of an item: which tests, a shard of them, and what became of each, noted as it ends."""

from __future__ import annotations

import importlib.util
import re
import runpy
from collections import Counter

import pytest

from ..record import Record
from .cache import ROOT

SMOKE = {
    "operands": ("linear", "prepared_parts"),
    "linear": ("linear", "step and (shape5 or shape2) and (shapes_and_precisions or half)"),
    "chain": (
        "linear",
        "((chain-shape6 or chain-shape8 or pair-shape11) and (shapes_and_precisions or half))"
        " or (test_a_block_that_stays and (shape1 or shape5) and True)",
    ),
    "attention": ("attention", "precisions"),
    "batched": ("batched", "(shapes_and_precisions or half) and (shape2 or shape3)"),
    "activations": ("activations", "against_float64"),
    "elementwise": ("rows", "scaled_sums and shape2"),
    "rows": ("rows", "between_diagonals and None"),
    "conv": ("conv", "(conv-3x3 and arguments) or precisions or (half and conv)"),
    "direct": ("conv", "direct and (depthwise or groups) and (arguments or half)"),
    "first": ("first", "(values and (3x3 or stride or groups)) or half"),
    "pool": ("pool", "between_diagonals"),
    "band": ("band", "written_once or dtypes"),
    "patches": ("patches", "(odd and (shapes_and_precisions or half or places)) or (W6 and configuration)"),
    "laplacian": ("laplacian", "(shapes_and_precisions and shape0) or half or last_layer"),
}  # fmt: skip
"""For each module of kernels/ that launches one: the file in tests/kernels and pytest's -k of a few tests of it, of
small odd sizes, in every precision, against float64."""

NEEDS = ("hypothesis", "sklearn", "matplotlib", "rich", "ruff", "expecttest")
"""What a test file may import that a GPU machine need not have."""

ENDS = (pytest.ExitCode.OK, pytest.ExitCode.INTERRUPTED, pytest.ExitCode.NO_TESTS_COLLECTED)
"""pytest's codes that say nothing beside what was noted; interrupted: by the item's own limit."""

COUNTED = ("passed", "failed", "skipped")
MOST = 20
"""Failures that are noted in full."""


def run(record: Record, arguments: list[str], shard: int = 1, of: int = 1) -> None:
    """pytest on these arguments, every test or one shard of them, until the record's time is over."""
    noted = Noted(record, shard, of)
    quiet = ["-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short"]
    code = pytest.main([*quiet, "--rootdir", str(ROOT), *arguments], plugins=[noted])
    noted.write()
    failed = noted.counts["failed"]
    if code not in (*ENDS, pytest.ExitCode.TESTS_FAILED) or (code and not noted.counts.total()):
        record.failed("pytest", f"ended with {code!r} after {noted.counts.total()} tests")
    if failed > MOST:
        record.failed("pytest", f"{failed} tests failed; the first {MOST} are listed")


class Noted:
    """A plugin that keeps one shard of the tests, and writes what became of them to the record."""

    def __init__(self, record: Record, shard: int, of: int):
        self.record, self.shard, self.of = record, shard, of
        self.counts: Counter[str] = Counter()
        self._result = dict.fromkeys(COUNTED, 0)
        record.data["results"].append(self._result)
        self._session, self._left, self._written = None, 0, record.left

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, session, items) -> None:
        # those that need clean memory take much of it: one after another, in the first shard
        large = {i for i in items if self.of > 1 and i.get_closest_marker("clean_memory")}
        others = [i for i in items if i not in large]
        first = [i for i in items if i in large and self.shard == 1]
        items[:] = first + others[self.shard - 1 :: self.of]
        self._session, self._left = session, len(items)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._failed(report.nodeid, str(report.longrepr))

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._failed(report.nodeid, str(crash.message if crash else report.longrepr))
        elif report.when == "call" or report.skipped:
            self.counts["skipped" if report.skipped else "passed"] += 1
        if report.when == "teardown":
            self._left -= 1
            if self._left and self.record.left < 0:
                self._stop("there was no time for", self._left)
        if self._written - self.record.left > 1:  # a second later
            self.write()

    def _failed(self, name: str, message: str) -> None:
        self.counts["failed"] += 1
        if self.counts["failed"] <= MOST:
            self.record.failed(name, message)
        if self._left > 1 and "CUDA error" in message:  # it stays with the process
            self._stop("a CUDA error kept from", self._left - 1)

    def _stop(self, why: str, tests: int) -> None:
        if not self._session.shouldstop:
            self._session.shouldstop = why
            self.record.data["not_run"].append(f"{why} {tests} tests")

    def write(self) -> None:
        """The counts so far."""
        self._written = self.record.left
        self._result |= {k: self.counts[k] for k in COUNTED}
        results = self.record.data["results"]
        self.record.data["line"] = ", ".join(f"{sum(r[k] for r in results)} {k}" for k in COUNTED)
        self.record.write()


APART = ("kernels", "budgets", "cuda", "clients")
"""Folders of tests that are run apart."""


def smoke(kernel: str) -> list[str]:
    """pytest's arguments for the few tests of a module of kernels/."""
    file, which = SMOKE[kernel]
    return [f"tests/kernels/test_{file}.py", "-k", which]


def whole(device: str) -> tuple[list[str], dict[str, str]]:
    """pytest's arguments for the main suite on a device, and the files left out with the reason."""
    left_out: dict[str, str] = {}
    files = sorted(f for f in (ROOT / "tests").rglob("test_*.py") if f.parent.name not in APART)
    for file in files:
        imported = re.findall(r"^\s*(?:import|from) (\w+)", file.read_text(), re.MULTILINE)
        lacking = [m for m in NEEDS if m in imported and importlib.util.find_spec(m) is None]
        if lacking:
            left_out[file.name] = f"needs {', '.join(lacking)}"
    if device != "cpu":  # not even collected, by each of the shards
        left_out |= runpy.run_path(str(ROOT / "tests/conftest.py"))["CPU_ONLY"]
    taken = [str(f.relative_to(ROOT)) for f in files if f.name not in left_out]
    return [f"--device={device}", *taken], left_out
