"""jactri.taps and jactri.layer_jacobian amid other things: checkpoints, hooks, threads, overrides, two stacks."""

import time

import pytest
import torch
from common import F64, in_threads
from layer_cases import TOKENS, WIDTH, ids, tiny
from tolerances import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

import jactri

SOURCES = ["layers.0", "layers.1"]
LEFT = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])


def weight(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(3))


def test_statistics_under_hooks_and_checkpoints():
    """To which the sweep itself runs the module again, and hooks run autograd on what was saved."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)).to(F64)
    net[2].register_full_backward_hook(lambda module, given, gave: None)
    before, x = [b.clone() for b in net.buffers()], torch.randn(4, 3, dtype=F64)
    saved = nn.Sequential(net[0], Saved(net[1]), net[3])
    x0 = net[0](x).detach().requires_grad_()
    J = torch.autograd.functional.jacobian(lambda h: net[3](net[1](h).tanh()), x0)
    plain = torch.autograd.functional.jacobian(lambda h: net[3](net[1](h)), x0)
    for b, old in zip(net.buffers(), before, strict=True):
        b.copy_(old)
    got = jactri.layer_jacobian(net, x, "0", "3", reduce=(None, None))["0"]
    assert_close(got, J, F64, length=20)
    got = jactri.layer_jacobian(saved, x, "0", "2", reduce=(None, None))["0"]
    assert_close(got, plain, F64, length=20)
    assert all(map(torch.equal, before, net.buffers()))


class Saved(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_other_threads_run_the_model_untouched():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).to(F64), torch.randn(2, 3, dtype=F64)
    model.requires_grad_(False)
    with jactri.taps(model, ["0", "1"]) as taps:
        in_threads(1, lambda _: model(x))
        model(x)
    assert list(taps) == ["0", "1"]
    assert taps.function("0", "1")(taps["0"]).shape == x.shape


def test_threads_share_a_model():
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.01)
            return x.sin()

    net = nn.Sequential(nn.Linear(3, 3), Slow(), nn.Linear(3, 3)).to(F64)
    x = torch.randn(2, 4, 3, dtype=F64)
    want = jactri.layer_jacobian(net, x, "0", "2")["0"]
    found = {}

    def work(k):
        found[k] = jactri.layer_jacobian(net, x, "0", "2")["0"]

    in_threads(4, work)
    assert len(found) == 4 and all(torch.equal(got, want) for got in found.values())


def test_copies_of_taps_are_no_ops_of_the_caller():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).to(F64), torch.randn(2, 3, dtype=F64)
    with jactri.taps(model, ["0", "1"]) as taps:
        model(x)
    with (
        jactri.overrides({"clone": jactri.zero}),
        pytest.raises(ValueError, match="'clone' is no op of this call"),
    ):
        jactri.jacobian_of(taps["1"], taps["0"])
    f = taps.function("0", "1")
    with jactri.overrides({"mul": 3.0}):
        got = jactri.diagonal(lambda x: f(x * 2), x)
    assert_close(got, 3 / (2 * x).cosh() ** 2, F64, length=4)


@pytest.mark.parametrize("key", ["softmax", "add", "expand", "bmm"])
@pytest.mark.parametrize("value", [jactri.zero, jactri.uniform])
def test_overrides_are_not_for_the_reductions(key, value):
    model, given, mask = tiny(), ids(), LEFT.double()
    with jactri.taps(model, ["layers.0", "norm"]) as taps:
        model(given)
    w = weight(TOKENS, 2)
    with jactri.overrides({key: value}):
        J = jactri.jacobian_of(taps["norm"], taps["layers.0"])
        options = {"source": SOURCES, "target": "norm", "mask": LEFT}
        lens = jactri.layer_jacobian(model, given, **options)["layers.0"]
        weighted = jactri.layer_jacobian(model, given, **options, reduce=(w, w))["layers.0"]
    assert_close(lens, torch.einsum("nxdmye,nx,my->de", J, mask, mask) / mask.sum(), F64, length=50)
    want = torch.einsum("nxdmye,nx,xa,my,yb->adbe", J, mask, w, mask, w)
    assert_close(weighted, want, F64, length=50)
    with (
        jactri.overrides({"mul": value}),  # of a mean
        pytest.raises(ValueError, match="'mul' is no op of this call"),
    ):
        jactri.layer_jacobian(model, given, **options)


def test_a_source_after_its_target_is_named_by_its_run():
    layer = nn.Linear(WIDTH, WIDTH)
    net, x = nn.Sequential(layer, nn.Tanh(), layer).to(F64), torch.zeros(1, 2, WIDTH, dtype=F64)
    with pytest.raises(RuntimeError, match="source '0#1' comes after its target '0#0'"):
        jactri.layer_jacobian(net, x, "0", "0#0")


def test_no_samples():
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).to(F64)
    x = torch.zeros(0, TOKENS, WIDTH, dtype=F64)
    got = jactri.layer_jacobian(net, x, "0", "1", reduce=(0, "sum"))["0"]
    assert got.shape == (WIDTH, WIDTH) and not got.any()
    with pytest.raises(IndexError, match=r"no token 0 in '0' of shape \(0, 5, 6\), of no samples"):
        jactri.layer_jacobian(net, x, "0", "1", reduce=("sum", 0))


class Sides(nn.Module):
    """An encoder, whose mask is named as that of models with one stack, and a decoder of the labels."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.encoder, self.decoder = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, labels=None):
        seen = self.encoder(self.embed(input_ids)) * attention_mask[..., None]
        own = self.embed(labels if decoder_input_ids is None else decoder_input_ids)
        return self.decoder(own).sin() * seen.mean(1, keepdim=True)


def test_a_decoder_of_labels_does_not_have_the_mask_of_its_encoder():
    torch.manual_seed(0)
    model = Sides().to(F64)
    given = {"input_ids": ids(), "attention_mask": LEFT, "labels": ids()}
    got = jactri.layer_jacobian(model, given, "decoder", mask={"": None})
    want = jactri.layer_jacobian(model, given, "decoder", mask=None)
    assert_close(got["decoder"], want["decoder"], F64, length=50)
    with pytest.raises(RuntimeError, match="tells not which it is of"):
        jactri.layer_jacobian(model, given, "decoder")
