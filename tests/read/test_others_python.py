"""autograd.Functions of other people: called as the engine calls them, and nothing is remembered of their names."""

import pytest
import torch
from common import F64, MODES

import jactri
from jactri._src.base.cache import Cache
from jactri._src.read import vmapped


def rows(func, x):
    """The Jacobian by a backward pass for every row."""
    leaf = x.clone().requires_grad_()
    y = func(leaf)
    grads = [torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in y.flatten()]
    return torch.stack(grads).reshape(*y.shape, *x.shape)


class InPlace(torch.autograd.Function):
    """Its backward writes its result where the cotangent was."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return g.mul_(2 * ctx.saved_tensors[0])


class Viewed(torch.autograd.Function):
    """Its backward needs one memory layout, as around a kernel."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        assert type(g) is torch.Tensor and g.is_contiguous()
        (x,) = ctx.saved_tensors
        return (g.view(-1) * x.cos().view(-1)).view(x.shape)


class Sum(torch.autograd.Function):
    """Two outputs; the backward adds up in place what came for either."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2, x**3

    @staticmethod
    def backward(ctx, g, h):
        (x,) = ctx.saved_tensors
        return h.mul_(3 * x**2).add_(g.mul_(2 * x))


def both(x):
    return torch.cat(Sum.apply(x), -1)


FUNCS = {
    "in place": InPlace.apply,
    "viewed": Viewed.apply,
    "two outputs": both,
    "in place, then a transpose": lambda x: InPlace.apply(x).mT.reshape(x.shape[0], -1),
    "viewed, then a product": lambda x: Viewed.apply(x) @ torch.ones(x.shape[1], 2, dtype=F64),
    "in place, then in place": lambda x: InPlace.apply(InPlace.apply(x)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCS)
def test_a_backward_may_write_to_its_cotangent_or_view_it(name, mode):
    func = FUNCS[name]
    for shape in ((1, 1), (2, 3), (5, 4), (3, 7)):
        x = torch.rand(shape, dtype=F64) + 0.5
        want = rows(func, x)
        for _ in range(2):
            torch.testing.assert_close(jactri.jacobian(func, x, strategy=mode), want)


@pytest.mark.parametrize("name", ["in place", "viewed", "two outputs"])
def test_other_calls_through_such_a_backward(name):
    func, x = FUNCS[name], torch.rand(4, 3, dtype=F64) + 0.5
    J = rows(func, x)
    n = torch.arange(4)
    own = J[n, :, n]
    torch.testing.assert_close(jactri.jacobian(func, x, per_sample=True), own)
    torch.testing.assert_close(jactri.gradient(func, x), own)
    torch.testing.assert_close(jactri.jtj(func, x, per_sample=True), own.mT @ own)
    t = torch.rand(5, 4, 3, dtype=F64)
    want = torch.einsum("abcd,kcd->kab", J, t)
    torch.testing.assert_close(jactri.jvp(func, x, t)[1], want)
    c = torch.rand(5, *J.shape[:2], dtype=F64)
    kept = c.clone()
    torch.testing.assert_close(jactri.vjp(func, x, c)[1], torch.einsum("abcd,kab->kcd", J, c))
    assert torch.equal(c, kept)  # the caller's cotangents are not written to
    # a block that is one row repeated has no memory of its own
    same = c[:1].expand(5, *J.shape[:2])
    want = torch.einsum("abcd,kab->kcd", J, same)
    torch.testing.assert_close(jactri.vjp(func, x, same)[1], want)


class Pairwise(torch.autograd.Function):
    """One Function of two modes; torch's vmap is wrong in one of them."""

    @staticmethod
    def forward(ctx, x, kind):
        d = torch.cdist(x, x.flip(-2)) if kind == "distance" else x @ x.mT
        ctx.kind = kind
        ctx.save_for_backward(x, d)
        return d

    @staticmethod
    def backward(ctx, g):
        x, d = ctx.saved_tensors
        if ctx.kind != "distance":
            return (g + g.mT) @ x, None
        y, back = x.flip(-2), torch.ops.aten._cdist_backward
        right = back(g.mT.contiguous(), y, x, 2.0, d.mT.contiguous()).flip(-2)
        return back(g, x, y, 2.0, d) + right, None


def pairwise(kind):
    return lambda x: Pairwise.apply(x, kind)


@pytest.mark.parametrize("order", [("dot", "distance"), ("distance", "dot")])
def test_what_is_found_for_one_mode_of_a_function_holds_for_that_only(order, monkeypatch):
    x = torch.randn(2, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    for kind in (*order, *order):
        want = rows(pairwise(kind), x)
        found = jactri.jacobian(pairwise(kind), x, strategy="reverse-mode")
        torch.testing.assert_close(found, want)
    calls = []
    vmap = torch.vmap
    monkeypatch.setattr(torch, "vmap", lambda f: calls.append(f) or vmap(f))
    jactri.jacobian(pairwise("dot"), x, strategy="reverse-mode")
    assert calls


def doubled():
    """Another Function of the name of `Pairwise`."""

    class Pairwise(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x @ x.mT.detach()

        @staticmethod
        def backward(ctx, g):
            return g.new_ones(g.shape) @ g.new_ones(*g.shape[:-1], 3) * g.sum()

    return Pairwise.apply


def test_two_functions_of_one_name():
    x = torch.randn(2, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    funcs = [pairwise("dot"), pairwise("distance"), doubled()]
    for func in (*funcs, *reversed(funcs)):
        torch.testing.assert_close(jactri.jacobian(func, x, strategy="reverse-mode"), rows(func, x))


@pytest.mark.parametrize("order", [(1.0, 2.0), (2.0, 1.0)])
def test_what_is_found_for_an_op_holds_for_its_options_too(order, monkeypatch):
    """An op of torch's own is known by its options as well: a rule of vmap may be wrong for some only."""
    x = torch.randn(2, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))

    def distances(p):
        return lambda v: torch.special.entr(torch.renorm(v.exp(), p, 0, 1.0))

    monkeypatch.setattr(vmapped, "_verified", Cache())
    for p in order:
        torch.testing.assert_close(
            jactri.jacobian(distances(p), x, strategy="reverse-mode"), rows(distances(p), x)
        )
    assert len({key[0][0][0][1] for key in vmapped._verified}) == 2


def test_scripted_functions_share_a_name():
    @torch.jit.script
    def one(x):
        return torch.tanh(x) * torch.sin(x)

    @torch.jit.script
    def other(x):
        return torch.sigmoid(x) * torch.cos(x).sum(0, keepdim=True)

    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    for func in (one, other):
        for _ in range(3):  # scripted code is compiled when it has run twice
            func(x.clone().requires_grad_())
    for mode in MODES:
        for func in (one, other, one):
            torch.testing.assert_close(jactri.jacobian(func, x, strategy=mode), rows(func, x))


def test_infinite_rows_are_not_what_vmap_is_judged_by():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sqrt()

        @staticmethod
        def backward(ctx, g):
            return g / (2 * ctx.saved_tensors[0].sqrt())

    x = torch.tensor([0.0, 1.0, 4.0, 0.0], dtype=F64)
    found = jactri.jacobian(Root.apply, x, strategy="reverse-mode")
    torch.testing.assert_close(found, rows(Root.apply, x), equal_nan=True)
