"""Second order: curvature of ops, the forward Laplacian."""
