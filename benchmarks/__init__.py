"""Benchmarks of jactri against the other ways to get the same Jacobian.

``pytest benchmarks --benchmark-only`` times every case by itself;
``python -m benchmarks.compare`` times all contenders of a workload interleaved in one process,
which is what a ratio should be read from. Both check a result before they time it.
"""
