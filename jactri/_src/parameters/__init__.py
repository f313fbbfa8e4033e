"""Where parameters are used; factors of their Jacobian, and inner products of these."""
