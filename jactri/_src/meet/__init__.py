"""Partial Jacobians, multiplied."""
