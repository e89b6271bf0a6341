"""Making edit pairs with ComfyUI's models."""
