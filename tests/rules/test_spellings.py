"""Windows that a caller spells in another way: a number, one for all axes, none, or by a word.

Autograd saves such lists as they were given.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from common import F64, MODES
from tolerances import assert_close
from torch import nn

import jactri

SIZES = {1: (5,), 2: (4, 5), 3: (3, 4, 3)}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
BACK = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
MEAN = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def spelled(k, n):
    """A number for each of ``n`` axes, in every spelling."""
    return [k, [k], (k,) * n]


def windows(n):
    """(name, function of an image and a kernel) of every op, over ``n`` axes, and spelling."""
    found = []
    for s, p, d in itertools.product(spelled(2, n), [*spelled(1, n), "valid"], spelled(1, n)):
        found.append((f"conv {s} {p} {d}", lambda x, w, a=(s, p, d): CONV[n](x, w, None, *a)))
    for d in spelled(2, n):
        found.append((f"same {d}", lambda x, w, d=d: CONV[n](x, w, padding="same", dilation=d)))
    for s, p, e in itertools.product(spelled(2, n), spelled(1, n), [0, *spelled(1, n)]):
        given = {"stride": s, "padding": p, "output_padding": e}
        found.append((f"transposed {given}", lambda x, w, g=given: BACK[n](x, w, **g)))
    for k, s, p in itertools.product(spelled(2, n), [None, [], *spelled(1, n)], spelled(1, n)):
        found.append((f"max {k} {s} {p}", lambda x, w, a=(k, s, p): MAX[n](x, *a)))
        found.append((f"mean {k} {s} {p}", lambda x, w, a=(k, s, p): MEAN[n](x, *a)))
    for d in spelled(2, n):
        found.append((f"max dilated {d}", lambda x, w, d=d: MAX[n](x, [2], [1], [0], d)))
        found.append((f"max ceil {d}", lambda x, w, d=d: MAX[n](x, d, [], ceil_mode=True)))
        found.append((f"mean ceil {d}", lambda x, w, d=d: MEAN[n](x, d, [], [1], True, False)))
    if n > 1:
        pools = {2: torch.ops.aten.max_pool2d, 3: torch.ops.aten.max_pool3d}
        found.append(("aten max", lambda x, w: pools[n](x, [2])))
    return found


ALL = [
    pytest.param(n, name, func, id=f"{n}d-{i}")
    for n in SIZES
    for i, (name, func) in enumerate(windows(n))
    if n == 2 or i % 4 == n
]


@pytest.mark.parametrize("n, name, func", ALL)
def test_jacobians_of_windows(n, name, func):
    x = torch.randn(2, 2, *SIZES[n], dtype=F64)
    w = torch.randn(2, 2, *(2,) * n, dtype=F64)
    inputs = (x, w) if name.startswith(("conv", "same", "transposed")) else (x,)
    f = func if len(inputs) == 2 else lambda x: func(x, None)
    truth = torch.autograd.functional.jacobian(f, inputs)
    for mode in MODES[1:]:
        for ours, theirs in zip(jactri.jacobian(f, inputs, strategy=mode), truth, strict=True):
            assert_close(ours, theirs, F64, what=f"{name} {mode}")


class Net(nn.Module):
    """A layer whose arguments are spelled in some way, a pool after it, and five outputs."""

    def __init__(self, n, layer, pool=lambda y: y, **spelled):
        super().__init__()
        kind = getattr(nn, f"{layer}{n}d")
        self.layer = kind(2, 2, 2, **spelled)
        self.pool = pool
        if layer == "Conv":  # the module widens some
            vars(self.layer).update(spelled)

    def forward(self, x):
        return self.pool(self.layer(x).tanh()).flatten(1).square()[:, :5]


NETS = {
    "valid": lambda n: Net(n, "Conv", lambda y: MAX[n](y, [2], [1]), padding="valid"),
    "lists": lambda n: Net(n, "Conv", lambda y: MEAN[n](y, [2]), padding=[1], dilation=[1]),
    "stride": lambda n: Net(n, "Conv", stride=[2], padding=[1]),
    "same": lambda n: Net(n, "Conv", lambda y: MAX[n](y, [2], [], [1]), padding="same", dilation=2),
    "groups": lambda n: Net(n, "Conv", padding="valid", groups=2),
    "transposed": lambda n: Net(
        n, "ConvTranspose", lambda y: MEAN[n](y, [2], [], [1]), stride=[2], padding=[1], output_padding=[0]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("n", SIZES)
def test_calls_of_networks(n, name):
    """Samples, patterns, parameters, second order, and a graph of the Jacobian."""
    net, x = NETS[name](n).to(F64), torch.randn(2, 2, *SIZES[n], dtype=F64)
    full = torch.autograd.functional.jacobian(net, x)
    rows = torch.stack([full[0, :, 0], full[1, :, 1]])
    assert_close(jactri.jacobian(net, x, per_sample=True), rows, F64)
    assert_close(jactri.jacobian(net, x, layout=torch.sparse_coo).to_dense(), full, F64)
    flat = rows.flatten(2)
    assert_close(jactri.jtj(net, x, per_sample=True).reshape(2, *flat.mT.shape[-2:-1], -1),
                 flat.mT @ flat, F64)  # fmt: skip

    one = x[:1]
    hessians = [
        torch.autograd.functional.hessian(lambda z, o=o: net(z)[0, o], one) for o in range(rows.shape[1])
    ]  # fmt: skip
    traces = torch.stack([h.reshape(one.numel(), -1).trace() for h in hessians])
    assert_close(jactri.laplacian(net, one)[0], traces, F64)

    y, weights = net(x), dict(net.named_parameters())
    dense = jactri.parameter_jacobian(net, x).dense()
    kernel = torch.zeros(y.numel(), y.numel(), dtype=F64)
    for key, w in weights.items():
        want = torch.stack([torch.autograd.grad(v, w, retain_graph=True)[0] for v in y.flatten()])
        assert_close(dense[key].reshape(want.shape), want, F64, what=key)
        kernel += want.flatten(1) @ want.flatten(1).mT
    ours = jactri.empirical_ntk(net, x)
    assert_close(ours, kernel.view(*y.shape, *y.shape).transpose(1, 2), F64)

    leaf = x.clone().requires_grad_()
    ours = jactri.jacobian(net, leaf, create_graph=True).square().sum()
    theirs = torch.autograd.functional.jacobian(net, leaf, create_graph=True).square().sum()
    ends = [leaf, net.layer.weight]
    for a, b in zip(
        torch.autograd.grad(ours, ends), torch.autograd.grad(theirs, ends), strict=True
    ):
        assert_close(a, b, F64)
