"""`JacobianMean`: the mean of `layer_jacobian` over prompts, and how far it may be off."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base import files, fingerprint
from ..base.progress import bar
from ..prologue.running import public
from ..read.overriding import refuse
from ..spread.agreement import Ranks, of_mesh
from ..spread.sums import gathered, merged
from . import moments
from .layers import Between, options_of
from .masks import AUTO
from .ranks import everyone
from .reduction import How, from_file, own, to_file

_FORM = 1
"""The form of the file."""


class JacobianMean:
    """The mean over prompts of what `layer_jacobian` returns, with its standard error, which can be left and resumed.

    Args:
        model: as of `layer_jacobian`, like all up to ``seed``.
        source: names of layers, or patterns.
        target: the name of one.
        reduce: what is done at the target and at the source: the answer's shape must not depend on the prompt.
        rows: rows that multiply the target, or how many random ones: the same for all prompts.
        seed: of those.
        errors: keep what `standard_error` needs, which is as large as the mean.
        chunk_size: as of `layer_jacobian`.
        memory_limit: as of `layer_jacobian`.
        backend: as of `layer_jacobian`.
        mesh: a ``DeviceMesh`` of one axis, whose ranks all add the same prompts: each computes its part of a prompt's
            cotangents, and all of them get the whole, by one all_gather a layer, so that each has the mean, and rank 0
            writes the file. Where there are more prompts than ranks, give each its own, and `merge_ranks`.

    Raises:
        TypeError: ``model`` is no module. Else, when a prompt is added, what `layer_jacobian` raises.

    Every prompt counts as one, however many tokens it has, and so does a batch that is added at once. Sums are in
    float64 where the source is, else in float32.

    Cost:
        Making one reads the weights once, to know them again. Twice the memory of the answer, once without ``errors``.

    Examples:
        >>> net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        >>> prompts = [torch.randint(10, (1, 6)) for _ in range(8)]
        >>> lens = jactri.JacobianMean(net, ["1", "2"], "3")
        >>> lens.add(prompts[0]).count
        1
        >>> lens = lens.run(prompts, "lens.safetensors")  # goes on with the second one, and saves
        >>> lens.count, lens.value()["1"].shape, lens.standard_error()["1"].shape
        (8, torch.Size([4, 4]), torch.Size([4, 4]))

        Prompts may be shared out; `load` needs the model only to add more.

        >>> other = jactri.JacobianMean(net, ["1", "2"], "3").add(torch.randint(10, (1, 3)))
        >>> jactri.JacobianMean.load("lens.safetensors").merge(other).count
        9
    """

    def __init__(
        self,
        model: torch.nn.Module,
        source: str | Sequence[str],
        target: str = "",
        reduce: tuple[How, How] = ("sum", "mean"),
        *,
        rows: int | Tensor | None = None,
        seed: int = 0,
        errors: bool = True,
        chunk_size: int | None = None,
        memory_limit: int | str | None = None,
        backend: str = "auto",
        mesh: Any = None,
    ):
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model)}")
        Between(source, target, reduce, rows, seed)  # raises for what is none
        asked = {
            "source": [source] if isinstance(source, str) else list(source),
            "target": target,
            "reduce": [own(how) for how in reduce],
            "rows": own(rows),
            "seed": seed,
        }
        self._set(asked, errors, fingerprint.of_module(model))
        self._bind(model, chunk_size, memory_limit, backend, mesh)

    def _set(self, asked: dict[str, Any], errors: bool, model: str) -> None:
        """What is asked for, and no prompts yet."""
        self._asked, self._errors, self._of = asked, errors, model
        self._between = Between(**{**asked, "reduce": tuple(asked["reduce"])})
        self._model: torch.nn.Module | None = None
        self._ranks: Ranks | None = None
        self._prompts: list[str] = []
        self._mean: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._torn = False

    def _bind(self, model: torch.nn.Module, chunk_size, memory_limit, backend, mesh) -> None:
        self._model = model
        self._ranks = None if mesh is None else of_mesh(mesh, "JacobianMean")
        self._options = {"chunk_size": chunk_size, "memory_limit": memory_limit, "backend": backend}
        self._state = fingerprint.state_of(model)

    def __repr__(self) -> str:
        source = ", ".join(map(repr, self._asked["source"]))
        return f"JacobianMean([{source}] to {self._asked['target']!r}, {self.count} prompts)"

    @property
    def count(self) -> int:
        """How many prompts were added."""
        return len(self._prompts)

    @public
    def add(self, inputs: Any, mask: Any = AUTO) -> JacobianMean:
        """Add a prompt, and return this mean.

        Args:
            inputs: as of `layer_jacobian`.
            mask: as of `layer_jacobian`.

        Raises:
            RuntimeError: the mean was loaded without a model; its weights were written to since; the answer has other
                layers or shapes than before. Else what `layer_jacobian` raises. The mean is as it was then.
        """
        refuse("JacobianMean", "take the mean of what layer_jacobian returns in the block")
        with self._together():
            self._check_model()
            told = fingerprint.of_value((inputs, mask))
            options = options_of(**self._options, ranks=self._ranks)
            options.whole = self._ranks is not None
            options.told = {"weights": self._of, "progress": self._prompts}
            found = self._between.of(self._model, inputs, mask, options)
        self._check_shapes(found)
        with self._writing():
            squares = self._squares if self._errors else None
            moments.add(self._mean, squares, self.count + 1, found)
            self._prompts.append(told)
        return self

    @public
    def run(
        self,
        prompts: Iterable[Any],
        path: str | os.PathLike | None = None,
        *,
        every: float = 60.0,
        progress: bool = False,
    ) -> JacobianMean:
        """Add prompts, one after another, and return this mean; go on where an interrupted run stopped.

        Prompts that were added already, here or in the file, must be the first of ``prompts``, and are passed over.

        Args:
            prompts: what `add` takes.
            path: a file that is written to now and then, at the end and when an exception ends the run, as a whole
                each time; where there is one, it goes on from it.
            every: seconds between two writes.
            progress: show a progress bar over the prompts.

        Raises:
            RuntimeError: the file is of another model, of another reduction, or has other prompts.
            ImportError: a ``path`` without safetensors; ``progress`` without rich or tqdm.
        """
        with self._together():
            self._check_model()
            if path is not None:
                files.available()
                if Path(path).exists():
                    self._go_on_from(path)
            self._agree({"call": path is None, "progress": self._prompts})
        before, saved = self.count, time.monotonic()
        total = len(prompts) if isinstance(prompts, Sized) else None
        passed, mine = 0, self._ranks is None or not self._ranks.rank
        path = path if mine else None
        with ExitStack() as stack:
            advance = stack.enter_context(bar(total, "prompts")) if progress and mine else None
            try:
                for prompt in self._each(prompts):
                    if passed < before:
                        self._check_prompt(passed, prompt)
                        passed += 1
                    else:
                        self.add(prompt)
                    if advance is not None:
                        advance()
                    if time.monotonic() - saved > every:
                        with self._together():
                            self._keep(path)
                        saved = time.monotonic()
            except BaseException:
                self._keep(path)
                raise
        with self._together():
            self._keep(path)
            self._agree({})  # the file is whole when the call returns on any rank
        if passed < before:
            raise RuntimeError(
                f"prompts end after {passed}, but {before} were added before: pass the same ones, and more after them"
            )
        return self

    def value(self) -> dict[str, Tensor]:
        """The mean, by layer.

        Raises:
            RuntimeError: there is no prompt yet.
        """
        self._check_whole()
        if not self.count:
            raise RuntimeError("there is no mean of no prompts; add one first")
        return {name: t.clone() for name, t in self._mean.items()}

    def standard_error(self) -> dict[str, Tensor]:
        """The standard error of every entry of the mean, by layer: ``std / sqrt(count)``.

        Raises:
            RuntimeError: there are less than two prompts, or ``errors=False``.
        """
        if not self._errors:
            raise RuntimeError("standard errors were not kept: make the mean with errors=True")
        self._check_whole()
        n = self.count
        if n < 2:
            raise RuntimeError(f"a standard error needs two prompts, there are {n}")
        return {name: (t / (n - 1) / n).sqrt() for name, t in self._squares.items()}

    @public
    def merge(self, other: JacobianMean | str | os.PathLike) -> JacobianMean:
        """Add the prompts of another mean, or of its file, and return this one (Chan, Golub and LeVeque 1983).

        Args:
            other: of the same model, layers and reduction.

        Raises:
            RuntimeError: it is of another model or reduction, or was made with another ``errors``.
        """
        if not isinstance(other, JacobianMean):
            other = JacobianMean.load(other)
        self._check_whole()
        other._check_whole()
        self._check_same(other, "other")
        self._check_shapes(other._mean)
        with self._writing():
            squares = self._squares if self._errors else None
            moments.merge(self._mean, squares, self.count, other._mean, other._squares, other.count)
            self._prompts += other._prompts
        return self

    @public
    def merge_ranks(self, mesh: Any) -> JacobianMean:
        """The mean over the prompts of all ranks, on each of them; this one stays as it is.

        Every rank calls it, with a mean of its own share of the prompts, which may be none.

        Args:
            mesh: a ``DeviceMesh`` of these ranks (of several dimensions: all of them; ``mesh["dp"]`` for one).

        Raises:
            TypeError: ``mesh`` is no DeviceMesh.
            RuntimeError: means of another model or reduction, or of other shapes, on some rank: on all of them;
                this one was made with ``mesh``.

        Cost:
            Names of prompts are gathered; then one all_reduce of the mean, and with ``errors`` another.
        """
        self._check_whole()
        if self._ranks is not None:
            raise RuntimeError(
                "this mean was made with mesh=, and has the prompts of all ranks: merge_ranks would count them again"
            )
        share = everyone(mesh)
        shapes = {name: (tuple(t.shape), t.dtype) for name, t in self._mean.items()}
        asked = {name: fingerprint.of_value(value) for name, value in self._asked.items()}
        told = gathered((self._of, asked, self._errors, shapes, self._prompts), share)
        known = next((t[3] for t in told if t[3]), {})
        for rank, t in enumerate(told):
            if t[:3] != told[0][:3] or t[3] not in ({}, known):
                raise RuntimeError(
                    f"the mean of rank {rank} in the mesh is of another model, reduction, errors or shapes than others"
                )
        prompts = [p for t in told for p in t[4]]
        made = JacobianMean.__new__(JacobianMean)
        made._set(self._asked, self._errors, self._of)
        if self._model is not None:
            made._model, made._options, made._state = self._model, self._options, self._state
        if prompts:
            none = {name: torch.zeros(s, dtype=d) for name, (s, d) in known.items()}
            squares = (self._squares or none) if self._errors else {}
            counts = self.count, len(prompts)
            made._mean, made._squares = merged(self._mean or none, squares, counts, share)
        made._prompts = prompts
        return made

    @public
    def save(self, path: str | os.PathLike) -> None:
        """Write all of it to a file of safetensors, as a whole or not at all.

        Args:
            path: of the file; one that is there is replaced.

        Raises:
            ImportError: safetensors is not installed.
        """
        self._check_whole()
        tensors = {f"mean/{name}": t for name, t in self._mean.items()}
        tensors |= {f"squares/{name}": t for name, t in self._squares.items()}
        asked = dict(self._asked)
        asked["reduce"] = [
            to_file(h, f"reduce/{i}", tensors) for i, h in enumerate(asked["reduce"])
        ]
        asked["rows"] = to_file(asked["rows"], "rows", tensors)
        told = {
            "form": _FORM,
            "asked": asked,
            "errors": self._errors,
            "model": self._of,
            "prompts": self._prompts,
        }
        files.write(path, tensors, told)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: torch.nn.Module | None = None,
        *,
        chunk_size: int | None = None,
        memory_limit: int | str | None = None,
        backend: str = "auto",
        mesh: Any = None,
    ) -> JacobianMean:
        """What was saved.

        Args:
            path: of the file.
            model: the one that it was made of, to add more prompts; without, the mean can be read and merged.
            chunk_size: as of `layer_jacobian`, like all that follow.
            memory_limit: bytes.
            backend: one of them.
            mesh: of the ranks that add prompts together.

        Raises:
            FileNotFoundError: there is no file.
            RuntimeError: it is not one of `save`, or of another model.
            ImportError: safetensors is not installed.
        """
        tensors, told = files.read(path)
        if told.get("form") != _FORM:
            raise RuntimeError(f"{os.fspath(path)!r} is of another version of jactri")
        asked = told["asked"]
        asked["reduce"] = [from_file(h, tensors) for h in asked["reduce"]]
        asked["rows"] = from_file(asked["rows"], tensors)
        made = cls.__new__(cls)
        made._set(asked, told["errors"], told["model"])
        made._prompts = told["prompts"]
        for name, t in tensors.items():
            kind, _, layer = name.partition("/")
            if kind in ("mean", "squares"):
                (made._mean if kind == "mean" else made._squares)[layer] = t
        if model is not None:
            if fingerprint.of_module(model) != made._of:
                raise RuntimeError(
                    f"{os.fspath(path)!r} is of another model: classes of its modules, or names, dtypes or values "
                    "of its weights differ; pass the model that it was made of, or start another file"
                )
            made._bind(model, chunk_size, memory_limit, backend, mesh)
        return made

    # -- within -----------------------------------------------------------------------------------

    def _together(self) -> AbstractContextManager[None]:
        """Within: what fails on one rank is told to the others."""
        return nullcontext() if self._ranks is None else self._ranks.together()

    def _agree(self, facts: dict[str, Any]) -> None:
        if self._ranks is not None:
            self._ranks.agree(facts)

    def _keep(self, path: str | os.PathLike | None) -> None:
        if path is not None and self.count and not self._torn:
            self.save(path)

    def _each(self, prompts: Iterable[Any]) -> Iterator[Any]:
        """Prompts, one of which may raise on one rank alone."""
        left = iter(prompts)
        while True:
            with self._together():
                try:
                    prompt = next(left)
                except StopIteration:
                    return
            yield prompt

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Sums that are written to within are not whole if an exception, an interrupt say, ends that."""
        self._torn = True
        yield
        self._torn = False

    def _check_whole(self) -> None:
        if self._torn:
            raise RuntimeError(
                "this mean was interrupted while its sums were written to, and holds a part of a prompt: go on from "
                "its file, with another JacobianMean"
            )

    def _check_shapes(self, found: dict[str, Tensor]) -> None:
        if not self._mean or not found:
            return
        mine, theirs = ({n: tuple(t.shape) for n, t in d.items()} for d in (self._mean, found))
        if mine != theirs:
            raise RuntimeError(
                f"the answer has layers and shapes {theirs}, and the mean so far {mine}; reduce the tokens at both "
                "ends, and name layers that run for every prompt"
            )

    def _check_model(self) -> None:
        self._check_whole()
        if self._model is None:
            raise RuntimeError(
                "this mean was loaded without its model: JacobianMean.load(path, model) can add prompts"
            )
        state = fingerprint.state_of(self._model)
        if state == self._state:
            return
        if fingerprint.of_module(self._model) != self._of:
            of = [name for name in state if state[name] != self._state.get(name)]
            name = repr(of[0]) if of else "a part"
            raise RuntimeError(
                f"{name} of the model was written to or replaced since this mean was made, which is of the model as it "
                "was; make another JacobianMean"
            )
        self._state = state

    def _check_prompt(self, number: int, prompt: Any) -> None:
        if fingerprint.of_value((prompt, AUTO)) != self._prompts[number]:
            raise RuntimeError(
                f"prompts[{number}] is not the one that was added before in its place: pass the same prompts in the "
                "same order, or start another mean"
            )

    def _check_same(self, other: JacobianMean, whose: str) -> None:
        """Raise RuntimeError for a mean of something else."""
        if self._of != other._of:
            raise RuntimeError(f"{whose} is of another model: its modules or its weights differ")
        for name, value in self._asked.items():
            if fingerprint.of_value(value) != fingerprint.of_value(other._asked[name]):
                raise RuntimeError(
                    f"{whose} is of another reduction: its {name} is {other._asked[name]!r}, and here {value!r}"
                )
        if self._errors != other._errors:
            raise RuntimeError(
                f"{whose} has errors={other._errors}, and this errors={self._errors}"
            )

    def _go_on_from(self, path: str | os.PathLike) -> None:
        """Take what a file has, where that is more than this mean."""
        left = JacobianMean.load(path)
        self._check_same(left, os.fspath(path))
        n = min(self.count, left.count)
        if self._prompts[:n] != left._prompts[:n]:
            raise RuntimeError(
                f"{os.fspath(path)} has other prompts than this mean; merge the two, or pass another path"
            )
        if left.count > self.count:
            self._prompts, self._mean, self._squares = left._prompts, left._mean, left._squares
