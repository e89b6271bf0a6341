"""Schedule and guidance of the official code."""
