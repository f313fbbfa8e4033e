"""`taps`: activations of a module by the names of its layers, as tensors of one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..prologue.running import public
from ..prologue.tapping import Tapping, copied, specs_of
from .replay import Replay


@public
def taps(model: torch.nn.Module, names: str | Sequence[str]) -> Taps:
    """A context in which ``model`` runs as ever, and after which activations are there by the names of its layers.

    Within, call the model with whatever it takes. Afterwards ``taps["layers.3"]`` is what that layer gave (or took):
    a tensor of one graph with all the others, for `jacobian_of`, for ``torch.autograd.grad``, or for functions of
    yours. Weights may be frozen and inputs be integers: where nothing requires a gradient, the first tap begins to.
    Derivatives are by what the layer gave alone: a layer that hands its input through, or whose output is written to
    in place later, is a place of its own in the graph.

    Args:
        model: a module; it is not modified, and its hooks are gone after the context, also after an exception.
        names: paths of modules, as in ``model.named_modules()``, the empty text being the model. ``*`` stands for a
            part of a path (``"model.layers.*"``, the layers and nothing below them), ``**`` for any number of parts; of
            what they match, they take the layers that run, in grad mode, and give floating-point numbers.
            ``":input"`` behind a path is what the layer takes, ``":output"`` (the default) what it gives: the first
            floating-point tensor, in all places where that one is (as query, key and value), or with ``":output[1]"``,
            ``":output[logits]"``, ``":input[0]"`` or ``":input[mask]"`` the one of that number or keyword. A layer that
            runs several times has ``"name#0"``, ``"name#1"`` and so on.

    Returns:
        `Taps`, a mapping from names to tensors, in the order in which they ran.

    Raises:
        TypeError: ``model`` is no module, or a name is no text.
        ValueError: a pattern that matches no module (names like it are listed), or that is none.
        IndexError: no names.
        RuntimeError: at the end of the context, a name that did not run in it, and a model that writes activations to
            its buffers (an in-place cache); within, a layer that gives no floating-point tensor, or runs under
            ``torch.no_grad``.

    Cost:
        Two copies of each activation.

    Examples:
        >>> net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Tanh()).requires_grad_(False)
        >>> with jactri.taps(net, ["0", "2", "1:input"]) as taps:
        ...     out = net(torch.tensor([[1, 2, 3]]))
        >>> list(taps)
        ['0', '1:input', '2']
        >>> J = jactri.jacobian_of(taps["2"], taps["0"])
        >>> J.shape
        torch.Size([1, 3, 4, 1, 3, 4])
        >>> torch.equal(taps["2"], out)
        True
    """
    return Taps(model, names)


class Taps(Mapping[str, Tensor]):
    """What `taps` gives: a context, and a mapping from names of layers to their activations.

    Within the context, in this thread, grad mode is on, inference mode off, and what is compiled runs eagerly. It can
    be entered once.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        >>> with jactri.taps(net, "*") as taps:
        ...     _ = net(torch.randn(2, 3))
        >>> {name: tuple(tensor.shape) for name, tensor in taps.items()}
        {'0': (2, 3), '1': (2, 3)}
        >>> y, product = jactri.vjp(taps.function("0", "1"), taps["0"], torch.ones(4, 2, 3))
        >>> torch.allclose(product[2], 1 - taps["1"] ** 2)
        True
    """

    def __init__(self, model: torch.nn.Module, names: str | Sequence[str]):
        self._tapping = Tapping(model, specs_of(names, "names"), copied)
        self._model = model
        self._entered = False

    def __enter__(self) -> Taps:
        if self._entered:
            raise RuntimeError(
                "these taps were entered already; make others: jactri.taps(model, names)"
            )
        self._entered = True
        self._tapping.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._tapping.__exit__(*error)

    @public
    def function(self, source: str, target: str) -> Callable[[Tensor], Tensor]:
        """What makes one activation of another, for calls that take a function: `vjp`, `jvp`, `jtj`, `diagonal`.

        It runs the model once more with what it was called with, hooks and all, with its argument in the place of the
        source. At ``taps[source]`` it gives ``taps[target]``, which is tried here.

        Args:
            source: the name of a tap.
            target: the name of another one.

        Raises:
            KeyError: a name that is not tapped.
            RuntimeError: within the context; the model was not called in it, or more than once, or with a cache; it
                gives something else when it runs again, as with dropout; the target does not depend on the source.

        Cost:
            That of the whole model, each time and once here.
        """
        start, end = self._tapping.tap(source), self._tapping.tap(target)
        return Replay(self._model, self._tapping, start, end).tried()

    def __getitem__(self, name: str) -> Tensor:
        return self._tapping.tap(name).tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tapping.found())

    def __len__(self) -> int:
        return len(self._tapping.found())

    def __repr__(self) -> str:
        found = self._tapping.found()
        shown = ", ".join(f"{name!r}: {tuple(tap.tensor.shape)}" for name, tap in found.items())
        return f"Taps({{{shown}}})"
