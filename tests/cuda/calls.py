"""Networks of many kinds, and the public calls, for what is asked of every one of them."""

import torch
from torch import nn
from torch.nn import functional as F

import jactri

N, WIDTH = 4, 8


class Of(nn.Module):
    """A function of the input, between two Linear layers, so that there are parameters."""

    def __init__(self, f, width=WIDTH, **layers):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(width, WIDTH)
        self.f = f
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.last(self.f(self, self.first(x)))


def _attention(m, h):
    q = k = v = h.unflatten(1, (4, 2))
    return F.scaled_dot_product_attention(q, k, v).flatten(1)


def _masked_attention(m, h):
    q = h.unflatten(1, (4, 2))
    scores = (q @ q.mT).masked_fill(torch.ones(4, 4, device=h.device).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ q).flatten(1)


def _experts(m, h):
    """Rows go where an index sends them, and come back."""
    order = m.router(h).argmax(1).argsort()
    y = torch.tanh(h[order])
    return torch.zeros_like(h).index_add(0, order, y)


def _written(m, h):
    y = torch.zeros(len(h), 2 * WIDTH, device=h.device)
    y[:, :WIDTH] = h.tanh()
    return y[:, 2 : 2 + WIDTH]


def _recurrent(m, h):
    return m.cell(h, m.cell(h))


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


NETS = {
    "mlp": lambda: Of(lambda m, h: h.tanh()),
    "relu": lambda: Of(lambda m, h: h.relu()),
    "root behind relu": lambda: Of(lambda m, h: h.relu().sqrt()),
    "divided": lambda: Of(lambda m, h: h / (h.square().sum(1, keepdim=True) + 1).sqrt()),
    "scaled": lambda: Of(lambda m, h: (h * m.by).tanh(), by=nn.Parameter(torch.ones(WIDTH))),
    "power": lambda: Of(lambda m, h: h.pow(3) + h**2.5),
    "layer norm": lambda: Of(lambda m, h: m.norm(h), norm=nn.LayerNorm(WIDTH)),
    "batch norm": lambda: Of(lambda m, h: m.norm(h), norm=nn.BatchNorm1d(WIDTH)),
    "group norm": lambda: Of(lambda m, h: m.norm(h), norm=nn.GroupNorm(2, WIDTH)),
    "softmax": lambda: Of(lambda m, h: h.softmax(1).log()),
    "attention": lambda: Of(_attention),
    "masked attention": lambda: Of(_masked_attention),
    "where": lambda: Of(lambda m, h: torch.where(h > 0, h.exp(), h.sin())),
    "masked": lambda: Of(lambda m, h: h.masked_fill(h < 0, 0.5) * (h > -1)),
    "clamp": lambda: Of(lambda m, h: h.clamp(-1, 1) + h.abs()),
    "maximum": lambda: Of(lambda m, h: torch.maximum(h, m.other(h)), other=nn.Linear(WIDTH, WIDTH)),
    "max": lambda: Of(lambda m, h: h - h.max(1, keepdim=True).values),
    "sorted": lambda: Of(lambda m, h: h.sort(1).values.cumsum(1)),
    "top": lambda: Of(lambda m, h: h.topk(3, 1).values, 3),
    "gathered": lambda: Of(lambda m, h: h.gather(1, h.argsort(1))),
    "picked": lambda: Of(lambda m, h: h[:, [3, 1, 2]], 3),
    "indexed": lambda: Of(lambda m, h: h.index_select(1, torch.tensor([1, 3], device=h.device)), 2),
    "embedding": lambda: Of(lambda m, h: h + m.table(h.argmax(1)), table=nn.Embedding(WIDTH, WIDTH)),
    "experts": lambda: Of(_experts, router=nn.Linear(WIDTH, 3)),
    "written": lambda: Of(_written),
    "padded": lambda: Of(lambda m, h: F.pad(h, (1, 1)).sqrt(), WIDTH + 2),
    "joined": lambda: Of(lambda m, h: torch.cat([h.tanh(), h.sin()], 1), 2 * WIDTH),
    "convolution": lambda: Of(
        lambda m, h: m.conv(h.unflatten(1, (2, 4))).tanh().flatten(1), conv=nn.Conv1d(2, 2, 3, padding=1)
    ),
    "max pool": lambda: Of(lambda m, h: F.max_pool1d(h.unsqueeze(1), 2).flatten(1), 4),
    "mean pool": lambda: Of(lambda m, h: F.avg_pool1d(h.unsqueeze(1), 2).flatten(1), 4),
    "resized": lambda: Of(lambda m, h: F.interpolate(h.unsqueeze(1), scale_factor=2).flatten(1), 2 * WIDTH),
    "product": lambda: Of(lambda m, h: h.prod(1, keepdim=True) + h),
    "norm": lambda: Of(lambda m, h: F.normalize(h, dim=1)),
    "distance": lambda: Of(lambda m, h: torch.cdist(h.unflatten(1, (4, 2)), h.unflatten(1, (4, 2))).flatten(1), 16),
    "solved": lambda: Of(
        lambda m, h: torch.linalg.solve(m.matrix, h.unsqueeze(2)).squeeze(2),
        matrix=nn.Parameter(torch.eye(WIDTH)),
    ),
    "recurrent": lambda: Of(_recurrent, cell=nn.RNNCell(WIDTH, WIDTH)),
    "in a loop": lambda: Of(lambda m, h: torch.stack([r.tanh() * r.sum() for r in h])),
    "custom": lambda: Of(lambda m, h: _Squared.apply(h)),
    "dropout": lambda: Of(lambda m, h: F.dropout(h, 0.5, False).relu()),
    "complex": lambda: Of(lambda m, h: torch.fft.rfft(h).abs(), 5),
    "in place": lambda: Of(lambda m, h: h.mul(2).tanh_()),
}  # fmt: skip


def _scalar(net):
    return lambda x: net(x).sum(1)


def _ones(net, x):
    return torch.ones(N, WIDTH, device=x.device)


CALLS = {
    "jacobian": lambda net, x: jactri.jacobian(net, x),
    "jacobian, per_sample": lambda net, x: jactri.jacobian(net, x, per_sample=True),
    "jacobian, forward": lambda net, x: jactri.jacobian(net, x, per_sample=True, strategy="forward-mode"),
    "jacobian, reverse": lambda net, x: jactri.jacobian(net, x, strategy="reverse-mode"),
    "jacobian, create_graph": lambda net, x: jactri.jacobian(net, x, create_graph=True),
    "jacobian, limited": lambda net, x: jactri.jacobian(net, x, memory_limit="1MB"),
    "jacobian, sparse": lambda net, x: jactri.jacobian(net, x, layout=torch.sparse_coo),
    "jacobian, banded": lambda net, x: jactri.jacobian(net, x, layout="banded"),
    "gradient": lambda net, x: jactri.gradient(_scalar(net), x),
    "diagonal": lambda net, x: jactri.diagonal(net, x),
    "divergence": lambda net, x: jactri.divergence(net, x),
    "laplacian": lambda net, x: jactri.laplacian(_scalar(net), x),
    "jvp": lambda net, x: jactri.jvp(net, x, torch.ones_like(x)),
    "vjp": lambda net, x: jactri.vjp(net, x, _ones(net, x)),
    "jtj": lambda net, x: jactri.jtj(net, x, per_sample=True),
    "jjt": lambda net, x: jactri.jjt(net, x, per_sample=True),
    "parameter_jacobian": lambda net, x: jactri.parameter_jacobian(net, x).dense(),
    "ntk": lambda net, x: jactri.empirical_ntk(net, x),
    "ggn": lambda net, x: jactri.ggn(net, x, _ones(net, x)).diagonal(),
    "func.jacrev": lambda net, x: jactri.func.jacrev(net)(x),
    "func.jacfwd": lambda net, x: jactri.func.jacfwd(net)(x),
    "func.hessian": lambda net, x: jactri.func.hessian(lambda v: net(v).sum())(x),
}  # fmt: skip
