"""The ranks of a mesh that compute one answer: what each has of it, and that they were given the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.fingerprint import of_value

SAMPLES = 64
"""Entries of a function's outputs that are compared."""

_FACTS = {
    "call": "the options of the call",
    "shapes": "the shapes and dtypes of inputs and outputs",
    "plan": "the ops of the function, or the plan for them",
    "inputs": "the numbers in inputs",
    "file": "the file of out",
    "progress": "what an interrupted call left",
    "weights": "the weights of the function",
}
"""What is compared, in the order in which it is told."""

_REMEDIES = {
    "inputs": "inputs are the same on every rank: seed them alike, or broadcast them from one",
    "weights": "load the same weights on every rank, or broadcast them from one",
    "outputs": "load the same weights on every rank, and seed what is random alike",
    "file": "let every rank open the one file, after rank 0 has made it",
    "progress": "the folder of the file has to be one that all ranks see",
}

_FAILED = 1
_FORM = 2


class Share(NamedTuple):
    """A range that one rank has of an axis, or of a list."""

    start: int
    length: int


def share(size: int, rank: int, ranks: int) -> Share:
    """What a rank has of ``size`` things: as torch's DTensor deals an axis out, the last ranks less or none."""
    each = ceil(size / ranks)
    start = min(rank * each, size)
    return Share(start, min(each, size - start))


class Ranks:
    """The ranks of a mesh with one axis, of which this process is one.

    Ranks that wait for one that has failed would wait till the timeout of their group: so every rank says once that all
    is well (`agree`), or within `together` that it is not.
    """

    def __init__(self, mesh: Any, call: str):
        self.mesh, self.call = mesh, call
        self.group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self._due = True

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within: an exception on one rank, before all agree, is one on all of them."""
        self._due = True
        try:
            yield
        except Exception:
            if self._due:
                self._gather(torch.zeros(len(_FACTS) + SAMPLES + _FORM, dtype=torch.int64))
            raise

    def agree(
        self, facts: Mapping[str, Any], outputs: Sequence[Tensor] = (), rounding: float = 0.0
    ) -> None:
        """Compare ``facts`` bit by bit, and samples of ``outputs`` up to ``rounding``: one small all_gather.

        Raises RuntimeError on every rank, which names what differs, or the ranks that failed.
        """
        own = [_number(facts[name]) if name in facts else 0 for name in _FACTS]
        told = torch.cat([
            torch.tensor([1, len(outputs), *own]), _sampled(outputs).view(torch.int64)
        ])  # fmt: skip
        found = self._gather(told)
        failed = [r for r, t in enumerate(found) if not t[0]]
        if failed:
            raise RuntimeError(
                f"{self.call}: {_named(failed)} failed, where the error is told; what the other ranks had computed of "
                "the answer is lost, but for what a file holds"
            )
        for k, name in enumerate(_FACTS):
            self._check(
                found, name, _FACTS[name], lambda a, b, k=k: bool(a[_FORM + k] == b[_FORM + k])
            )

        def near(a: Tensor, b: Tensor) -> bool:
            one, two = (t[-SAMPLES:].view(torch.float64) for t in (a, b))
            atol = rounding * float(one.abs().nan_to_num(0, 0, 0).max())
            return torch.allclose(one, two, rtol=rounding, atol=atol, equal_nan=True)

        self._check(found, "outputs", "the numbers that the function returned", near)

    def _check(self, found: list[Tensor], name: str, what: str, same) -> None:
        others = [r for r, t in enumerate(found) if not same(found[0], t)]
        if others:
            remedy = _REMEDIES.get(name, "call it alike on every rank")
            raise RuntimeError(
                f"{self.call} with mesh=: {_named(others)} and rank 0 differ in {what}; {remedy}"
            )

    def _gather(self, told: Tensor) -> list[Tensor]:
        self._due = False
        mine = told.to(self.mesh.device_type)  # of CUDA's, the current device
        found = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            torch.distributed.all_gather(found, mine, group=self.group)
        except RuntimeError as error:  # of gloo as of NCCL
            raise RuntimeError(
                f"{self.call}: a rank of the mesh has ended, or did not answer within the timeout of its group "
                f"({str(error).splitlines()[0]}); a file holds what all have noted in it, to go on from"
            ) from error
        return [t.cpu() for t in found]


def of_mesh(mesh: Any, call: str) -> Ranks:
    """The ranks of a caller's ``mesh``. Raises TypeError for no mesh, and ValueError for one of several axes."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh)}; make one by "
            "init_device_mesh(x.device.type, (torch.distributed.get_world_size(),))"
        )
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        which = (
            f"mesh[{names[0]!r}]" if names else "mesh['a'] of one with mesh_dim_names=('a', 'b')"
        )
        raise ValueError(
            f"mesh has {mesh.ndim} axes, {tuple(mesh.shape)}, and {call} deals seeds out over one; pass one of them, "
            f"as {which}"
        )
    if mesh.get_coordinate() is None:
        rank = torch.distributed.get_rank()
        raise ValueError(
            f"mesh is of ranks {mesh.mesh.flatten().tolist()}, and this one, {rank}, is none of them; call {call} on "
            "those alone"
        )
    return Ranks(mesh, call)


def _number(fact: Any) -> int:
    text = of_value(fact)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _sampled(outputs: Sequence[Tensor]) -> Tensor:
    """Some entries of outputs, of each in its turn."""
    found = torch.zeros(SAMPLES, dtype=torch.float64)
    each = SAMPLES // max(1, min(len(outputs), SAMPLES))
    for k, y in enumerate(outputs[:SAMPLES]):
        flat = y.detach().reshape(-1)
        if flat.numel():
            at = (
                torch.arange(each, device=flat.device) * max(1, flat.numel() // each) % flat.numel()
            )
            some = flat[at]
            found[k * each : (k + 1) * each] = (
                (some.real if some.is_complex() else some).double().cpu()
            )
    return found


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
