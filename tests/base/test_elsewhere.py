"""Weights that are freed when they have been used, or distributed: right, or an error that says what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[1]


def ran(what):
    """What became of every case, by name; run in a process of its own (see elsewhere_cases.py)."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "elsewhere_cases.py"), what],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert done.returncode == 0, (
        f"ended by {done.returncode} after {list(found)[-1:]}: {done.stderr[-2000:]}"
    )
    return found


def test_freed_weights():
    """Each is refused by name, before anything reads memory that is not there."""
    found = ran("freed")
    assert len(found) > 300
    wrong = {
        k: v for k, v in found.items() if "freed after the forward pass" not in v or "(" not in v
    }
    assert not wrong
    assert all(
        v.startswith("RuntimeError: ") and "reshard_after_forward=False" in v
        for v in found.values()
    )


KEEP = ("DDP", "DDP, static graph", "FSDP that keeps", "FSDP of the root")
FREE = ("FSDP that frees", "FSDP that frees, the root too")
PARAMETERS = {
    "dense", "gram", "J^T u", "kernel", "kernel of two", "kernel of one weight", "kernel of a tensor", "ggn",
    "compiled kernel",
}  # fmt: skip


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_distributed_weights():
    found = ran("distributed")
    assert len(found) == 8 * 22 + 18 + 2
    for name, outcome in found.items():
        way, call = name.split("/")
        if way == "a DTensor in" and call != "jacrev":  # all of it is on every rank
            assert outcome == "right", f"{name}: {outcome}"
        elif way in ("a DTensor in", "a DTensor out"):
            assert "is a DTensor, so" in outcome, f"{name}: {outcome}"
        elif way in KEEP:
            assert outcome == "right", f"{name}: {outcome}"
        elif way in FREE:
            assert outcome.startswith("RuntimeError: "), f"{name}: {outcome}"
            assert "reshard_after_forward=False" in outcome, f"{name}: {outcome}"
        elif call in PARAMETERS and way == "flat FSDP":
            assert "use fully_shard" in outcome, f"{name}: {outcome}"
        elif way in ("tensor parallel", "a DTensor inside") and call in ("laplacian", "hessian"):
            assert "no second derivative" in outcome, f"{name}: {outcome}"
        else:
            assert outcome == "right", f"{name}: {outcome}"
