"""Autograd's graph, read; what is private to torch is known here."""
