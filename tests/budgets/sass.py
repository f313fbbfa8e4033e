"""What the machine code of a kernel costs on a Hopper multiprocessor: by loop, counted, not measured.

Rates, a multiprocessor and cycle: 4 instructions issued, one by each of its quarters; 2048 bf16 or 1024 tf32
multiply-adds of tensor cores (H100 datasheet: 989 and 495 TFLOP/s on 132 multiprocessors at 1.83 GHz); 64 lanes of
integer, logical, comparison and conversion instructions; 16 of the special functions (CUDA C++ Programming Guide,
arithmetic instructions, compute capability 9.0). What memory takes, and waiting, is not in these figures.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")

CLASSES = {
    "mma": "HGMMA HMMA",
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HFMA2 HMUL2 HFMA2",
    "alu": "IADD3 VIADD LOP3 SHF PRMT SEL LEA ISETP FSETP FSEL FMNMX VIMNMX IMNMX F2FP PLOP3 MOV IABS",
    "imad": "IMAD VIADDMNMX",
    "xu": "MUFU F2F F2I I2F FRND I2FP POPC FLO",
    "global": "LDG STG LDGSTS UTMALDG UTMASTG RED ATOMG ATOM LDGDEPBAR",
    "shared": "LDS STS LDSM STSM ATOMS",
    "spill": "LDL STL",
    "shuffle": "SHFL",
}
_CLASS = {op: name for name, ops in CLASSES.items() for op in ops.split()}


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop that are in no inner one, once through, of one warp; ``depth`` 0 is outside of all.

    slots: instructions issued; alu, xu: cycles of those units; tensor: cycles of the tensor cores, which serve four
    warps at once. Times a program's warps / 4 each is the multiprocessor's cycles.
    """

    depth: int
    slots: int
    tensor: float
    alu: int
    xu: int
    classes: dict[str, int] = field(default_factory=dict)


def loops(sass: str) -> list[Loop]:
    """The loops of a kernel's code (``cuobjdump -sass``), in order, each outer one before its inner ones."""
    code = [(int(at, 16), op, rest) for at, op, rest in _LINE.findall(sass)]
    ends: dict[int, int] = {}  # of each start, the last jump back to it
    for at, op, rest in code:
        to = re.search(r"\b0x([0-9a-f]+)", rest)
        if op.startswith("BRA") and to and int(to[1], 16) < at:
            ends[int(to[1], 16)] = at
    inside: dict[int | None, list[str]] = {None: [], **{start: [] for start in sorted(ends)}}
    depths = {start: sum(s <= start and ends[s] >= ends[start] for s in ends) for start in ends}
    for at, op, _ in code:
        around = [s for s in ends if s <= at <= ends[s]]
        inside[max(around, key=depths.__getitem__, default=None)].append(op)
    return [_counted(depths.get(start, 0), ops) for start, ops in inside.items()]


def _counted(depth: int, ops: list[str]) -> Loop:
    classes = Counter(_CLASS.get(op.split(".")[0], "other") for op in ops)
    tensor = sum(int(n) / 2 for op in ops for n in re.findall(r"^HGMMA\.64x(\d+)x", op))
    return Loop(depth, len(ops), tensor, 2 * classes["alu"], 8 * classes["xu"], dict(classes))


def described(loop: Loop, warps: int) -> str:
    """A line: cycles of a multiprocessor for one pass of a program, and the instructions of a warp by class."""
    share = warps / 4
    units = {"issue": loop.slots, "tensor": loop.tensor, "alu": loop.alu, "xu": loop.xu}
    cycles = " ".join(f"{name} {n * share:.0f}" for name, n in units.items())
    found = ", ".join(f"{n} {c}" for c, n in sorted(loop.classes.items(), key=lambda c: -c[1]))
    return f"{'    ' * loop.depth}{cycles}: {found}"
