"""`layer_jacobian`: Jacobians between layers of a module, by their names, reduced over tokens at both ends."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..base import backends
from ..base.fingerprint import of_module
from ..prologue.arguments import Options, check_options
from ..prologue.running import buffers_kept, computing, public, record, saved_as_it_is
from ..prologue.tapping import Spec, Tapping, check_no_cache, copied, spec_of, specs_of
from ..read import handover
from ..read.behind import reached
from ..read.overriding import own
from ..spread.agreement import of_mesh
from .api import compute
from .masks import Masks
from .reduction import How, Reduction


@public
def layer_jacobian(
    model: torch.nn.Module,
    inputs: Any,
    source: str | Sequence[str],
    target: str = "",
    reduce: tuple[How, How] = ("sum", "mean"),
    *,
    rows: int | Tensor | None = None,
    seed: int = 0,
    mask: Any = "auto",
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
    progress: bool = False,
    mesh: Any = None,
) -> dict[str, Tensor]:
    """The Jacobians of one layer's activation in those of others, by name: reduced over tokens, never formed in full.

    The model runs once. One reverse sweep goes from the target to the first source, K cotangents at once, and is read
    at every source on its way. Both reductions are part of what is differentiated, so that for L sources of d features
    a lens takes ``L d d`` numbers, however many tokens there are.

    Activations are ``(samples, *tokens, features)``. Valid tokens are those of ``attention_mask`` among the arguments
    in ``inputs`` (``decoder_attention_mask`` of layers of a decoder), or all.

    Args:
        model: a module, in eval mode if it has dropout. Its weights may be frozen.
        inputs: what it takes: a tensor, a tuple of arguments, or a dict of keyword arguments, as a tokenizer returns.
        source: names of layers, or patterns, as of `taps`.
        target: the name of one; by default the model's own output.
        reduce: what is done at the target and at the source. ``"sum"`` or ``"mean"``: over all valid tokens of all
            samples. A number: that token of each sample, among the valid ones (``-1`` is the last); samples are summed
            at the target, averaged at the source. A tensor of weights, ``(tokens,)``, ``(tokens, K)`` or ``(samples,
            tokens, K)``: the sum of the valid tokens of all samples, so weighted. None: nothing, and no token is left
            out. ``("sum", "mean")`` is the Jacobian lens.
        rows: a tensor ``(K, features)`` that multiplies the target, as rows of an unembedding. A number K: a random
            projection, ``torch.randn(K, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            / K ** 0.5``, whose transpose times the result is an unbiased estimate of the Jacobian.
        seed: of that projection.
        mask: which tokens are valid, where ``inputs`` do not tell: a tensor ``(samples, tokens)``, None for all, or a
            dict of such by names of layers.
        chunk_size: how many rows run at once.
        memory_limit: bytes (or ``"2GB"``) that may be allocated after the model has run, the result included.
        backend: as of `jacobian`.
        progress: show a progress bar over the chunks.
        mesh: a ``DeviceMesh`` of one axis, whose ranks all make this call, with the same inputs and weights. Each runs
            the model, and its part of the cotangents; answers are DTensors, sharded along the longest axis of the
            reduced target. ``J.full_tensor()`` is the whole.

    Returns:
        ``{name: (*target, *source)}`` in the order in which the sources ran. The target's axes are ``(features,)``,
        with weights of K columns ``(K, features)``, with None those of the activation; ``rows`` take the place of its
        features. The source's likewise. dtype and device are the source's.

    Raises:
        TypeError: arguments of another type than these.
        ValueError: a pattern that matches no module, or a target that matches several; a reduction that there is not;
            a mean over no tokens; a ``memory_limit`` too small for a row.
        IndexError: a reduction over an axis that an activation does not have, a token that is not there.
        RuntimeError: a layer that does not run in this call; a source that comes after its target, or that it does not
            depend on; a model in training mode that draws random numbers (dropout); a cache in ``inputs``, or in
            buffers of the model; a mask or weights that do not fit. With ``mesh``: ranks that differ in what they were
            given, or that failed, on all of them.

    Cost:
        One forward pass, and one sweep with as many cotangents as the target has rows, through the layers between the
        target and the first source: about as many flops as that many backward passes through them.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mix, self.mlp = nn.Linear(5, 5), nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         x = x + self.mix(x.mT).mT.tanh()
        ...         return x + self.mlp(x).tanh()
        >>> net = nn.Sequential(nn.Embedding(10, 8), Block(), Block(), Block())
        >>> tokens = torch.randint(10, (2, 5))
        >>> lens = jactri.layer_jacobian(net, tokens, source=["1", "2"], target="3")
        >>> {name: tuple(J.shape) for name, J in lens.items()}
        {'1': (8, 8), '2': (8, 8)}

        Token 4 in each of the tokens of layer 1:

        >>> J = jactri.layer_jacobian(net, tokens[:1], "1", "3", reduce=(4, None))["1"]
        >>> J.shape
        torch.Size([8, 1, 5, 8])
    """
    ranks = None if mesh is None else of_mesh(mesh, "layer_jacobian")
    with nullcontext() if ranks is None else ranks.together():
        wanted = Between(source, target, reduce, rows, seed)
        options = options_of(chunk_size, memory_limit, backend, progress, ranks)
        return wanted.of(model, inputs, mask, options)


def options_of(
    chunk_size=None, memory_limit=None, backend="auto", progress=False, ranks=None
) -> Options:
    """The options of one call: a sweep in reverse, which all sources share."""
    return Options(
        chunk_size=chunk_size, memory_limit=memory_limit, backend=backend, strategy="reverse-mode", progress=progress,
        what="the reduced Jacobian", ranks=ranks,
    )  # fmt: skip


class Between:
    """What is asked for between the layers of a model, whatever its inputs: checked arguments of `layer_jacobian`."""

    def __init__(self, source, target, reduce, rows, seed):
        self.sources, self.target = specs_of(source, "source"), _target(target)
        if not isinstance(reduce, (tuple, list)) or len(reduce) != 2:
            raise TypeError(
                "reduce must be a pair, what is done at the target and at the source, as ('sum', 'mean'), got "
                f"{reduce!r}"
            )
        self.at_target, self.at_source = (
            Reduction(reduce[0], "target"),
            Reduction(reduce[1], "source"),
        )
        self.at_target.check()
        self.at_source.check()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {seed!r}")
        self.rows, self.seed = _rows(rows), seed

    def of(
        self, model: torch.nn.Module, inputs: Any, mask: Any, options: Options
    ) -> dict[str, Tensor]:
        """The answer for one call of a model."""
        check_options(options.strategy, options.chunk_size, None, False)
        args, kwargs = arguments(inputs)
        if handover.transforming([t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]):
            raise RuntimeError("layer_jacobian is not available inside of a torch.func transform")
        named = _by_name(model, args, kwargs)
        check_no_cache(named, "inputs")
        masks = Masks(mask, named, _parameters(model))
        leaves: dict[str, list[Tensor]] = {}

        def change(name: str, y: Tensor) -> Tensor:
            if name not in sources:
                return copied(name, y)
            # a checkpoint runs the layer again without this, and has to save the same
            with computing(False), torch.enable_grad(), saved_as_it_is():
                mask = None if self.at_source.how is None else masks.of(name, y)
                leaf, more = self.at_source.summand(y, mask, name)
                leaves.setdefault(name, []).append(leaf)
                onward = y + more
                own(onward, y)
                return onward

        tapping = Tapping(model, [self.target, *self.sources], change)
        devices = [
            t.device
            for t in (*model.parameters(), *args, *kwargs.values())
            if isinstance(t, Tensor)
        ]
        backends.check_asked(options.backend, devices[0] if devices else None, False)
        targets, *found = tapping.modules
        if len(targets) > 1:
            raise ValueError(
                f"target={self.target.pattern!r} matches {len(targets)} modules: name one of "
                + ", ".join(map(repr, list(targets)[:8]))
            )
        (path,) = targets
        end_name = self.target.named(path)
        sources = {
            spec.named(path)
            for spec, paths in zip(self.sources, found, strict=True)
            for path in paths
        }
        masks.check_names([end_name, *sources])
        draws = _Draws(model)
        with buffers_kept(model.modules()):  # to which a checkpoint writes again, in the sweep
            with tapping:
                _, options.handles = record(lambda: model(*args, **kwargs))
            draws.check(model)
            ends = tapping.found([0])
            if len(ends) > 1:
                raise RuntimeError(
                    f"target={end_name!r} ran {len(ends)} times; name one of {', '.join(map(repr, ends))}"
                )
            (target,) = ends
            starts = tapping.found(range(1, len(tapping.specs)))
            xs = [leaves[tap.name][tap.run] for tap in starts.values()]
            with computing(False), torch.enable_grad():
                z = self._at_target(ends[target].tensor, masks, end_name)
                own(z, ends[target].tensor)
            there = reached([z], xs)
            for i, (name, tap) in enumerate(starts.items()):
                if i not in there:
                    raise _no_dependence(name, target, tap.order > ends[target].order)
            if options.ranks is not None:
                options.told = self._told(model, (args, kwargs), mask, starts, options)
            (blocks,) = compute([z], xs, options)
            return dict(zip(starts, blocks, strict=True))

    def _told(self, model, given, mask, starts, options: Options) -> dict[str, Any]:
        """What ranks are to have alike, beside the shapes and the numbers of both ends."""
        asked = (self.at_target, self.at_source, self.rows, self.seed, mask, list(starts))
        told = {"call": asked, "inputs": _compared(given)}
        # frozen weights too, which are no leaves of the graph
        return {"weights": of_module(model), **told, **(options.told or {})}

    def _at_target(self, y: Tensor, masks: Masks, name: str) -> Tensor:
        """The target, reduced."""
        mask = None if self.at_target.how is None else masks.of(name, y)
        z = self.at_target.applied(y, mask, name)
        if self.rows is None:
            return z
        rows, features = self.rows, z.shape[-1] if z.dim() else 0
        if isinstance(rows, int):
            rows = sketch(rows, features, self.seed)
        if rows.shape[1] != features:
            raise RuntimeError(
                f"rows of shape {tuple(rows.shape)} do not fit the target {name!r}, which has {features} features; "
                f"pass (K, {features})"
            )
        return z @ rows.detach().to(z).T


def sketch(rows: int, features: int, seed: int) -> Tensor:
    """A random projection ``(rows, features)``, S, with ``S^T S`` the identity in the mean."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator, dtype=torch.float64) / rows**0.5


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with. Raises for what is none."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    if not isinstance(inputs, Mapping):
        raise TypeError(
            "inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, got "
            f"{type(inputs)}{_instead(inputs)}"
        )
    kwargs = dict(inputs)
    for name in kwargs:
        if not isinstance(name, str):
            raise TypeError(f"inputs must have names of arguments as keys, got {name!r}")
    return (), kwargs


def _compared(given: Any) -> Any:
    """Arguments as ranks can compare them: of an object its class alone."""
    if given is None or isinstance(given, (Tensor, int, float, str)):
        return given
    if isinstance(given, Mapping):
        return {str(key): _compared(value) for key, value in given.items()}
    if isinstance(given, (tuple, list)):
        return [_compared(value) for value in given]
    return type(given).__name__


def _by_name(model: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's call by their names, as far as they have any."""
    try:
        return dict(inspect.signature(model.forward).bind_partial(*args).arguments) | kwargs
    except (
        TypeError,
        ValueError,
    ):  # the call itself says what does not fit, and a builtin has none
        return kwargs


def _parameters(model: torch.nn.Module) -> list[str]:
    """The names of a model's arguments."""
    try:
        return list(inspect.signature(model.forward).parameters)
    except ValueError:  # a builtin has none
        return []


def _instead(inputs: Any) -> str:
    if isinstance(inputs, str):
        return "; pass what a tokenizer returns: tokenizer(text, return_tensors='pt')"
    return "; pass tuple(inputs)" if isinstance(inputs, list) else ""


def _target(target: Any) -> Spec:
    if not isinstance(target, str):
        raise TypeError(f"target must be the name of one layer, got {target!r}")
    return spec_of(target)


def _rows(rows: Any) -> int | Tensor | None:
    if rows is None or (isinstance(rows, int) and not isinstance(rows, bool) and rows > 0):
        return rows
    if isinstance(rows, Tensor) and rows.dim() == 2 and rows.is_floating_point():
        return rows
    got = f"{tuple(rows.shape)} of {rows.dtype}" if isinstance(rows, Tensor) else repr(rows)
    kind = ValueError if isinstance(rows, (int, Tensor)) else TypeError
    raise kind(
        f"rows must be a tensor (K, features), a positive number of random rows or None, got {got}"
    )


def _no_dependence(source: str, target: str, after: bool) -> RuntimeError:
    """What to raise for a source that the target does not depend on: no zeros are returned for it."""
    if after:
        return RuntimeError(
            f"source {source!r} comes after its target {target!r}, which does not depend on it; swap the "
            "two, or leave it out"
        )
    return RuntimeError(
        f"target {target!r} does not depend on source {source!r}, though that ran before it: it is on no way "
        "there, or detached on it"
    )


class _Draws:
    """Whether a model draws random numbers while it runs."""

    def __init__(self, model: torch.nn.Module):
        self._devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._before = self._states()

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]

    def check(self, model: torch.nn.Module) -> None:
        """Raise RuntimeError where it did, in training mode."""
        training = [name for name, m in model.named_modules() if m.training]
        same = all(map(torch.equal, self._before, self._states()))
        if training and not same:
            drops = [
                n for n, m in model.named_modules() if "Drop" in type(m).__name__ and m.training
            ]
            where = f" (as {drops[0]!r})" if drops else ""
            raise RuntimeError(
                f"the model is in training mode and draws random numbers, as dropout does{where}: the Jacobian would "
                "be that of one draw. Call model.eval() first"
            )
