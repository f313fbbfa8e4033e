"""The Jacobian as an operator: against dense Jacobians in float64, and what it must not do again."""

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from common import F64, seeded
from linear_cases import CASES, Recurrent, close, given, matrix, randn, strided, truth
from torch.autograd.functional import jacobian as truth_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import jactri
from jactri._src.calls import vectors
from jactri._src.plan import planning


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_matrix(name):
    func, xs, inputs, op = given(name)
    want = matrix(func, inputs, xs)
    m, n = op.shape
    assert (m, n) == want.shape and op.T.shape == (n, m)
    v, u = randn(n, 4), randn(m, 3)
    for dtype in (F64, torch.float32):
        close(op.matmat(v.to(dtype)), want @ v.to(dtype).double())
    close(op.matvec(v[:, 0]), want @ v[:, 0])
    close(op.T.matmat(strided(u)), want.T @ u)
    close(op.T.matvec(u[:, 0]), want.T @ u[:, 0])
    assert op.matmat(v[:, :0]).shape == (m, 0)
    along, back = op.matmat(v[:, :3]), op.T.matmat(u)
    close((u * along).sum(0), (back * v[:, :3]).sum(0))  # <u, J v> = <J' u, v>


@pytest.mark.parametrize("name", ["mlp", "no samples", "several", "a number", "of a number"])
def test_vectors_in_their_shapes(name):
    """Columns last on the right, rows first on the left, one vector on either side."""
    _, xs, inputs, op = given(name)
    tupled = isinstance(inputs, tuple)
    ys = op.output if isinstance(op.output, tuple) else (op.output,)
    m, n = op.shape

    def nested(flat, ends, alone):  # (K, n) by end
        parts = flat.split([t.numel() for t in ends], 1)
        parts = tuple(p.reshape(len(p), *t.shape) for p, t in zip(parts, ends, strict=True))
        return parts[0] if alone else parts

    def flat(made):
        return torch.cat(
            [
                p.reshape(len(p), p[0].numel())
                for p in (made if isinstance(made, tuple) else (made,))
            ],
            1,
        )

    def last(block):
        return tuple(b.movedim(0, -1) for b in block) if isinstance(block, tuple) else block.movedim(0, -1)  # fmt: skip

    def first(block):
        return tuple(b.movedim(-1, 0) for b in block) if isinstance(block, tuple) else block.movedim(-1, 0)  # fmt: skip

    out = not isinstance(op.output, tuple)
    for k in (1, 2, 3):  # 3 is the size of an axis
        v, u = randn(k, n), randn(k, m)
        ts, cs = nested(v, xs, not tupled), nested(u, ys, out)
        close(flat(first(op @ last(ts))), op.matmat(v.T).T)
        close(flat(first(op.T @ last(cs))), op.T.matmat(u.T).T)
        close(flat(cs @ op), op.T.matmat(u.T).T)
        close(flat(ts @ op.T), op.matmat(v.T).T)
    single = op @ (tuple(t[0] for t in ts) if tupled else ts[0])
    singles = single if isinstance(single, tuple) else (single,)
    assert [s.shape for s in singles] == [y.shape for y in ys]
    close(torch.cat([s.reshape(-1) for s in singles]), op.matvec(v[0]))


@pytest.mark.parametrize("name", ["mlp", "no samples", "several", "samples mix", "a Function"])
def test_what_is_formed(name):
    func, xs, inputs, op = given(name)
    close(op.dense(), truth(func, inputs))
    close(op.gram(), jactri.jtj(func, inputs))
    close(op.T.gram(), jactri.jjt(func, inputs))
    turned, made = op.T.dense(), op.dense()
    if name == "several":
        for j, y in enumerate(op.output):
            for i, x in enumerate(xs):
                want = made[j][i].reshape(y.numel(), x.numel()).T.reshape(*x.shape, *y.shape)
                close(turned[i][j], want)
    else:
        x, y = xs[0], op.output
        close(turned, made.reshape(y.numel(), x.numel()).T.reshape(*x.shape, *y.shape))
    close(op.norm(), matrix(func, inputs, xs).norm())


def test_samples():
    net, x = seeded(3, 7, 2), randn(5, 3)
    op = jactri.linearize(net, x)
    J = jactri.jacobian(net, x, per_sample=True)
    close(op.dense(per_sample=True), J)
    close(op.T.dense(per_sample=True), J.mT)
    weight = randn(5, 2, 2)
    close(op.gram(weight, per_sample=True), J.mT @ weight @ J)
    close(op.T.gram(per_sample=True), J @ J.mT)
    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.linearize(Recurrent(), x).dense(per_sample=True)


def test_sparse_and_diagonal():
    x = randn(2, 5)

    def stencil(x):
        return (x.roll(1, 1) * x).sin()

    op, want = jactri.linearize(stencil, x), truth_of(stencil, x)
    made = op.sparse()
    assert made.layout is torch.sparse_coo and made._nnz() < want.numel()
    close(made.to_dense(), want)
    close(op.T.sparse().to_dense(), want.permute(2, 3, 0, 1))
    for layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr):
        size = {"blocksize": (2, 5)} if layout is torch.sparse_bsr else {}
        one, turned = op.sparse(layout, **size), op.T.sparse(layout, **size)
        assert one.layout is turned.layout is layout
        close(one.to_dense(), want.reshape(10, 10))
        close(turned.to_dense(), want.reshape(10, 10).T)
        if size:
            assert one.values().shape[1:] == turned.values().shape[1:] == (2, 5)
    close(op.sparse("banded").to_dense(), want)
    close(op.diagonal(), want.reshape(10, 10).diagonal().reshape(2, 5))
    close(op.T.diagonal(), op.diagonal())
    with pytest.raises(ValueError, match="not transposed 'banded', got 'banded'"):
        op.T.sparse("banded")
    with pytest.raises(ValueError, match=r"layout must be torch\.sparse_coo.*got torch\.strided"):
        op.sparse(torch.strided)
    with pytest.raises(TypeError, match=r"tuple of two integers.*got 5"):
        op.T.sparse(torch.sparse_bsr, 5)
    with pytest.raises(ValueError, match="every entry of the Jacobian"):
        jactri.linearize(lambda x: x.softmax(0), randn(3)).sparse()
    with pytest.raises(RuntimeError, match="output of the shape of x"):
        jactri.linearize(seeded(3, 2), randn(5, 3)).diagonal()
    with pytest.raises(TypeError, match="needs one input, got a tuple of 2"):
        given("several")[3].diagonal()


# -- once -------------------------------------------------------------------------------------------


def test_the_function_runs_once_and_its_graph_is_read_and_planned_once(monkeypatch):
    calls = []
    net = seeded(4, 6, 4)

    def func(x):
        calls.append(x)
        return net(x)

    op = jactri.linearize(func, randn(3, 4))
    v = randn(3, 4, 2)
    first = op @ v, op.T @ v

    def refuse(*args, **options):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(vectors, "read", refuse)
        patch.setattr(planning, "plan_given", refuse)
        assert all(map(torch.equal, first, (op @ v, op.T @ v)))
    (
        op.dense(),
        op.gram(),
        op.T.gram(),
        op.diagonal(),
        op.norm(),
        op.norm(2),
        op.svd(2),
        op.to_scipy() @ np.ones(12),
    )
    assert len(calls) == 1


def test_derivatives_are_made_once():
    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func.name())
            return func(*args, **(kwargs or {}))

    op = jactri.linearize(seeded(3, 5, 4), randn(2, 3))
    for k, made in enumerate((1, 0, 0)):
        ops = []
        with Ops():
            op @ randn(2, 3) if k < 2 else op.T @ randn(2, 4)
        assert ops.count("aten::tanh_backward") == made and "aten::mm" in ops


def test_the_graph_lives_as_long_as_the_operator():
    kept = []

    class Saved:
        def __init__(self, x):
            self.x = x
            kept.append(weakref.ref(self))

    def func(x):
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.x):
            return x.sin() @ x.T

    gc.collect()
    gc.disable()
    try:
        op = jactri.linearize(func, randn(2, 3))
        op @ randn(2, 3), op.T @ randn(2, 2), op.norm()
        turned = op.T
        del op
        assert all(k() is not None for k in kept) and kept
        del turned
        assert all(k() is None for k in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["weight", "bias", "input", "output", "constant"])
def test_what_was_modified_is_refused(what):
    net, x, constant = seeded(3, 5, 3), randn(2, 3), randn(3)
    op = jactri.linearize(lambda x: net(x) * constant, x)
    v = randn(2, 3)
    op @ v
    with torch.no_grad():
        {"weight": net[0].weight, "bias": net[2].bias, "input": x, "output": op.output, "constant": constant}[
            what
        ].add_(1)  # fmt: skip
    for call in (
        lambda: op @ v, lambda: op.T @ v, lambda: v @ op, op.dense, op.sparse, op.gram, op.diagonal, op.norm,
        lambda: op.norm(2), lambda: op.to_scipy() @ np.ones(6),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="was modified in place after linearize ran"):
            call()


def test_checkpointed_segments():
    """What they compute anew is nobody else's; their weights are watched."""
    net, x, v = seeded(3, 5, 3), randn(2, 3), randn(2, 3)
    op = jactri.linearize(lambda x: checkpoint(net, x, use_reentrant=False) * 2, x)
    held = [name for name, *_ in vars(op)["_point"].seen]
    assert not any("Tanh" in name or "Addmm" in name for name in held)
    for _ in range(2):
        close(op @ v, 2 * jactri.jvp(net, x, v)[1])
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="was modified in place"):
        op @ v


# -- modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_every_mode(mode):
    net, x, v = seeded(3, 5, 2), randn(4, 3).requires_grad_(), randn(4, 3)
    want = jactri.jvp(net, x, v)[1]
    with mode():
        op = jactri.linearize(net, x)
        made = op @ v
        assert not made.requires_grad and not op.output.requires_grad
        close(made, want)
        close(op.norm(2), op.svd(1)[1][0])
    close(op @ v, want)  # outside of it, too
    assert x.grad is None and all(p.grad is None for p in net.parameters())


def test_a_constant_of_inference_mode():
    """It has no version."""
    with torch.inference_mode():
        constant = torch.ones(2, dtype=F64)
    x, v = randn(4, 3), randn(4, 3)
    op = jactri.linearize(lambda x: (x.sin(), constant), x)
    close(op @ v, (x.cos() * v, torch.zeros(2, dtype=F64)))
    close(op.T @ (v, constant.clone()), x.cos() * v)
    assert jactri.linearize(lambda x: constant, x).norm() == 0


def test_within_autocast():
    """Products are of the dtypes that the graph has, whatever is in force when they are made."""
    net, x = seeded(20, 30, 25, dtype=torch.float32), randn(2, 20).float()
    op = jactri.linearize(net, x)
    with torch.autocast(x.device.type, torch.bfloat16):
        made = op @ x, op.norm(), op.norm(2), op.svd(2)[1], op.gram()
        cast = jactri.linearize(net, x)
    for found, want in zip(
        made, (op @ x, op.norm(), op.norm(2), op.svd(2)[1], op.gram()), strict=True
    ):
        assert found.dtype == torch.float32
        close(found.double(), want.double())
    J = jactri.jacobian(net, x).double().reshape(50, 40)
    torch.testing.assert_close(
        cast.norm(2).double(), torch.linalg.matrix_norm(J, 2), rtol=0.05, atol=0
    )


def test_in_a_function_that_is_compiled():
    net, x, v = seeded(3, 5, 3), randn(2, 3), randn(2, 3)

    def both(x):
        op = jactri.linearize(net, x)
        return op @ v + op.T @ v

    step = jactri.compile(both, x, of=None, engine="fx")
    other = randn(1, 3).expand(2, 3)
    for at in (x, other):
        close(step(at), both(at))


def test_made_outside_of_a_function_that_is_compiled():
    """Its graph would have the weights of later, and derivatives of now: it runs as the ordinary call."""
    net, x, v = seeded(3, 5, 3), randn(2, 3), randn(2, 3)
    op = jactri.linearize(net, x)
    step = jactri.compile(lambda v: op @ v, v, of=None, engine="fx")
    assert "made outside of a function that is compiled" in step.reason
    close(step(v), op @ v)
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="was modified in place"):
        step(v)


def test_a_product_that_is_differentiated_is_told_to_be_a_constant():
    op = jactri.linearize(seeded(3, 5, 3), randn(2, 3))
    for func in (lambda v: op @ v, lambda v: op.T.matvec(v.flatten()), lambda v: v @ op):
        with pytest.warns(UserWarning, match="with an operator .* is a constant"):
            jactri.jacobian(func, randn(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jactri.jacobian(lambda v: v * (op @ v.detach()), randn(2, 3))


def test_in_a_modules_parameters():
    net, x = seeded(3, 5, 2), randn(4, 3)
    names, weights = zip(*net.named_parameters(), strict=True)

    def func(*values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))

    op = jactri.linearize(func, weights)
    v, u = tuple(torch.ones_like(w) for w in weights), randn(4, 2)
    close(op @ v, torch.autograd.functional.jvp(func, weights, v)[1])
    close(op.T @ u, torch.autograd.grad(net(x), weights, u))
    with torch.no_grad():
        weights[1].add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        op @ v


def test_in_a_backward_pass():
    """A pass that asks for some gradients makes nodes leave out the others."""
    net, x = seeded(3, 5, 3), randn(2, 3)
    op = jactri.linearize(net, x)

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return op @ v

        @staticmethod
        def backward(ctx, g):
            return op.T @ g

    v = randn(2, 3).requires_grad_()
    (made,) = torch.autograd.grad(Times.apply(v).square().sum(), v)
    close(made, op.T @ (2 * (op @ v.detach())))


def test_under_overrides():
    def func(x):
        return x.softmax(1) * x

    x, v = randn(2, 3), randn(2, 3)
    with jactri.overrides({"softmax": jactri.zero}):
        op = jactri.linearize(func, x)
        inside = op @ v
    close(inside, x.softmax(1) * v)
    for made in (op @ v, (op.dense() * v).sum((2, 3))):  # outside of the block
        close(made, inside)
    plain = jactri.linearize(func, x)
    with (
        jactri.overrides({"softmax": jactri.zero}),
        pytest.raises(RuntimeError, match="made outside of the block"),
    ):
        plain @ v


def test_hooks_that_change_gradients():
    def func(x):
        y = x.sin()
        y.register_hook(lambda g: 2 * g)
        return y * x

    x, v = randn(2, 3), randn(2, 3)
    with pytest.warns(UserWarning, match="a hook on gradients"):
        op = jactri.linearize(func, x)
    close(op @ v, 2 * x.cos() * x * v + x.sin() * v)
    close(op.T @ v, op @ v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    net, x, v = seeded(3, 5, 2), randn(4, 3), randn(4, 3)
    J = truth_of(net, x).reshape(8, 12)
    op = jactri.linearize(net.to(dtype), x.to(dtype))
    tol = 8 * torch.finfo(dtype).eps
    assert op.dtype == dtype
    made = {
        "product": (op @ v.to(dtype), (J @ v.flatten()).reshape(4, 2)),
        "cast": (op @ v, (J @ v.flatten()).reshape(4, 2)),
        "norm": (op.norm(), J.norm()),
        "largest": (op.norm(2), torch.linalg.matrix_norm(J, 2)),
    }
    for name, (found, want) in made.items():
        assert found.dtype == dtype, name
        torch.testing.assert_close(found.double(), want, rtol=tol, atol=tol, msg=name)


def test_limits():
    net, x, v = seeded(6, 20, 6), randn(8, 6), randn(8, 6, 9)
    want = jactri.linearize(net, x)
    for options in ({"chunk_size": 2}, {"memory_limit": 40_000}, {"backend": "torch"}):
        op = jactri.linearize(net, x, **options)
        close(op @ v, want @ v)
        close(op.T @ v, want.T @ v)
        close(op.norm(), want.norm())
        if "memory_limit" not in options:  # of a basis: see test_linearize_sizes.py
            close(op.svd(2)[1], want.svd(2)[1])
    few = jactri.linearize(Recurrent(), randn(5, 4), chunk_size=3)
    close(few.norm(), truth_of(Recurrent(), randn(5, 4)).norm())
    small = jactri.linearize(net, x, memory_limit=100)
    for call in (lambda: small @ v, small.dense, small.gram, lambda: small.svd(1)):
        with pytest.raises(ValueError, match="memory_limit"):
            call()
