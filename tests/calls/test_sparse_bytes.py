"""What a sparse answer takes beside its sweep, in bytes an entry."""

import tracemalloc

import pytest
import torch

import jactri


@pytest.mark.parametrize(("layout", "most"), [(torch.sparse_csr, 26), (torch.sparse_bsr, 26)])
def test_a_triangle(layout, most):
    """Numpy's part: the pattern, and where entries are found; what is found at once is not all of it."""
    x = torch.rand(2600)
    jactri.jacobian(lambda x: x.cumsum(0), x[:5], layout=layout)
    tracemalloc.start()
    try:
        found = jactri.jacobian(lambda x: x.cumsum(0), x, layout=layout)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.values().numel() == 2600 * 2601 // 2
    assert torch.equal(found.values(), torch.ones_like(found.values()))
    assert peak < most * found.values().numel(), peak / found.values().numel()
