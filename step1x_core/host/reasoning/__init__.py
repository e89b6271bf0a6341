"""Text generation, thinking, and the rounds of the reflection loop."""
