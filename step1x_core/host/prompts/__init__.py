"""The language model on ComfyUI's Qwen2.5-VL, and the encoding of an edit."""
