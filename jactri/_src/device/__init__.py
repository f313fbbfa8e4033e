"""Which kernel or library runs a step; jactri.kernels is known here."""
