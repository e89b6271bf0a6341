"""Checkpoints to ComfyUI's MODEL, CLIP and VAE objects, LoRA on them, and the folders they are found in."""
