"""What tells of calls: explain, check, profile, sparsity; and rules of one's own."""
