"""What an engine made of a compiled call: kernels, with the ops that each holds, and calls that it left to libraries.

Inductor keeps which nodes of its graph each kernel was made of ("provenance tracking", torch._inductor.debug): with
what it caches, and in AOTInductor packages.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..base.tables import Shown

TRACKED = {"trace.provenance_tracking_level": 2}
"""Of Inductor: node names alone, without where in Python they come from."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of the compiler's, or a call of a library, as mm or convolution.

    Attributes:
        name: as the compiler has it.
        ops: of the compiler's graph: as often as it holds them, by name.
        fused: whether it is a kernel, rather than a call.
    """

    name: str
    ops: tuple[str, ...]
    fused: bool

    def __str__(self) -> str:
        counts = Counter(self.ops or ["copy"])
        return ", ".join(op if n == 1 else f"{op} x{n}" for op, n in counts.items())


@dataclass(frozen=True)
class Part:
    """A graph that an engine runs: the call itself, or its backward.

    Attributes:
        name: which of the two.
        engine: what runs it.
        ops: how many the traced graph has.
        kernels: in the order in which they run; None where there are none, with ``"fx"``, or the compiler did not say.
    """

    name: str
    engine: str
    ops: int
    kernels: tuple[Kernel, ...] | None

    def __str__(self) -> str:
        head = f"{self.name}: {self.engine} runs {self.ops} ops"
        if self.kernels is None:
            return head + (
                ", one after another" if self.engine == "fx" else "; its kernels are not known"
            )
        fused = sum(k.fused for k in self.kernels)
        head += f" as {_count(fused, 'kernel')} and {_count(len(self.kernels) - fused, 'call')}"
        rows = [f"  {'kernel' if k.fused else 'call':6}  {k}" for k in self.kernels]
        return "\n".join([head, *rows])


@dataclass(frozen=True, repr=False)
class Compilation(Shown):
    """How a compiled call runs; ``str()`` of it is a table.

    Attributes:
        name: the call.
        reason: why it runs eagerly, as the ordinary call; None if it does not.
        parts: its graphs.
        looked_up: what of modules is looked up again at each call: ``0.weight``.
        fixed: how many tensors no module holds: as they were, but for writes in place.
        constants: how many tensors are constants of its graph, by ``freeze=True``.
        seconds: what the trace took, and the compilation.
        cuda_graph: whether it is replayed as one CUDA graph.
    """

    name: str
    reason: str | None
    parts: tuple[Part, ...] = ()
    looked_up: tuple[str, ...] = ()
    fixed: int = 0
    constants: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)
    cuda_graph: bool = False

    def _parts(self) -> list[str]:
        if self.reason is not None:
            return [f"{self.name} runs eagerly: {self.reason}"]
        lines = [
            "{}: traced in {:.2g} s, compiled in {:.2g} s".format(self.name, *self.seconds),
            *map(str, self.parts),
            "looked up at each call: " + (", ".join(self.looked_up) or "nothing"),
        ]
        if self.fixed:
            lines.append(f"as they were: {_count(self.fixed, 'tensor')} that no module holds")
        if self.constants:
            lines.append(f"constants: {_count(self.constants, 'tensor')}, updates are not seen")
        if self.cuda_graph:
            lines.append("replayed as one CUDA graph")
        return lines


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def of_artifact(made: Any) -> tuple[Kernel, ...] | None:
    """The kernels of what `torch._inductor.standalone_compile` made; None where nothing may be cached."""
    from torch.compiler._cache import CacheArtifactManager

    if made._artifacts is None:
        return None
    cached = CacheArtifactManager.deserialize(made._artifacts[0]) or {}
    return of_graphs([pickle.loads(a.content) for a in cached.get("inductor", ())])


def of_graphs(graphs: Sequence[Any]) -> tuple[Kernel, ...] | None:
    """The kernels of what Inductor made of graphs."""
    if not graphs:
        return None
    # what has nothing to compute is a function of Python
    told = [json.loads(getattr(g, "inductor_provenance_mapping_str", None) or "{}") for g in graphs]
    return tuple(k for t in told for k in _kernels(t.get("cppCodeToPost", {})))


def of_package(path: str) -> tuple[Kernel, ...] | None:
    """The kernels of an AOTInductor package."""
    with zipfile.ZipFile(path) as package:
        found = [n for n in package.namelist() if n.endswith("kernel_information.json")]
        if not found:
            return None
        nodes = json.loads(package.read(found[0]))
    return _kernels({name: entry["post_grad_nodes"] for name, entry in nodes.items()})


def _kernels(nodes: Mapping[str, Sequence[str]]) -> tuple[Kernel, ...]:
    """Of what each is made; names end in a number, by which they run: ``extern_kernels.mm:2``."""
    numbered = sorted((int(k.rsplit(":", 1)[1]), k.rsplit(":", 1)[0], k) for k in nodes)
    calls = {k: _called(name) for _, name, k in numbered if "_fused_" not in name}
    # a kernel that lays out the operands of a call has its node, too
    elsewhere = {n for k, op in calls.items() for n in nodes[k] if _op(n) == op.split(".")[-1]}
    return tuple(
        Kernel(name, (calls[k],), False)
        if k in calls
        else Kernel(
            name,
            tuple(sorted(_op(n) for n in nodes[k] if not _GIVEN.match(n) and n not in elsewhere)),
            True,
        )
        for _, name, k in numbered
    )


_GIVEN = re.compile(r"_?(arg|primals|tangents|held|constant|known|frozen_param)_?\d+(_\d+)?$")
"""Names of what is no op: a kernel lays it out."""


def _called(name: str) -> str:
    """The op of a call as Inductor names it: extern_kernels.mm, torch.ops.aten.topk.default, aoti_torch_cpu_mm_out."""
    op = re.sub(
        r"^(extern_kernels\.|torch\.ops\.(aten\.)?|aten\.|aoti_torch_(cpu_|cuda_)?)", "", name
    )
    return re.sub(r"(\.default|\.out|_out)$", "", op)


def _op(node: str) -> str:
    """The op of a node, by its name: ``mul_3``, ``slice_tensor_1`` (of the overload slice.Tensor)."""
    name = re.sub(r"_\d+$", "", node)
    known = hasattr(torch.ops.aten, name) or hasattr(torch.ops.prims, name)
    return name if known or "_" not in name else name.rsplit("_", 1)[0].rstrip("_")
