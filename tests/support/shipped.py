"""Shipped workflows as the server takes them."""

import json

from comfy_server import PACK, find_nodes, to_api


def shipped_prompt(client, name: str, *settings: dict[str, dict]) -> dict:
    """A shipped workflow in API form. settings: values of inputs by class of node, later ones before earlier ones."""
    workflow = json.loads((PACK / "workflows" / name).read_text(encoding="utf-8"))
    prompt = to_api(workflow, client.get("/object_info"))
    for values in settings:
        for class_type, inputs in values.items():
            for node in find_nodes(prompt, class_type):
                prompt[node]["inputs"].update(inputs)
    return prompt
