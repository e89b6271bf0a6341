"""Text that the language model generates: choosing tokens, templates, replies, reflection, judging."""
