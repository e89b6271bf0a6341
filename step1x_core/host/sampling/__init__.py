"""Sampling with ComfyUI's samplers, norm-limited guidance included."""
