"""Stock nodes and objects that have no effect on this model, or are refused: docs/stock_nodes.md has every sentence, and every node of the tests."""

import ast
import logging
import re
from pathlib import Path

import comfy.controlnet
import comfy.ldm.flux.controlnet
import comfy.ops
import demo_model
import pytest
import torch
from conftest import PACK
from stock_nodes import FEW, NODES, SAME, SIZE, SOURCE, STEPS, Demo, difference, right, run

from step1x_core.errors import Step1XError
from step1x_core.host.sampling.sampler import flow_sigmas, sample
from step1x_core.images import from_uint8

DOCS = PACK / "docs" / "stock_nodes.md"


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def demo():
    return Demo()


def test_flux_guidance_has_no_effect_and_says_so(demo, caplog):
    with caplog.at_level(logging.WARNING):
        out = demo.ksampler(positive=run("FluxGuidance", conditioning=demo.edit()[0], guidance=9.0)[0], steps=FEW)
    assert difference(out, demo.plain(steps=FEW)) < SAME and caplog.text.count("FluxGuidance has no effect") == 1


def controlled(demo) -> tuple[list, list]:
    """Both prompts of an edit under a tiny FLUX ControlNet."""
    network = comfy.ldm.flux.controlnet.ControlNetFlux(
        latent_input=True,
        in_channels=16,
        out_channels=16,
        vec_in_dim=8,
        context_in_dim=16,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[2, 2, 4],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=False,
        txt_ids_dims=[],
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    device = torch.device("cpu")
    control = comfy.controlnet.ControlNet(
        network,
        compression_ratio=1,
        latent_format=demo.model.model.latent_format,
        load_device=device,
        manual_cast_dtype=torch.float32,
    )
    return run(
        "ControlNetApplyAdvanced",
        positive=demo.edit()[0],
        negative=demo.edit()[1],
        control_net=control,
        image=from_uint8(SOURCE)[None],
        vae=demo.vae,
    )


REFUSED = {
    "FluxKontextMultiReferenceLatentMethod": (
        "places them itself. Remove that node",
        lambda demo: {
            "positive": run(
                "FluxKontextMultiReferenceLatentMethod", conditioning=demo.edit()[0], reference_latents_method="uxo/uno"
            )[0]
        },
    ),
    "FluxKVCache": (
        "recomputes it in every step. Remove that node",
        lambda demo: {"model": run("FluxKVCache", model=demo.model)[0]},
    ),
    "ControlNet": (
        "none exists for Step1X-Edit.* Remove 'Apply ControlNet'",
        lambda demo: dict(zip(("positive", "negative"), controlled(demo))),
    ),
    "ConditioningSetArea": (
        "Use 'Conditioning \\(Set Mask\\)'",
        lambda demo: {
            "positive": run(
                "ConditioningSetArea", conditioning=demo.edit()[0], width=SIZE, height=SIZE // 2, x=0, y=0, strength=1.0
            )[0]
        },
    ),
    "ConditioningConcat": (
        "cannot be concatenated. Write everything into one prompt",
        lambda demo: {
            "positive": run(
                "ConditioningConcat", conditioning_to=demo.edit()[0], conditioning_from=demo.edit("add")[0]
            )[0]
        },
    ),
    "conditioning": (
        "expected 48. Encode the prompt with the text encoder from",
        lambda demo: {"positive": [[torch.ones(1, 77, 768), {}]]},
    ),
    "latent": (
        "The latent has shape \\[1, 4, 16, 16\\].* belongs to another model",
        lambda demo: {"latent": {"samples": torch.ones(1, 4, 16, 16)}},
    ),
    "video latent": (
        "The latent has shape \\[1, 16, 1, 16, 16\\].* belongs to another model",
        lambda demo: {"latent": {"samples": torch.ones(1, 16, 1, 16, 16)}},
    ),
    "reference": (
        "The reference latent has shape \\[1, 4, 16, 16\\].* belongs to another model",
        lambda demo: {
            "positive": run(
                "ReferenceLatent", conditioning=demo.edit()[0], latent={"samples": torch.ones(1, 4, 16, 16)}
            )[0]
        },
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_leaves_nothing_behind(demo, name):
    sentence, inputs = REFUSED[name]
    before = demo.ksampler(steps=1)
    with pytest.raises(Step1XError, match=sentence) as info:
        demo.ksampler(**inputs(demo))
    assert re.sub(r"\b\d+\b", "N", re.sub(r"\[.*?\]", "[...]", str(info.value))) in DOCS.read_text(encoding="utf-8")
    assert difference(demo.ksampler(steps=1), before) == 0


@pytest.mark.parametrize(
    "node, inputs",
    [
        ("ModelSamplingSD3", {"shift": 1.0}),
        ("ModelSamplingStableCascade", {"shift": 2.0}),
        ("ModelSamplingContinuousV", {"sampling": "v_prediction", "sigma_max": 500.0, "sigma_min": 0.03}),
        *(
            ("ModelSamplingDiscrete", {"sampling": sampling})
            for sampling in ("eps", "v_prediction", "lcm", "x0", "img_to_img")
        ),
        *(
            ("ModelSamplingContinuousEDM", {"sampling": sampling})
            for sampling in ("v_prediction", "edm", "eps", "cosmos_rflow")
        ),
    ],
)
@pytest.mark.parametrize("sampler", ["ours", "KSampler", "SamplerCustomAdvanced"])
def test_times_and_predictions_of_other_models_are_refused_before_the_first_step(
    demo, monkeypatch, node, inputs, sampler
):
    model = run(node, model=demo.model, **inputs)[0]
    positive, negative, latent = demo.edit()
    called = []
    monkeypatch.setattr(type(demo.model.model), "apply_model", lambda *args, **kwargs: called.append(1))
    with pytest.raises(
        Step1XError, match="The model's sampling was changed to .*a flow with times from 0 to 1"
    ) as info:
        if sampler == "ours":
            sample(
                model,
                positive,
                negative,
                latent,
                flow_sigmas(2, latent["samples"]),
                1.5,
                1,
                callback=lambda *args: None,
            )
        elif sampler == "KSampler":
            run(
                "KSampler",
                model=model,
                positive=positive,
                negative=negative,
                latent_image=latent,
                seed=1,
                steps=2,
                cfg=1.5,
                sampler_name="euler",
                scheduler="simple",
                denoise=1.0,
            )
        else:
            guider = run("CFGGuider", model=model, positive=positive, negative=negative, cfg=1.5)[0]
            run(
                "SamplerCustomAdvanced",
                noise=run("RandomNoise", noise_seed=1)[0],
                guider=guider,
                sampler=run("KSamplerSelect", sampler_name="euler")[0],
                sigmas=flow_sigmas(2, latent["samples"]),
                latent_image=latent,
            )
    assert not called
    if node == "ModelSamplingSD3":
        assert re.sub(r"\b\d+\b", "N", str(info.value)).replace("from N to N", "from 0 to 1") in DOCS.read_text(
            encoding="utf-8"
        )


def test_model_sampling_aura_flow_keeps_times_up_to_one(demo):
    model = run("ModelSamplingAuraFlow", model=demo.model)[0]
    positive, negative, latent = demo.edit()
    out = run(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=1,
        steps=STEPS,
        cfg=demo_model.CFG,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )[0]
    assert right("recolour", demo.picture(out))


@pytest.mark.parametrize(
    "node, error",
    [
        ("FreeU", KeyError),
        ("FreeU_V2", KeyError),
        ("TomePatchModel", TypeError),
        ("SelfAttentionGuidance", AttributeError),
    ],
)
def test_patches_for_unets_fail(demo, node, error):
    with pytest.raises(error):
        demo.ksampler(run(node, model=demo.model)[0], steps=1)


# The page


def rows() -> list[list[str]]:
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_page_names_nodes_and_tests_that_exist():
    sources = [path.read_text(encoding="utf-8") for path in (PACK / "tests").rglob("test_*.py")]
    tests = {
        node.name for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
    }
    proven = set()
    for node, verdict, _, test in rows():
        names = set(re.findall(r"`([^`]+)`", node))
        assert names <= set(NODES) or "newer hosts" in verdict, names - set(NODES)
        assert test.strip("`") in tests, test
        proven |= names
    assert len(proven) >= 30


def test_page_names_every_node_of_the_tests():
    used = set(
        re.findall(
            r'(?:run\(|NODES\[)\s*"(\w+)"',
            "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_stock_*.py")),
        )
    )
    assert not used - {name for row in rows() for name in re.findall(r"`([^`]+)`", row[0])}
