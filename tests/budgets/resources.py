"""What a compiled kernel uses: registers, spills, shared memory, and which matrix instructions it issues."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton
from sass import Loop, loops

_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Resources:
    """Registers a thread, bytes spilled a thread, bytes of shared memory a program, instructions by name."""

    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int] = field(default_factory=dict)
    widest_load: int = 0
    serialised: bool = False
    loops: list[Loop] = field(default_factory=list)
    """Of sm_90's code: see `sass`."""


def read_nvidia(cubin: str, log: str, shared: int) -> Resources:
    """From a cubin and what ptxas said while it was made."""
    usage = re.search(r"Used (\d+) registers", log)
    spill = re.search(r"(\d+) bytes spill stores", log)
    sass = subprocess.run(
        [str(_BIN / "cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    ops = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    matrix = Counter(o for o in ops if re.match(r"(HMMA|HGMMA|UTC\w*MMA)\b", o))
    loads = [int(n) for o in ops if o.startswith("LDG") for n in re.findall(r"\.(32|64|128)\b", o)]
    loads += [32 for o in ops if o.startswith("LDG")]
    return Resources(
        int(usage[1]), int(spill[1]), shared, dict(matrix), max(loads, default=0), "wgmma" in log,
        loops(sass),
    )  # fmt: skip


def read_amd(assembly: str, shared: int) -> Resources:
    """From the assembly that the AMD backend leaves."""
    text = Path(assembly).read_text()

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    matrix = Counter(re.findall(r"\bv_mfma_\w+", text))
    loads = re.findall(r"\b(?:global|buffer)_load_dword(?:x(\d))?\b", text)
    spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return Resources(
        number("vgpr_count"),
        spilled,
        shared,
        dict(matrix),
        max((32 * int(n or 1) for n in loads), default=0),
    )
