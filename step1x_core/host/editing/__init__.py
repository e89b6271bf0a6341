"""Batches of edits through ComfyUI."""
