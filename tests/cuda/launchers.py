"""Launches of workloads by Triton's own driver and its C launchers, over the libcuda that the first argument names.

All is real but the compile of most kernels, which stands back behind an empty file: the arguments, their packing in C,
the grids, how a kernel is loaded. Kernels of the workload ``compiled`` are compiled too, so that their shared memory is
what a GPU would be asked for. With an unpacked cache in TRITON_CACHE_DIR kernels and launchers come from there. Prints
counts as JSON; what goes wrong is raised.
"""

import ctypes
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from triton import knobs, runtime
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from benchmarks.gpu import cache, fake
from benchmarks.gpu.bench import own
from benchmarks.gpu.device import SETTINGS, precision
from benchmarks.gpu.sizes import sized

LIBCUDA, *WORKLOADS, COMPILED = sys.argv[1:]
library = ctypes.CDLL(LIBCUDA, ctypes.RTLD_GLOBAL)
"""By its name this is the libcuda that the driver and launchers find."""

folder = Path(tempfile.mkdtemp())
compile_, compiles, built = JITFunction._do_compile, False, []
device = fake.install()


def build(name, source, into, library_dirs, include_dirs, libraries):
    """Triton's own command, without its optimisation, which takes the most time."""
    built.append(name)
    file = Path(into) / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    command = ["gcc", source, "-O0", "-shared", "-fPIC", "-w", "-o", file]
    command += [f"-l:{n}" for n in libraries]
    command += [f"-L{d}" for d in library_dirs]
    include = sysconfig.get_paths(sysconfig.get_default_scheme())["include"]
    command += [f"-I{d}" for d in (*include_dirs, into, include)]
    subprocess.run(command, check=True)
    return str(file)


knobs.build.impl = build
knobs.nvidia.libcuda_path = str(Path(LIBCUDA).parent)
if not cache.begin():
    knobs.cache.dir = str(folder / "cache")


class Driver(CudaDriver):
    """Triton's, on the device that is not there."""

    def __init__(self):
        super().__init__()
        self.get_current_stream = lambda device=None: 0


def loaded(self, key, signature, on, constexprs, options, attrs, warmup):
    """The kernel as the compile would give it; most with an empty binary, that needs nothing."""
    if compiles:
        return compile_(self, key, signature, on, constexprs, options, attrs, warmup)
    about = {
        **options.__dict__, "target": vars(target), "hash": "", "name": self.__name__, "shared": 0, "tmem_size": None,
        "tensordesc_meta": [], **dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0),
        **dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1),
    }  # fmt: skip
    json_, cubin = (folder / f"{self.__name__}.{n}" for n in ("json", "cubin"))
    json_.write_text(json.dumps(about, default=str))
    cubin.write_bytes(b"\x7fELF")
    source = ASTSource(self, signature, constexprs, attrs)
    made = CompiledKernel(source, {p.name: str(p) for p in (json_, cubin)}, "")
    self.device_caches[on][0][key] = made
    made._init_handles()
    return made


JITFunction._do_compile = loaded
driver = Driver()
target = driver.get_current_target()
runtime.driver.set_active(driver)

for size in sized(WORKLOADS):
    compiles = size.name == COMPILED
    for setting in SETTINGS:
        with device, precision(setting):
            net, x = device.problem(size.workload)
            own("triton").make(size.workload, net)(x)
print(
    json.dumps(
        {
            "launches": library.mock_launches(),
            "kernels": library.mock_modules(),
            "built": len(built),
            "target": [target.backend, target.arch],
            "cache": cache.counted(),
        }
    )
)
