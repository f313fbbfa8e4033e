"""Linear maps, and the algebra of their axes."""
