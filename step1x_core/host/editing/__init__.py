"""Batches of edits through ComfyUI, and keeping what an edit did not change."""
