"""The op table in float32, and whole networks, with every call as if ``backend="triton"`` were given.

What no kernel covers must go on as ever: an op that only looks like one, blocks in float64, sums, views, fallbacks.
"""

import pytest
import torch
from test_ops import test_float32
from test_real_networks import test_networks_are_right_without_fallbacks

from jactri._src.prologue.running import computing
from jactri._src.run import launch
from jactri.kernels import support

__all__ = ["test_float32", "test_networks_are_right_without_fallbacks"]


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch, device, request):
    """Every call asks for kernels; what each launch gave is noted: None where no kernel covers it."""
    if support.interpreted() and "image to image" in request.node.name:
        pytest.skip("takes minutes in the interpreter; test_conv_networks.py has its kernels")
    plain, run, ran = computing.__init__, launch.run, []

    def forced(self, create_graph, backend=None):
        plain(self, create_graph, "triton" if backend == "auto" else backend)

    monkeypatch.setattr(computing, "__init__", forced)
    monkeypatch.setattr(launch, "run", lambda *args: ran.append(made := run(*args)) or made)
    if support.interpreted():
        yield
        assert_some_ran(request, ran)
        return
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda d=None: generator(device if d is None else d))
    with device:
        yield
    assert_some_ran(request, ran)


def assert_some_ran(request, ran):
    """These networks ask for kernels, and get some: one for each dtype at least."""
    if request.node.callspec.params.get("name") in ("residual", "transformer", "recurrent"):
        # `check` repeats calls for as long as it times them
        assert sum(made is not None for made in ran) >= 2
