"""Text that the language model writes: choosing tokens, templates, replies, reflection, judging."""
