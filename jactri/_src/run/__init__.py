"""What executes a plan: chunks, answers, entries."""
