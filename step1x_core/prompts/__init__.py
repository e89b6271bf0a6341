"""How a prompt is laid out for the language model, by version."""
