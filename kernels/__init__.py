"""jactri's Triton kernels, imported as ``jactri.kernels``.

Three layers: a ``@triton.jit`` kernel, a launcher (tensors in, a new tensor out), and the caller who decides
(`backends`). Kernels know shapes and strides, never rules, and never write to what they read: `launches` runs
them, each with one tensor to write to. A module that imports triton is imported at its first use: this package,
`support` and `launches` are free of it.
"""
