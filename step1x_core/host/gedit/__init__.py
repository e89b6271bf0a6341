"""Running GEdit-Bench."""
