"""Kernels in Triton's interpreter (``TRITON_INTERPRET=1 pytest tests/kernels``) or on a CUDA device (without)."""

from functools import partial
from pathlib import Path

import pytest
import torch

from jactri._src.device import chooser
from jactri._src.plan import patching, planning
from jactri.kernels import support

torch.backends.cudnn.conv.fp32_precision = "ieee"  # by default torch allows convolutions tf32

if support.interpreted():
    from honest import install

    install()
    support.interpreter_rounds = True


def pytest_configure(config):
    if not support.interpreted() and not torch.cuda.is_available():
        raise pytest.UsageError(
            "tests/kernels needs Triton's interpreter or a CUDA device: "
            "TRITON_INTERPRET=1 pytest tests/kernels"
        )


def pytest_collection_modifyitems(items):
    # the interpreter computes with numpy, which warns where a GPU gives inf or NaN
    quiet = pytest.mark.filterwarnings(
        "ignore:(overflow|underflow|invalid value|divide by zero) encountered:RuntimeWarning"
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(quiet)


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if support.interpreted() else "cuda")


@pytest.fixture
def timed(monkeypatch):
    """All ways are timed, by a table: what is not in it takes a second."""
    table = {}

    def milliseconds(call):
        call()
        way = call.args[0] if isinstance(call, partial) else chooser.TORCH
        return table.get(str(way).split(" (")[0], 1000.0)

    chooser.forget()
    monkeypatch.setattr(chooser, "_tunable", lambda kind: True)
    monkeypatch.setattr(chooser, "_milliseconds", milliseconds)
    yield table
    chooser.forget()


@pytest.fixture
def by_images(monkeypatch):
    """Coloured sweeps carry images where kernels run: the kernel of patches takes none of them."""
    planning._plans.clear()
    monkeypatch.setattr(patching, "_tail", lambda *given: None)
    yield
    planning._plans.clear()
