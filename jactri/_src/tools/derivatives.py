"""Derivatives to put in the place of an op's own, by `overrides`: what interpretability calls its rules."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from ..maps.linear_map import Scale
from ..maps.maps import wide
from ..read.graph import Reader
from ..read.structure import Node
from ..rules.norm import BATCH_NORMS


class ModuleCall(NamedTuple):
    """What an override of a module as a whole is told: the module, its input and its output, both detached."""

    module: Module
    input: Tensor | None
    output: Tensor


class Own(NamedTuple):
    """The op's own derivative times a factor; ``fixed``: with the deviation of a norm held constant."""

    factor: float
    fixed: bool = False

    def emit(self, g: Reader, where: str) -> tuple[int | None, ...]:
        """The values of the current node's outputs."""
        if not self.factor:
            return (None,) * len(g.meta)
        if self.factor != 1:
            scaled: dict[int | None, int | None] = {None: None}
            for s in g.src:
                if s not in scaled:
                    v = g.values[s]
                    term = ((s, Scale(self.factor)),)
                    scaled[s] = g.append(g.name, v.shape, v.dtype, v.device, term)
            g.src = [scaled[s] for s in g.src]
        if not self.fixed:
            return g.understand()
        assert g.overrides is not None
        g.overrides.fixed = 1
        try:
            ids = g.understand()
            if (
                g.overrides.fixed != 2 and g.name not in BATCH_NORMS
            ):  # of a batch norm in eval mode: it is constant
                raise TypeError(
                    f"{where}: {g.name} is no normalisation whose deviation jactri knows; where a norm is written out, "
                    "override the op that divides: {'rsqrt': jactri.zero}"
                )
        finally:
            g.overrides.fixed = 0
        return ids


def zero(node: Any) -> Own:
    """For `overrides`: the derivative zero, as of ``.detach()``. Nothing is multiplied, so that 0 times infinity is 0.

    Of attention weights (``"softmax"``) it keeps the path through the values alone, as in circuit analysis with frozen
    attention patterns (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"); of the ``"rsqrt"`` of
    a norm that is written out, it is the LN-rule of AttnLRP (Achtibat et al. 2024, arXiv:2402.05602).

    Args:
        node: what is overridden.

    Returns:
        What `overrides` takes from a function.

    Examples:
        >>> x = torch.tensor([1.0, 2.0])
        >>> with jactri.overrides({"sigmoid": jactri.zero}):  # the gate is held constant
        ...     d = jactri.diagonal(lambda x: x * x.sigmoid(), x)
        >>> torch.equal(d, x.sigmoid())
        True
    """
    return Own(0.0)


def identity(node: Any) -> Any:
    """For `overrides`: the derivative one of every entry, as by the straight-through estimator.

    See Bengio, Leonard, Courville 2013 (arXiv:1308.3432), for ops that round, and modules that quantise.

    Args:
        node: what is overridden: inputs that have a gradient and the output must have one shape.

    Returns:
        What `overrides` takes from a function.

    Raises:
        ValueError: (in the call) shapes differ.

    Examples:
        >>> with jactri.overrides({"round": jactri.identity}):
        ...     jactri.diagonal(lambda x: 3 * x.round(), torch.tensor([0.2, 1.7]))
        tensor([3., 3.])
    """
    if isinstance(node, ModuleCall):
        return 1.0
    out = node.outputs[0].shape
    for place in node.inputs:
        if place is not None and place.shape != out:
            raise ValueError(
                f"jactri.identity: {node.name} takes {place.shape} to {out}; the identity needs one shape"
            )
    row = tuple(None if p is None else node.identity() for p in node.inputs)
    return (row, *(None,) * (len(node.outputs) - 1)) if len(node.outputs) > 1 else row


def ratio(node: Any) -> Any:
    """For `overrides`: output over input, entry by entry, and 0 where the input is 0, in place of the slope.

    A gradient times the input is then passed on as it is through the op: the rule of layer-wise relevance propagation
    for an activation (Bach et al. 2015, LRP-0; Achtibat et al. 2024, arXiv:2402.05602, the identity rule).

    Args:
        node: a gelu, silu, mish, hardswish, relu or leaky_relu, or a module with one input and one output of one shape.

    Returns:
        What `overrides` takes from a function.

    Raises:
        TypeError: (in the call) another op: it does not save its input. Override its module.

    Examples:
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> with jactri.overrides({"gelu": jactri.ratio}):
        ...     d = jactri.diagonal(nn.functional.gelu, x)
        >>> torch.allclose(d * x, nn.functional.gelu(x))
        True
    """
    if isinstance(node, ModuleCall):
        return None if node.input is None else _over(node.output, node.input)
    ctx = node.ctx
    if node.name == "ReluBackward0":
        return (ctx._saved_result > 0).to(node.outputs[0].dtype)
    if node.name == "LeakyReluBackward0":
        x = ctx._saved_self
        return _over(F.leaky_relu(x, ctx._saved_negative_slope), x)
    if node.name == "GeluBackward0":
        x = ctx._saved_self
        return _over(F.gelu(wide(x), approximate=ctx._saved_approximate), x)
    if node.name in _ACTIVATIONS:
        x = ctx._saved_self
        return _over(_ACTIVATIONS[node.name](wide(x)), x)
    raise TypeError(
        f"jactri.ratio: {node.name} does not save its input, or is no activation that jactri.ratio knows; override the "
        "module that calls it, or pass a function"
    )


_ACTIVATIONS = {"SiluBackward0": F.silu, "MishBackward0": F.mish, "HardswishBackward0": F.hardswish}


def _over(y: Tensor, x: Tensor) -> Tensor:
    y, x = wide(y.detach()), wide(x.detach())
    return torch.where(x == 0, 0.0, y / x)


def uniform(node: Any) -> Own:
    """For `overrides`: the op's own derivative, shared alike among its arguments that depend on the inputs.

    Of a product of two such arguments, each gets half: gradient times input is then kept (Achtibat et al. 2024,
    arXiv:2402.05602, the uniform rule, for ``"mul"`` and ``"bmm"``). With one it is the derivative itself.

    Args:
        node: what is overridden: an op.

    Returns:
        What `overrides` takes from a function.

    Raises:
        TypeError: (in the call) a module as a whole.

    Examples:
        >>> x = torch.tensor([1.0, 2.0])
        >>> with jactri.overrides({"mul": jactri.uniform}):
        ...     d = jactri.diagonal(lambda x: x * x.sin(), x)
        >>> torch.allclose(d, (x.sin() + x * x.cos()) / 2)
        True
    """
    _check_op("uniform", node)
    return Own(1.0 / max(sum(p is not None for p in node.inputs), 1))


def detached_std(node: Any) -> Own:
    """For `overrides`: a normalisation whose standard deviation is held constant; the mean is not.

    The LN-rule of Achtibat et al. 2024 (arXiv:2402.05602, eq. 14), after Ali et al. 2022 (arXiv:2202.07304), for nodes
    of ``layer_norm``, ``rms_norm``, ``group_norm`` and ``batch_norm``. Where the norm is written out, as in most
    language models, write ``{"rsqrt": jactri.zero}``.

    Args:
        node: what is overridden.

    Returns:
        What `overrides` takes from a function.

    Raises:
        TypeError: (in the call) an op that is no norm, or a module as a whole.

    Examples:
        >>> x = torch.tensor([1.0, 2.0, 6.0])
        >>> with jactri.overrides({"layer_norm": jactri.detached_std}):
        ...     J = jactri.jacobian(lambda x: nn.functional.layer_norm(x, (3,)), x)
        >>> torch.allclose(J, (torch.eye(3) - 1 / 3) / x.std(correction=0), atol=1e-4)
        True
    """
    _check_op("detached_std", node)
    return Own(1.0, fixed=True)


def _check_op(name: str, node: Any) -> None:
    if not isinstance(node, Node):
        raise TypeError(
            f"jactri.{name} is for an op, and {type(node.module).__name__} is a module: name the op inside of it, as "
            "(module, 'layer_norm')"
        )
