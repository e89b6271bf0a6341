"""Step1X-Edit as one of ComfyUI's model families: its transformer, blocks and attention, and what is relied on in the host."""
