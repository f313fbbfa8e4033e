"""Calls on many devices: batches that ranks have a part of each, sums over ranks, and tiles that go round."""
