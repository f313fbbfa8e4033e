"""``PYTHONPATH=. python tests/budgets/table.py [PATTERN] [--write] [--loops]``: what kernels use, for their authors.

``--loops`` prints what each loop costs a multiprocessor of sm_90 (see `sass`), the code outside of them first.

``--write`` keeps the larger of each figure and the one that is there in budgets.json: run it with each version of
triton, after removing what no longer exists.
"""

import json
import sys
from pathlib import Path

from pool import run
from sass import Loop, described

BUDGETS = Path(__file__).with_name("budgets.json")
FIGURES = ("registers", "spilled", "shared")


def main():
    from cases import jobs

    arguments = [a for a in sys.argv[1:] if not a.startswith("--")]
    chosen = [j for j in jobs() if not arguments or arguments[0] in " ".join(j)]
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    found = run(chosen)
    for job in chosen:
        key, one = " ".join(job), found[job]
        if isinstance(one, str):
            print(f"{key:50} {one[:300]}")
            continue
        used = one["resources"]
        print(
            f"{key:50} registers {used['registers']:3} spilled {used['spilled']:4} shared {used['shared']:6} "
            f"load {used['widest_load']:3} {one['seconds']:5.1f} s {'SERIALISED ' if used['serialised'] else ''}"
            f"{used['matrix']}"
        )
        if "--loops" in sys.argv:
            for loop in used["loops"]:
                print(described(Loop(**loop), one["warps"]))
        old = budgets.get(key, [0, 0, 0])
        budgets[key] = [max(used[f], o) for f, o in zip(FIGURES, old, strict=True)]
    if "--write" in sys.argv:
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(budgets.items())]
        BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
