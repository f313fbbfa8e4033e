"""Second order: the forward Laplacian."""
