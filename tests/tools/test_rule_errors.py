"""What `jactri.rule` says of what is wrong."""

import pytest
import torch
from test_rule import (
    Circulant,
    Two,
    close,
    draw,
    laplacian,
    only_rules,  # noqa: F401
    swish_class,
    swish_rule,
    swish_slope,
    turned,
)
from torch.autograd import Function

import jactri


def raises(read, error, words, f=None, x=None, target=None, **options):
    target = swish_class() if target is None else target
    with jactri.rule(target, **options)(read), pytest.raises(error, match=words):
        jactri.jacobian(target.apply if f is None else f, draw(4, 3) if x is None else x)


def test_wrong_numbers():
    raises(
        lambda node: node.elementwise(2.0),
        jactri.JacobianMismatch,
        "pull to argument 0 is not the node's own",
    )
    raises(lambda node: node.zero(), jactri.JacobianMismatch, "argument 0")
    raises(lambda node: node.identity(), jactri.JacobianMismatch, "argument 0")


def test_the_second_use_is_of_other_shapes():
    """What is right for one shape is not taken to be so for another."""
    Swish = swish_class()
    with jactri.rule(Swish)(
        lambda node: node.elementwise(
            swish_slope(node.saved_tensors[0]) if len(node.inputs[0].shape) == 1 else 1.0
        )
    ):
        jactri.jacobian(Swish.apply, draw(3))
        with pytest.raises(jactri.JacobianMismatch):
            jactri.jacobian(Swish.apply, draw(2, 3))


def test_wrong_push_and_kept():
    def circulant(push=False, kept=(0,), turn=turned):
        def read(node):
            (k,) = node.saved_tensors
            return node.linear(
                lambda t: turn(t, k, push), lambda c: turn(c, k, True), kept=kept
            ), None

        return read

    def f(x):
        return Circulant.apply(x, kernel)

    kernel = draw(3)
    options = {"f": f, "target": Circulant}
    raises(circulant(push=True), jactri.JacobianMismatch, "push is not the transpose", **options)
    raises(
        circulant(kept=(0, 1)), jactri.JacobianMismatch, r"axes \(1, 1\) are not kept", **options
    )
    raises(circulant(kept=(2,)), ValueError, "axis 2", **options)

    class Carry(Function):
        """Mixes the first two samples only."""

        @staticmethod
        def forward(ctx, x):
            return carried(x, 1, 0)

        @staticmethod
        def backward(ctx, grad):
            return carried(grad, 0, 1)

    def carried(t, to, source):
        t = t.clone()
        t[..., to, :] += t[..., source, :]
        return t

    raises(
        lambda node: node.linear(
            lambda t: carried(t, 1, 0), lambda c: carried(c, 0, 1), kept=[0, 1]
        ),
        jactri.JacobianMismatch,
        r"axes \(0, 0\) are not kept",
        target=Carry,
    )
    raises(circulant(kept=((0, 0), (0, 0))), ValueError, "twice", **options)
    raises(
        circulant(turn=lambda t, k, back: t.sum(0)),
        ValueError,
        r"pull of a block \(1, 4, 3\) must return",
        **options,
    )


def test_wrong_shapes_and_types():
    raises(
        lambda node: node.elementwise(draw(5)),
        ValueError,
        r"slope must broadcast to the output \(4, 3\)",
    )
    raises(lambda node: node.elementwise("x"), TypeError, "slope must be a tensor or a number")
    raises(lambda node: node.matrix(draw(3, 4)), ValueError, r"\(out, in\)")
    raises(lambda node: node.matrix(1.0), TypeError, "two axes or more")
    raises(lambda node: torch.ones(3), TypeError, "methods of node")
    raises(lambda node: (node.identity(),) * 2, ValueError, "2 structures for 1 tensor arguments")
    raises(lambda node: (None,), ValueError, "node.zero")
    i = torch.arange(3)
    raises(
        lambda node: node.identity(),
        ValueError,
        "3 outputs",
        f=lambda x: Two.apply(x, i)[0],
        target=Two,
    )


def test_wrong_second_derivatives():
    Swish, x = swish_class(), draw(4, 3)

    def slope(node):
        return swish_slope(node.saved_tensors[0])

    with jactri.rule(Swish)(lambda node: node.elementwise(slope(node), bend=1.0)) as rule:
        jactri.jacobian(Swish.apply, x)
        for call in (jactri.laplacian, rule.check):
            with pytest.raises(jactri.JacobianMismatch, match="second derivative along a tangent"):
                call(Swish.apply, x)
    with (
        jactri.rule(Swish, linear=True)(lambda node: node.elementwise(slope(node))),
        pytest.raises(jactri.JacobianMismatch, match="second derivative"),
    ):
        jactri.laplacian(Swish.apply, x)
    with jactri.rule(Swish)(lambda node: node.elementwise(slope(node))) as rule:
        rule.second(lambda node, u: u[0])
        with pytest.raises(ValueError, match="second must return a tensor"):
            jactri.laplacian(Swish.apply, x)
    with jactri.rule(Swish)(lambda node: node.elementwise(slope(node))):
        with pytest.raises(jactri.FallbackError, match="second-order"):
            jactri.laplacian(Swish.apply, x)
        with jactri.fallback("allow"):
            close(jactri.laplacian(Swish.apply, x), laplacian(Swish.apply, x))


def test_targets_that_are_none():
    for target, error, words in (
        (None, TypeError, "class of autograd.Function"),
        (torch.sin, TypeError, "class of autograd.Function"),
        (torch.ops.aten.sin.default, TypeError, "grad_fn.name"),
        ("SwishBackward", ValueError, "give the class"),
        ("sin", ValueError, "SincBackward0|TanhBackward0"),
    ):
        with pytest.raises(error, match=words):
            jactri.rule(target)
    with pytest.raises(TypeError, match="what it is for"):
        jactri.rule()
    with swish_rule(swish_class()) as rule, pytest.raises(ValueError, match="no node of"):
        rule.check(torch.sin, draw(3))
