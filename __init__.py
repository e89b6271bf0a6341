"""Step1X-Edit as a native ComfyUI model."""

import importlib.util

WEB_DIRECTORY = "./web"

# Outside ComfyUI (tests, tools) `step1x_core` stays importable on its own.
if importlib.util.find_spec("comfy_api") is not None:
    from .nodes import Step1XEditExtension

    async def comfy_entrypoint() -> Step1XEditExtension:
        return Step1XEditExtension()
