"""jactri's Triton kernels, imported as ``jactri.kernels``; there are none yet, and every device runs torch ops."""
