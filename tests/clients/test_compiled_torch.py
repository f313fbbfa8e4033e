"""torch's own transformers under `jactri.compile`: Jacobians, their gradients, and a loss with both."""

import pytest
import torch
from tolerances import assert_close
from torch import nn

import jactri

F32, F64 = torch.float32, torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


class Whole(nn.Module):
    """Encoder and decoder, the target being the source, under a causal mask."""

    is_causal: bool | None = True

    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(3))

    def forward(self, x):
        return self.net(x, x.flip(1), tgt_mask=self.mask, tgt_is_causal=self.is_causal)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


NETS = {
    "encoder": encoder,
    "encoder, norm first": lambda: encoder(norm_first=True, activation="gelu"),
    "decoder": Whole,
}


def draw(dtype):
    return torch.randn(2, 3, 8, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "train") for name in NETS), ("encoder", "eval")]
)
def test_jacobians_and_gradients(name, mode):
    torch.manual_seed(0)
    net = NETS[name]().to(F64).train(mode == "train")
    for options in ({"per_sample": True}, {"per_sample": True, "create_graph": True}):
        step = jactri.compile(net, draw(F64), engine="fx", **options)
        assert step.reason is None
        x = draw(F64)
        got, want = step(x), jactri.jacobian(net, x, **options)
        assert_close(got, want, F64, length=60)
    weights = list(net.parameters())
    ours, theirs = (
        torch.autograd.grad(J.square().mean(), weights, allow_unused=True) for J in (got, want)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, F64, length=200, factor=16.0)


def test_a_mask_that_torch_looks_at():
    """Whether it is causal, where nobody says so: a value is read."""
    net = Whole().to(F64)
    net.is_causal = None
    step = jactri.compile(net, draw(F64), engine="fx", per_sample=True)
    x = draw(F64)
    assert_close(step(x), jactri.jacobian(net, x, per_sample=True), F64, length=60)
    assert "a value is read" in step.reason


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


def test_a_penalty_by_the_compiler():
    """A loss with a Jacobian: forward pass, sweep, loss and backward are two graphs."""
    torch.manual_seed(0)
    net = Attention()

    def loss(x):
        J = jactri.jacobian(net, x, per_sample=True, create_graph=True)
        return net(x).square().mean() + J.square().mean()

    step = jactri.compile(loss, draw(F32), of=None)
    assert step.reason is None
    assert [p.engine for p in step.explain().parts] == ["inductor", "inductor"]
    x, weights = draw(F32), list(net.parameters())
    ours = torch.autograd.grad(step(x), weights)
    for a, b in zip(ours, torch.autograd.grad(loss(x), weights), strict=True):
        assert_close(a, b, F32, length=200, factor=16.0)
