"""How an instruction is laid out for the language model, by version."""
