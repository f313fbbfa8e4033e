"""One command that proves and measures jactri on a GPU: ``python -m benchmarks.gpu lease``."""
