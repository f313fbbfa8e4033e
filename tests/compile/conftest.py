"""Compile-only checks: ``pytest tests/compile``, on any machine with triton, without a GPU."""
