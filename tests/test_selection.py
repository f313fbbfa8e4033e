"""What autograd selects away is 0, whatever stands behind it; what it multiplies by 0 is NaN at infinity.

Whether an op selects is autograd's choice: each rule is compared with the node itself, given infinite and NaN
cotangents. Then selections are put before and behind poles, in every call.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from cases.case import quietly

from jactri.graph import read
from jactri.operators import through

F64 = torch.float64
inf, nan = math.inf, math.nan
X = torch.tensor([-7, -3, -2, -1.5, -1, -0.5, 0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 7], dtype=F64)
O = torch.zeros(16, dtype=F64)
EVEN = torch.arange(16) % 2 == 0
SOME = torch.tensor([0, 3, 3, 5])


def written(write):
    """The function that writes to a copy of its argument."""

    def call(x):
        y = x.clone()
        write(y)
        return y

    return call


def assign(index, value):
    return written(lambda y: y.__setitem__(index, value))


def rows(x):
    return x.reshape(4, 4)


SELECTIONS = {
    "relu": torch.relu,
    "relu_": written(torch.relu_),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.5, 9.0),
    "threshold_": written(lambda y: F.threshold_(y, 0.5, 1.0)),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_": written(lambda y: y.clamp_(0, 1)),
    "clamp min": lambda x: x.clamp(min=0),
    "clamp max": lambda x: x.clamp(max=0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: x.clamp_max(0),
    "clamp by tensors": lambda x: x.clamp(O, O + 1),
    "clamp by a tensor below": lambda x: x.clamp(min=O),
    "clamp by a tensor above": lambda x: x.clamp(max=O),
    "clamp in the bounds": lambda x: O.clamp(x, x + 1),
    "maximum": lambda x: torch.maximum(x, O),
    "minimum": lambda x: torch.minimum(O, x),
    "maximum of two": lambda x: torch.maximum(x, x.flip(0)),
    "fmax": lambda x: torch.fmax(x, O),
    "fmin": lambda x: torch.fmin(O, x),
    "where": lambda x: torch.where(EVEN, x, O),
    "where not": lambda x: torch.where(EVEN, 1.0, x),
    "where both": lambda x: torch.where(EVEN, x, x.flip(0)),
    "masked_fill": lambda x: x.masked_fill(EVEN, 1.0),
    "masked_fill tensor": lambda x: O.masked_fill(EVEN, x[7]),
    "masked_scatter": lambda x: x.masked_scatter(EVEN, O),
    "masked_scatter source": lambda x: O.masked_scatter(EVEN, x),
    "masked_select": lambda x: x.masked_select(EVEN),
    "index_fill": lambda x: x.index_fill(0, SOME, 1.0),
    "index_fill tensor": lambda x: O.index_fill(0, SOME, x[7]),
    "index_put": lambda x: x.index_put((SOME,), O[:4]),
    "index_put accumulate": lambda x: x.index_put((SOME,), O[:4], accumulate=True),
    "index_put values": lambda x: O.index_put((torch.tensor([1, 2, 4]),), x[:3]),
    "index_copy": lambda x: x.index_copy(0, torch.tensor([0, 2, 4]), O[:3]),
    "scatter": lambda x: x.scatter(0, SOME, O[:4]),
    "scatter number": lambda x: x.scatter(0, SOME, 3.0),
    "put": lambda x: x.put(SOME, O[:4]),
    "assign by mask": assign(EVEN, 0.0),
    "assign a slice": assign(slice(0, 4), 0.0),
    "masked_fill_ of a column": written(lambda y: rows(y)[:, 1].masked_fill_(EVEN[:4], 0.0)),
    "mul_ of a slice": written(lambda y: y[:4].mul_(0.0)),
    "tril": lambda x: rows(x).tril(),
    "triu": lambda x: rows(x).triu(1),
    "slice_scatter": lambda x: torch.slice_scatter(x, O[:4], 0, 0, 4),
    "select_scatter": lambda x: torch.select_scatter(rows(x), O[:4], 0, 1),
    "diagonal_scatter": lambda x: torch.diagonal_scatter(rows(x), O[:4]),
    "scatter_reduce": lambda x: x.scatter_reduce(0, SOME, O[:4], "mean", include_self=False),
    "index_reduce": quietly(lambda x: x.index_reduce(0, SOME, O[:4], "amax", include_self=False)),
    "max": lambda x: x.max(),
    "max of rows": lambda x: rows(x).max(1).values,
    "amax": lambda x: rows(x).amax(1),
    "median": lambda x: x.median(),
    "logit eps": lambda x: torch.logit(x, eps=0.3),
    "sinc": torch.sinc,
    "pow 0": lambda x: x**0,
    "pow tensor": lambda x: x**O,
    "norm 3": lambda x: (x - x.detach()).reshape(8, 2).norm(p=3, dim=1),
    "std of equals": lambda x: (x - x.detach()).std(),
    "prod of zeros": lambda x: (x - x.detach()).prod(),
    "embedding padding": lambda x: F.embedding(torch.arange(8), x.reshape(8, 2), padding_idx=3),
    "cdist": lambda x: torch.cdist(x.reshape(8, 2), x.reshape(8, 2)),
    "cdist to a set": lambda x: torch.cdist(x.reshape(8, 2), x.detach().reshape(8, 2)),
    "cdist 1.5": lambda x: torch.cdist(x.reshape(8, 2), x.reshape(8, 2), p=1.5),
    "pdist of equals": lambda x: F.pdist(x[:6].repeat(2).reshape(6, 2)),
    "zero": torch.round,
    # these multiply
    "leaky_relu": lambda x: F.leaky_relu(x, 0.0),
    "prelu": lambda x: F.prelu(x, torch.zeros(1, dtype=x.dtype)),
    "elu": F.elu,
    "abs": torch.abs,
    "copysign": lambda x: torch.copysign(x, O - 1),
    "nan_to_num": torch.nan_to_num,
    "mul by 0": lambda x: x * EVEN,
    "dropout": lambda x: F.dropout(x, 0.5),
    "tanh": lambda x: (100 * x).tanh(),
    "softmax": lambda x: (1e4 * x).softmax(0),
    "square": torch.square,
    "norm": lambda x: (x - x.detach()).reshape(8, 2).norm(dim=1),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, O, reduction="none"),
    "glu": F.glu,
}


@pytest.mark.clean_memory  # put_ has no deterministic way
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("value", [1.0, inf, -inf, nan])
def test_rules_select_where_their_node_does(name, value):
    torch.manual_seed(1)
    x = X.clone().requires_grad_()
    y = SELECTIONS[name](x)
    graph = read([y], [x])
    some = torch.arange(y.numel()).reshape(y.shape) % 3 == 0
    for c in (torch.full_like(y, value), torch.where(some, value, torch.ones_like(y))):
        (want,) = torch.autograd.grad(y, x, c, retain_graph=True)
        with torch.no_grad():
            got = through.pull(graph, {graph.outputs[0]: c.unsqueeze(0)}, set())
        torch.testing.assert_close(got[graph.inputs[0]][0], want, equal_nan=True, msg=name)
