"""All contact with ComfyUI's internals (`comfy.*`), in rooms of the same names as those of step1x_core."""
