"""What is computed from Jacobians without forming them: products, traces, second derivatives, parameters."""
