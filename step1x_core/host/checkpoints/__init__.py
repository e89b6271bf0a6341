"""Loads checkpoints as ComfyUI's MODEL, CLIP and VAE objects, applies LoRAs to them, and lists the folders they are
found in."""
