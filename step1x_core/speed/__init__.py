"""Methods that reduce the computation of a step."""
