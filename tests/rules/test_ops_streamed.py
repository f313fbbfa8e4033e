"""Every op of the table with tangents that go with the function's run."""

import pytest
import torch
from cases import ALL
from test_ops import F64, as_tuple, ids, truth
from tolerances import assert_close, length_of

import jactri

MAIN = [case for case in ALL if not case.variant]


@pytest.mark.parametrize("case", MAIN, ids=ids(MAIN))
def test_against_the_jacobian(case):
    func, inputs = case.build(F64)
    ts = tuple(torch.randn(3, *x.shape, dtype=x.dtype) for x in inputs)
    kept = [t.clone() for t in ts]
    try:
        products = as_tuple(jactri.jvp(func, inputs, ts, differentiate=None)[1])
    except RuntimeError as error:  # the cases of gradients.py, and module_backward_hooks
        if "for which the graph of func is needed" in str(error):
            return
        raise
    assert all(map(torch.equal, ts, kept))
    narrow = F64 if case.inner is None else case.inner
    for product, row in zip(products, truth(case), strict=True):
        terms = [torch.tensordot(t, j, dims(t, j)) for t, j in zip(ts, row, strict=True)]
        length = length_of(*row)
        assert_close(product.double(), sum(terms), narrow, length=4 * length, factor=case.factor)


def dims(t, j):
    """The axes of the input in a block of tangents, and in a Jacobian."""
    n = t.dim() - 1
    return list(range(1, n + 1)), list(range(j.dim() - n, j.dim()))
