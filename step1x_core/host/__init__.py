"""All contact with ComfyUI's internals (`comfy.*`). Tested with ComfyUI 0.18.2 and 0.30.0."""
