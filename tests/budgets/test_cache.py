"""Triton's cache on disk never answers with the code of an older activation."""

import shutil
import subprocess
import sys
from pathlib import Path

import jactri.kernels

KEYS = """
import torch
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton import runtime
from benchmarks.gpu.driver import Driver

found = {}


def noted(self, key, signature, device, constexprs, options, attrs, warmup):
    found[self.__name__] = ASTSource(self, signature, constexprs, attrs).hash()


JITFunction._do_compile = noted
runtime.driver.set_active(Driver("sm_90"))
from copied import chain, laplacian, linear
from copied.support import Factor

t, m = torch.ones(4, 64, 32), torch.ones(32, 32)
z = Factor(torch.ones(64, 32), "tanh")
chain.chain(t, (m, m), (None, z, None), precision="tf32")
linear.step(t, m, None, z, precision="tf32")
laplacian.chain(torch.ones(4, 1, 32).expand(4, 64, 32), (m, m), (z, z), precision="tf32")
for name in sorted(found):
    print(name, found[name])
"""


def _keys(folder: Path) -> dict[str, str]:
    made = subprocess.run(
        [sys.executable, "-c", KEYS],
        env={"PYTHONPATH": f"{folder}:{Path(__file__).parent}:{':'.join(sys.path)}"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return dict(line.split() for line in made.stdout.splitlines())


def test_an_edited_activation_is_compiled_anew(tmp_path):
    copy = tmp_path / "copied"
    shutil.copytree(jactri.kernels.__path__[0], copy)
    before = _keys(tmp_path)
    file = copy / "activations.py"
    text = file.read_text()
    assert text.count("return 1.0 - y * y\n") == 1
    file.write_text(text.replace("return 1.0 - y * y\n", "return 1.0 - y * y * y\n"))
    after = _keys(tmp_path)
    kernels = {"_chain", "_laplacian_chain", "_step"}
    assert kernels <= before.keys()
    assert {n for n in kernels if before[n] != after[n]} == kernels
