"""A call as one graph for PyTorch's compiler, and as a package."""
