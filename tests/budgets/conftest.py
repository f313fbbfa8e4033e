"""Compile-only checks: ``pytest tests/budgets``, on any machine with triton, without a GPU."""
