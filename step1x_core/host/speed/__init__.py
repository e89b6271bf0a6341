"""Model patches that let a step compute less."""
