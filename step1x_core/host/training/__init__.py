"""LoRA training on ComfyUI's models."""
