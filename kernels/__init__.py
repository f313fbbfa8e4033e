"""jactri's Triton kernels, imported as ``jactri.kernels``.

Three layers: a ``@triton.jit`` kernel, a launcher (tensors in, a new tensor out), and the caller who decides
(`jactri.backends`). Kernels know shapes and strides, never rules, and never write to what they read. A module that
imports triton is imported at its first use: this package and `jactri.kernels.support` are free of it.
"""
