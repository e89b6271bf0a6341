"""Making datasets of edit pairs."""
