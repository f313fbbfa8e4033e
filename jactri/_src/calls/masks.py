"""Which tokens of an activation are valid: by ``attention_mask`` among a model's arguments, or as the caller says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

AUTO = "auto"
_MASK, _DECODER = "attention_mask", "decoder_attention_mask"


class Masks:
    """Masks of the activations of one call. ``given``: the caller's; ``named``: the model's arguments by name.

    ``known``: names of all arguments that the model has.
    """

    def __init__(self, given: Any, named: Mapping[str, Any], known: Iterable[str]):
        if isinstance(given, str) and given != AUTO:
            raise ValueError(f"mask must be 'auto', a tensor, None or a dict, got {given!r}")
        if not isinstance(given, (str, type(None), Tensor, Mapping)):
            raise TypeError(
                f"mask must be 'auto', a tensor, None or a dict of those by layer, got {type(given)}"
            )
        self._given, self._named = given, named
        self._two = any(k.startswith("decoder_") for k in (*named, *known))

    def check_names(self, names: Iterable[str]) -> None:
        """Raise ValueError for masks of layers that are not asked for."""
        if isinstance(self._given, Mapping):
            names = list(names)
            for name in self._given:
                if name not in names:
                    raise ValueError(
                        f"mask has {name!r}, which is none of the layers {', '.join(map(repr, names))}"
                    )

    def of(self, name: str, y: Tensor) -> Tensor | None:
        """Which of ``y.shape[:-1]`` are valid, None for all. Raises RuntimeError for a mask that does not fit."""
        given, what = self._given, "mask"
        if isinstance(given, Mapping):
            given, what = given.get(name, AUTO), f"mask[{name!r}]"
        if isinstance(given, str):
            if given != AUTO:
                raise ValueError(f"{what} must be 'auto', a tensor or None, got {given!r}")
            what, given = self._auto(name)
        if given is None:
            return None
        if not isinstance(given, Tensor):
            raise TypeError(f"{what} must be a tensor (samples, tokens), got {type(given)}")
        valid = given.to(y.device) != 0
        if not bool(((given == 0) | (given == 1)).all()):
            raise RuntimeError(
                f"{what} of shape {tuple(given.shape)} and {given.dtype} holds more than ones (valid tokens) and zeros"
                + _TELL.format(name)
            )
        if bool(valid.all()):
            return None
        if y.dim() == valid.dim() == 2:
            if len(y) == valid.numel():
                return valid.flatten()  # tokens of all samples, one after another
            if len(y) == len(valid):
                return None  # one row a sample, no tokens
        if valid.dim() != 2 or y.shape[:-1] != valid.shape:
            raise RuntimeError(
                f"{what} of shape {tuple(given.shape)} does not fit {name!r}, of shape {tuple(y.shape)}"
                + _TELL.format(name)
            )
        return valid

    def _auto(self, name: str) -> tuple[str, Any]:
        """The argument of the model that tells which tokens of a layer are valid, and its value."""
        named = self._named
        if not self._two:
            return _MASK, named.get(_MASK)
        parts = name.partition(":")[0].partition("#")[0].split(".")
        sides = [s for s, of in (("decoder", _DECODER), ("encoder", _MASK)) if s in parts]
        if len(sides) == 1:
            which = _DECODER if sides == ["decoder"] else _MASK
            return which, named.get(which)
        masks = [m for m in (named.get(_MASK), named.get(_DECODER)) if m is not None]
        if any(not bool((m != 0).all()) for m in masks):
            raise RuntimeError(
                f"inputs have masks for an encoder and a decoder, and {name!r} tells not which it is of"
                + _TELL.format(name)
            )
        return _MASK, None


_TELL = "; say which tokens are valid: mask={{{0!r}: mask of (samples, tokens)}}, None for all"
