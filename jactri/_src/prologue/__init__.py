"""What every public call does first: its arguments, modes and graph."""
