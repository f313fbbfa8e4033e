"""Every GPU workload at its own size, by precision and backend: ops of one device, launches in limits, right shapes."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.bench import own
from benchmarks.gpu.device import precision
from benchmarks.gpu.sizes import sized

WORKLOADS = [s.workload for s in sized([])]
SETTINGS = {
    "ieee": ("ieee", torch.float32), "tf32": ("tf32", torch.float32), "bf16": ("ieee", torch.bfloat16)
}  # fmt: skip
NO_KERNELS = {"W8-divergence": "products of two weights alone, which torch multiplies"}


CASES = [
    pytest.param(w, s, b, id=f"{w.name}-{s}-{b}")
    for w in WORKLOADS
    for s in SETTINGS
    for b in ("auto", "torch", "triton")
    if s != "bf16" or w.operator is None
]


@pytest.mark.parametrize("workload, setting, backend", CASES)
def test_a_workload_runs(workload, setting, backend, device):
    exact, dtype = SETTINGS[setting]
    with precision(exact):
        net, x = device.problem(workload, dtype)
        call = own(backend).make(workload, net)
        call(x)
        reads = {w.site.partition(".")[0] for w in device.waits if w.op == "_local_scalar_dense"}
        assert reads <= {"chooser"}, (
            "only the chooser looks at values, where it holds ways against float64"
        )
        device.clear()
        made = call(x)
    assert all(t.device.type == "cuda" for t in tree_leaves(made) if isinstance(t, Tensor))
    flat = made if workload.operator is None else workload.operator.flat(made)
    assert flat.shape == workload.shape and flat.dtype == dtype
    if backend == "torch":
        assert not device.launches
    if backend == "triton" and workload.name not in NO_KERNELS:
        assert device.launches
