#!/usr/bin/env python3
"""Keeps the translations of the nodes complete: `python scripts/dev/locales.py`.

Writes locales/en/nodeDefs.json anew from the nodes, where a node says nothing itself with what the file said before, drops from the other
languages what no node has any more, and tells what is missing. With --check nothing is written.
"""

import argparse
import asyncio
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "support"))
import environment

FOLDER = environment.PACK / "locales"
FILE = "nodeDefs.json"
SOURCE, TRANSLATIONS = "en", ("zh",)
# The editor shows it behind a seed.
AFTER_GENERATE = "control_after_generate"
PACKAGE = "step1x_edit_locales"


def node_schemas() -> list:
    """The schemas of all nodes of the menu. Needs the host in this process."""
    spec = importlib.util.spec_from_file_location(
        PACKAGE, environment.PACK / "__init__.py", submodule_search_locations=[str(environment.PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)

    async def load():
        return await (await module.comfy_entrypoint()).get_node_list()

    return [node.GET_SCHEMA() for node in asyncio.run(load()) if not node.DEV_ONLY]


def slots(schema) -> tuple[dict, dict]:
    """Name and tooltip of each input and output as the editor looks them up; None where the node says nothing."""
    inputs = {}
    for entry in schema.inputs:
        inputs[entry.id] = {"name": entry.display_name or entry.id, "tooltip": entry.tooltip}
        if getattr(entry, AFTER_GENERATE, None):
            inputs[AFTER_GENERATE] = {"name": "control after generate"}
        # What a choice opens the editor names "choice.widget", and a dot in a key is an underscore.
        options = getattr(entry, "options", None) or ()
        for nested in (nested for option in options for nested in getattr(option, "inputs", ())):
            inputs[f"{entry.id}_{nested.id}"] = {"name": nested.display_name or nested.id, "tooltip": nested.tooltip}
    outputs = {
        str(i): {"name": entry.display_name or entry.get_io_type(), "tooltip": entry.tooltip}
        for i, entry in enumerate(schema.outputs)
    }
    return inputs, outputs


def definitions() -> dict:
    """What the English file says of every node, None where the nodes leave it to the file."""
    out = {}
    for schema in node_schemas():
        inputs, outputs = slots(schema)
        out[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": inputs,
            "outputs": outputs,
        }
    return out


def fill(expected: dict, found: dict) -> dict:
    """The texts of `expected`, and for its gaps those of `found`."""
    return {
        key: fill(value, found.get(key, {})) if isinstance(value, dict) else value or found.get(key, "")
        for key, value in expected.items()
    }


def prune(expected: dict, found: dict) -> dict:
    """The entries of `found` that `expected` has, in its order."""
    return {
        key: prune(value, found[key]) if isinstance(value, dict) else found[key]
        for key, value in expected.items()
        if key in found
    }


def paths(tree: dict, prefix: str = "") -> dict[str, str]:
    out = {}
    for key, value in tree.items():
        out |= paths(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def problems(expected: dict, found: dict) -> list[str]:
    """Entries that `found` lacks, leaves empty, or has though no node does."""
    there = paths(found)
    missing = [f"missing: {path}" for path in paths(expected) if not there.get(path)]
    return missing + [f"stale: {path}" for path in there if path not in paths(expected)]


def read(language: str) -> dict:
    path = FOLDER / language / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(language: str, content: dict) -> None:
    (FOLDER / language / FILE).write_text(
        json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    environment.use_host_in_process()
    expected = definitions()
    files = {SOURCE: read(SOURCE) if options.check else fill(expected, read(SOURCE))}
    files |= {
        language: read(language) if options.check else prune(expected, read(language)) for language in TRANSLATIONS
    }
    faults = [
        f"{language}: {problem}" for language, content in files.items() for problem in problems(expected, content)
    ]
    if options.check:
        faults += [
            f"{SOURCE}: outdated: {path}"
            for path, text in paths(expected).items()
            if text and paths(files[SOURCE]).get(path, text) != text
        ]
    else:
        for language, content in files.items():
            write(language, content)
    print("\n".join(faults) or "Every node is translated.")
    return 1 if faults else 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
