"""What lets a step compute less."""
