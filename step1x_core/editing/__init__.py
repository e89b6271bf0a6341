"""Batches of edits, and edits of a part of an image."""
