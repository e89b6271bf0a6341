"""Short texts on a node in the editor."""

import sys

from comfy_execution.utils import get_executing_context


def show_status(text: str) -> None:
    """Show a text on the node that is running. Does nothing where no server or no node runs: in a script or a test."""
    context = get_executing_context()
    # Not imported here: a running ComfyUI has done so, and outside of it the import would have side effects.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)
