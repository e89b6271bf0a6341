"""Schedule and guidance, as the official code has them."""
