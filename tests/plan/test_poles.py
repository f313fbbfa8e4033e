"""Infinite derivatives meet zeros that seeds share: every order of accumulation, against autograd's rows."""

import pytest
import torch
import torch.nn.functional as F

import jactri

F64 = torch.float64
SIGNED = torch.tensor([-1, 4, 0, 0.5, 2, -3, 0, 9], dtype=F64)
MATRIX = torch.linspace(-1, 1, 64, dtype=F64).reshape(8, 8)
HELD = {
    # name: maps that leave zeros in a block of tangents, which a pole behind them multiplies
    "pool": lambda x: F.max_pool1d(x[None], 2)[0],
    "overlapping pool": lambda x: F.max_pool1d(x[None], 3, 1, 1)[0],
    "index": lambda x: x[torch.tensor([3, 0, 0, 5, 7, 1])],
    "cummax": lambda x: x.cummax(0).values,
    "median": lambda x: x.reshape(2, 4).median(1).values,
    "differences": lambda x: x[1:] - x[:-1],
    "conv": lambda x: F.conv1d(x[None, None], x.new_tensor([[[1, 2, 0]]]))[0, 0],
    "cat": lambda x: torch.cat([x, x.flip(0)[:2]]),
    "sums": lambda x: x.cumsum(0),
    "matrix": lambda x: MATRIX[:, torch.arange(len(x)) % 8] @ x,
}
SINGULAR = {
    "sqrt": torch.sqrt,
    "reciprocal": lambda x: 1 / x,
    "acos": torch.acos,
    "by its logarithm": lambda x: x * x.log(),
    "unit": lambda x: x / (x.sum() - x.sum()),
}
MADE = {
    "auto": jactri.jacobian,
    "mixed": lambda f, x: jactri.jacobian(f, x, strategy="mixed"),
    "forward": lambda f, x: jactri.jacobian(f, x, strategy="forward-mode"),
    "forward in chunks": lambda f, x: jactri.jacobian(f, x, strategy="forward-mode", chunk_size=3),
    "reverse": lambda f, x: jactri.jacobian(f, x, strategy="reverse-mode"),
    "create_graph": lambda f, x: jactri.jacobian(
        f, x, strategy="forward-mode", create_graph=True
    ).detach(),
    "jacfwd": lambda f, x: jactri.func.jacfwd(f)(x),
}
BANDED = "pool", "overlapping pool", "differences", "conv", "cat"


@pytest.mark.parametrize("order", ["held first", "pole first", "between", "selected after"])
@pytest.mark.parametrize("pole", SINGULAR)
@pytest.mark.parametrize("held", HELD)
def test_poles_and_zeros_of_the_seeds(held, pole, order):
    """Zeros of seeds that share a block, or have been mixed, times infinity are nothing of autograd's rows.

    Its own NaN, of the zeros in a row times another output's infinity, may be what each output has alone.
    """
    h, p = HELD[held], SINGULAR[pole]

    def func(x):
        if order == "between":
            return HELD["matrix"](p(h(x)))
        return p(h(x)) if order == "held first" else h(p(x)).relu() if "after" in order else h(p(x))

    want = torch.autograd.functional.jacobian(func, SIGNED)
    alone = jactri.jacobian(func, SIGNED, strategy="reverse-mode")
    known = ~want.isnan()
    calls = dict(MADE)
    if held in BANDED and pole != "unit" and order != "between":
        for mode in ("auto", "forward-mode"):
            calls[f"sparse {mode}"] = lambda f, x, mode=mode: jactri.jacobian(
                f, x, layout=torch.sparse_coo, strategy=mode
            ).to_dense()
    for name, call in calls.items():
        got = call(func, SIGNED)
        torch.testing.assert_close(got[known], want[known], msg=lambda m, n=name: f"{n}: {m}")
        same = (got == alone) | (got.isnan() & alone.isnan()) | (got == 0)
        assert (same | known | (alone == 0)).all(), name
