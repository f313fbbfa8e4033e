"""The engine. Its folders, lowest first: base, device, maps, rules, read, plan, run, prologue; then meet, second and
parameters, side by side; calls, compile, tools. Each imports what is below it alone.

``jactri.kernels`` is imported here: it is a folder of the installed package, but in a clone lies beside it, where no
import would find it (or find that of another clone).
"""

import importlib
import pathlib
import sys


def _import_kernels() -> None:
    package, here = sys.modules["jactri"], pathlib.Path(__file__).resolve()
    inside, beside = here.parents[1] / "kernels", here.parents[2] / "kernels"
    if (inside / "__init__.py").is_file():
        return
    if not (beside / "__init__.py").is_file():
        raise ImportError(
            f"jactri.kernels is neither in {inside} nor in {beside}: clone the whole repository, or install jactri, "
            "pip install -e path/to/the/clone"
        )
    package.__path__.append(str(beside.parent))
    try:
        importlib.import_module("jactri.kernels")
    finally:
        package.__path__.pop()


_import_kernels()
