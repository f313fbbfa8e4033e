"""What everything uses: memory, rates, progress, tensors that are kept."""
