"""Fused recurrent layers.

On a CPU in float32 an LSTM is one oneDNN node a layer and direction; GRUs and plain RNNs, and everything in other
dtypes, come as their primitive parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..maps.contraction import MatMul
from ..maps.linear_map import Identity, LinearMap
from ..maps.maps import Batched
from ..maps.once import Once
from ..maps.selection import Place, Slice
from . import rule

_LSTM = 2
"""The ``mode`` of an LSTM in torch's recurrent ops."""


class Cells:
    """The gates and states of one LSTM layer at every step, computed again from what autograd saved.

    With x_t the input, W and U the weights: z = x_t W' + h U' + b splits into (i, f, g, o);
    c <- f c + i g, h <- o tanh(c)  (``torch.nn.LSTM``).
    """

    def __init__(self, g):
        self.x, self.h0, self.c0 = g.tensor("input"), g.tensor("hx_"), g.tensor("cx_")
        self.w, self.u = g.tensor("weight0"), g.tensor("weight1")
        self.biases = (g.tensor("weight2"), g.tensor("weight3")) if g.saved("has_biases") else ()
        self.steps = range(self.x.shape[0])
        if g.saved("reverse"):
            self.steps = self.steps[::-1]
        self.result = g.tensor("result0")

    def before(self, h: Tensor) -> Tensor:
        """``(T, N, H)`` states after each step to those before it."""
        first = self.h0.reshape(1, *h.shape[1:])
        if self.steps.step > 0:
            return torch.cat([first, h[:-1]])
        return torch.cat([h[1:], first])

    def run(self):
        """Slopes of the cell's step: dc = f dc' + sum(a dz), dh = e dc + s dz_o; and h before each step."""
        x, w, u = self.x, self.w, self.u
        z = x @ w.t()
        for b in self.biases:
            z = z + b
        h, c = self.h0.reshape(x.shape[1], -1), self.c0.reshape(x.shape[1], -1)
        fused = not torch.is_grad_enabled()
        if fused:  # all states are known: one product instead of one a step
            z = z + self.before(self.result) @ u.t()
        rows: list = [None] * len(self.steps)
        hs: list = [None] * len(self.steps)
        for t in self.steps:
            hs[t] = h
            i, f, g, o = (z[t] if fused else z[t] + h @ u.t()).chunk(4, -1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            a = torch.cat([g * i * (1 - i), c * f * (1 - f), i * (1 - g * g)], -1)
            c = f * c + i * g
            tc = c.tanh()
            h = o * tc
            rows[t] = (f, a, o * (1 - tc * tc), tc * o * (1 - o))
        return rows, torch.stack(hs)


class Scan(LinearMap):
    """An LSTM layer from its gates ``(T, N, 4H)`` to its states ``(T, N, 2H)``: h, then c.

    With ``start``, from the first cell state ``(N, H)`` to its states.
    """

    __slots__ = ("rows", "start", "steps", "u")
    name, structure = "lstm", "recurrence"

    def __init__(self, rows, u: Tensor, steps: range, start: bool = False):
        self.rows, self.u, self.steps, self.start = rows, u, steps, start

    @property
    def key(self):
        return Scan, self.start, self.steps

    def kept(self, in_shape, out_shape):
        return ((0, 1),) if self.start else ((1, 1),)

    def work(self, in_shape, out_shape, reverse):
        each = 2.0 * out_shape[-1]
        return each * len(self.steps) if self.start and reverse else each

    def narrow(self, source, target, in_shape, out_shape):
        rows, start, n = self.rows, target.start, target.length
        return Scan(
            lambda: [tuple(r.narrow(0, start, n) for r in row) for row in rows()],
            self.u,
            self.steps,
            self.start,
        )

    def push(self, t, own):
        rows, u = self.rows(), self.u
        n, back = u.shape[1], u.t()
        out: list = [None] * len(rows)
        h, c = None, t if self.start else None
        for step in self.steps:
            f, a, e, s = rows[step]
            z = None if self.start else t[:, step]
            if h is not None:
                z = h @ back if z is None else z + h @ back
            if c is not None:
                c = f * c
            if z is None:
                h = e * c
            else:
                new = (z[..., : 3 * n] * a).unflatten(-1, (3, n)).sum(-2)
                c = new if c is None else c + new
                h = torch.addcmul(e * c, s, z[..., 3 * n :])
            out[step] = torch.cat([h, c], -1)
        return torch.stack(out, 1), True

    def pull(self, cot, own):
        rows, u = self.rows(), self.u
        n = u.shape[1]
        out: list = [None] * len(rows)
        z = carried = None
        for step in reversed(self.steps):
            f, a, e, s = rows[step]
            h, c = cot[:, step].split(n, -1)
            if z is not None:
                h = h + z @ u
                c = c + carried
            c = torch.addcmul(c, e, h)
            carried = f * c
            z = torch.cat([torch.cat([c, c, c], -1) * a, h * s], -1)
            out[step] = z
        return (carried if self.start else torch.stack(out, 1)), True


@rule("MkldnnRnnLayer")
def mkldnn_lstm(g):
    x, w, u, b1, b2, h0, c0 = g.src
    if g.saved("mode") != _LSTM or len(g.saved("batch_sizes")):
        return None
    t, n, hidden = g.shape
    if not t * n * hidden:
        return None
    cells = Cells(g)
    made = Once(cells.run)
    steps = cells.steps
    gates = (t, n, 4 * hidden)
    terms: list[int] = []
    if x is not None:
        terms.append(g.single(x, MatMul(cells.w.t(), "right"), gates))
    if w is not None:
        inputs = cells.x.reshape(t * n, -1)
        z = g.single(g.permute(w, (1, 0)), MatMul(inputs, "left"), (t * n, 4 * hidden))
        terms.append(g.view(z, gates))
    if u is not None:
        states = Once(lambda: made()[1].reshape(1, t * n, hidden))
        rows = g.view(g.permute(u, (1, 0)), (1, hidden, 4 * hidden))
        z = g.single(rows, Batched(states, "left"), (1, t * n, 4 * hidden))
        terms.append(g.view(z, gates))
    terms += [g.expand(b, gates) for b in (b1, b2) if b is not None]
    if h0 is not None:
        z = g.single(g.view(h0, (n, hidden)), MatMul(cells.u.t(), "right"), (n, 4 * hidden))
        z = g.view(z, (1, n, 4 * hidden))
        terms.append(g.single(z, Place(0, steps[0], 1, 1, t), gates))
    sources = []
    rows = Once(lambda: made()[0])
    if terms:
        z = g.add([(i, Identity()) for i in terms], gates)
        sources.append((z, Scan(rows, cells.u, steps)))
    if c0 is not None:
        sources.append((g.view(c0, (n, hidden)), Scan(rows, cells.u, steps, start=True)))
    states = g.emit(sources, (t, n, 2 * hidden))
    out = g.single(states, Slice(2, 0, hidden, 1, 2 * hidden), g.shape)
    last = g.single(states, Slice(0, steps[-1], 1, 1, t), (1, n, 2 * hidden))
    ends = [
        g.view(
            g.single(last, Slice(2, k * hidden, hidden, 1, 2 * hidden), (1, n, hidden)),
            tuple(g.meta[1 + k].shape),
        )
        for k in range(2)
    ]
    return out, *ends
