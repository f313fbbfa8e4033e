"""Plans, which hold no tensors: sweeps, patterns, windows, samples, order by cost."""
