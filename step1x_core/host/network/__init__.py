"""Step1X-Edit as one of ComfyUI's model families: its transformer, blocks and attention."""
