"""Batches of edits, edits of a part of an image, and keeping what was not edited."""
