"""Schemas, documentation and workflows stay complete and consistent."""

import ast
import json
import os
import subprocess
import sys

import pytest
import tiny_models
import torch
from conftest import PACK
from loop_host import NAME, load_pack, node_classes

# Which nodes there are and what they call is what differs between releases.
pytestmark = pytest.mark.everywhere

EARLIER_PACKS = {
    "Step-1XEditNode",
    "Step1XEditModelLoader",
    "Step1XEditGenerate",
    "Step1XEditTeaCacheModelLoader",
    "Step1XEditTeaCacheGenerate",
    "REDStep1XEditModelLoader",
    "REDStep1XEditGenerate",
    "LoadImagePath",
    "LoadAEModel",
    "LoadDITModel",
    "LoadQwenVLModel",
    "Prompt",
    "GenerateEditedImage",
    "SaveEditedImage",
    "RunningHub_Step1XEdit",
}


@pytest.fixture(scope="module")
def schemas():
    """The nodes of the menu as the host loads them: by file path, under a name that is not ours.

    Its core is the one that all tests import: a second one's family, registered first, would be that of the models of every later test.
    """
    return {name: node.GET_SCHEMA() for name, node in node_classes(load_pack()).items() if not node.DEV_ONLY}


def node_module(name: str):
    """A module of the loaded pack."""
    return sys.modules[f"{NAME}.nodes.{name}"]


def test_loading_the_pack_as_the_host_does_leaves_one_family(schemas, model):
    from comfy.supported_models import models as families

    from step1x_core.host.network.model import Step1XEdit

    assert [family for family in families if family.__name__ == Step1XEdit.__name__] == [Step1XEdit] and type(
        model.model.model_config
    ) is Step1XEdit


def test_node_ids_are_ours_alone(schemas):
    assert all(name.startswith("Step1X") for name in schemas) and not EARLIER_PACKS & set(schemas)


def test_every_node_explains_itself(schemas):
    for name, schema in schemas.items():
        assert schema.description and schema.display_name and schema.search_aliases, name
        for entry in schema.inputs:
            assert entry.tooltip and entry.tooltip.rstrip().endswith("."), f"{name}.{entry.id} has no tooltip"


def test_defaults_are_the_official_ones(schemas):
    inputs = {f"{name}.{entry.id}": entry for name, schema in schemas.items() for entry in schema.inputs}
    # 0 stands for the version's own.
    assert all(
        inputs[f"{name}.steps"].default == inputs[f"{name}.cfg"].default == 0
        for name in ("Step1XEditSampler", "Step1XEditReflectionLoop")
    )
    assert inputs["Step1XEditReflectionLoop.rounds"].default == 3 and inputs["Step1XEditThinkPrompt.temperature"].default == 0.7
    assert inputs["Step1XEditEncode.size_level"].default == 1024 and inputs["Step1XEditGuidance.truncate"].default == -1


def test_guidance_node_takes_the_limit_of_the_models_version(schemas, models):
    module = node_module("sampling")
    for name, limit in ((tiny_models.V11_FILE, 0.93), (tiny_models.V12_FILE, 0.00093)):
        model = node_module("loaders").load_model(models / "diffusion_models" / name)
        for truncate, expected in ((-1.0, limit), (0.5, 0.5), (0.0, 0.0)):
            (hook,) = module.Step1XEditGuidance.execute(model, truncate, 0.4).result[0].model_options["sampler_pre_cfg_function"]
            assert hook.truncate == expected


def test_the_lora_loader_without_a_lora_returns_the_model(schemas, model):
    """Also where no LoRA is installed; an unknown name is still refused."""
    entry = next(entry for entry in schemas["Step1XEditLoadLora"].inputs if entry.id == "lora_name")
    load = node_module("loaders").Step1XEditLoadLora.execute
    assert entry.options[0] == "none" and load(model, "none", 1.0)[0] is model
    with pytest.raises(Exception, match="lora_name"):
        load(model, "missing.safetensors", 1.0)


def test_prompts_from_before_v12_still_validate(schemas):
    """They name no version for the text encoder; the host refuses a prompt that lacks a required input."""
    required = {entry.id for entry in schemas["Step1XEditMLLM"].inputs if not entry.optional}
    assert required == {"clip_name", "device"}


def test_sampler_makes_its_schedule_for_the_fitted_latent(schemas, model, clip, vae):
    """An empty latent of FLUX.2 becomes larger where the host knows its scale, and the schedule depends on the size."""
    from step1x_core.host.prompts.encoding import encode_edit
    from step1x_core.host.sampling.sampler import fit_latent, flow_sigmas, sample

    with torch.inference_mode():
        positive, negative, _ = encode_edit(clip, vae, torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)), "red", "", 64)
        empty = {"samples": torch.zeros(1, 128, 8, 8), "downscale_ratio_spacial": 16}
        fitted = fit_latent(model, empty)
        expected = sample(model, positive, negative, fitted, flow_sigmas(3, fitted["samples"]), 2.0, 5, callback=lambda *args: None)
        found = node_module("sampling").Step1XEditSampler.execute(model, positive, negative, empty, 5, 3, 2.0, "euler", 1.0).result[0]
    assert torch.equal(found["samples"], expected["samples"])


def test_every_node_has_a_documentation_page(schemas):
    for name, schema in schemas.items():
        page = (PACK / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for entry in schema.inputs:
            assert f"`{entry.id}`" in page, f"web/docs/{name}.md does not mention the input {entry.id}"
    pages = {p.stem for p in (PACK / "web" / "docs").glob("*.md")}
    assert pages == set(schemas), "a page without a node"


def test_workflows_only_use_known_nodes_and_connect_them(schemas):
    from nodes import NODE_CLASS_MAPPINGS

    workflows = sorted((PACK / "workflows").glob("*.json"))
    assert workflows
    for path in workflows:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        nodes = {node["id"]: node for node in workflow["nodes"]}
        extras = {
            "CFGGuider",
            "RandomNoise",
            "KSamplerSelect",
            "SamplerCustomAdvanced",
            "EmptySD3LatentImage",
            "MarkdownNote",
            "PreviewAny",
            "MaskPreview",
            "CreateList",
            "GetImageSize",
            "UpscaleModelLoader",
            "ImageUpscaleWithModel",
            "ImageCompositeMasked",
            "CustomCombo",
            "SaveLoRA",
            "PrimitiveStringMultiline",
        }
        for node in nodes.values():
            assert node["type"] in schemas or node["type"] in NODE_CLASS_MAPPINGS or node["type"] in extras, f"{path.name}: {node['type']}"
        for link, source, output, target, slot, kind in workflow["links"]:
            assert link in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == link
            assert kind == nodes[target]["inputs"][slot]["type"] and kind in (nodes[source]["outputs"][output]["type"], "*")


# The one module whose import needs more than the host brings everywhere: Triton is published for Linux only.
NEEDS_TRITON = "triton_kernels"
HIDDEN_TRITON = """import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def core_modules() -> list[str]:
    return [
        ".".join(p.relative_to(PACK).with_suffix("").parts)
        for p in sorted((PACK / "step1x_core").rglob("*.py"))
        if p.stem not in ("__init__", NEEDS_TRITON)
    ]


def python_without_host(code: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("STEP1X_COMFYUI", "PYTHONPATH")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACK, env=env)


@pytest.mark.once
def test_core_and_pack_import_without_comfyui_and_triton():
    modules = [name for name in core_modules() if not name.startswith("step1x_core.host")]
    assert "step1x_core.prompts.v11" in modules and "step1x_core.network.kernels" in modules
    imports = "; ".join(f"import {name}" for name in modules)
    result = python_without_host(f"{HIDDEN_TRITON}{imports}; assert not {{'comfy', 'triton'}} & {{m.split('.')[0] for m in sys.modules}}")
    assert result.returncode == 0, result.stderr
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('pack', '__init__.py', submodule_search_locations=['.']); "
        "m = u.module_from_spec(s); sys.modules['pack'] = m; s.loader.exec_module(m); assert not hasattr(m, 'comfy_entrypoint'); assert m.WEB_DIRECTORY"
    )
    result = python_without_host(code)
    assert result.returncode == 0, result.stderr


def test_only_the_host_package_touches_comfyui():
    for path in (PACK / "step1x_core").rglob("*.py"):
        if path.is_relative_to(PACK / "step1x_core" / "host"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(name.split(".")[0] in ("comfy", "comfy_api", "folder_paths", "nodes", "host") for name in names), path.name


def test_requirements_bring_nothing_beyond_the_host():
    lines = (PACK / "requirements.txt").read_text().splitlines()
    assert all(not line.strip() or line.startswith("#") for line in lines)


@pytest.mark.once
def test_the_blocks_run_where_triton_is_not_installed():
    """As on Windows and macOS. tests/pure never has it."""
    arguments = [
        "--rootdir",
        "tests",
        "-c",
        "tests/pytest.ini",
        "-p",
        "no:cacheprovider",
        "-k",
        "not triton",
        "tests/host/network/test_blocks.py",
    ]
    result = subprocess.run(
        [sys.executable, "-c", f"{HIDDEN_TRITON}import pytest; sys.exit(pytest.main({arguments!r}))"],
        capture_output=True,
        text=True,
        cwd=PACK,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
