"""The parity runner takes golden files of other sizes than those that are here: altered copies whose truth is known are right, and wrong once it is changed.

Truth comes from formulas written out here, or from the network's blocks on tokens and ids laid out here.
"""

import json

import golden_checks
import golden_checks_conditioning
import golden_checks_v12
import golden_runner
import pytest
import torch
from golden_files import TOLERANCE, Golden
from safetensors import safe_open
from safetensors.torch import save_file
from test_goldens import GOLDENS, size_table

from step1x_core.host.network.transformer import position_bits
from step1x_core.host.prompts.text_encoder import Step1XTokenizer
from step1x_core.prompts.cut import KEPT
from step1x_core.versions import LAYOUT_V12

NAMES_V1 = {"dit_forward_v1.0.safetensors": 0, "dit_forward_v1.1.safetensors": 1}
NAMES_V12 = ("v12/transformer_final.safetensors", "v12/transformer_preview.safetensors")


def grid_ids(rows: int, columns: int, offset=(0, 0, 0)) -> torch.Tensor:
    """Position ids [N, 3] of a picture's tokens."""
    ids = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    return torch.cat((torch.zeros(len(ids), 1), ids), dim=1) + torch.tensor(offset, dtype=torch.float32)


def write(folder, golden: Golden, name: str) -> object:
    """A golden file with what `golden` holds, and its metadata entry."""
    with safe_open(golden.path, framework="pt") as file:
        (key, text), = file.metadata().items()
    meta = golden.config if key == "meta" else {**json.loads(text), "config": golden.config}
    groups = (("weights", golden.weights), ("inputs", golden.inputs), ("outputs", golden.outputs))
    path = folder / name.split("/")[-1]
    save_file(
        {f"{group}.{k}": v.clone().contiguous() for group, tensors in groups for k, v in tensors.items()},
        path,
        metadata={key: json.dumps(meta)},
    )
    return path


def must_compare(folder, golden: Golden, name: str, output: str) -> None:
    """The file is right, and wrong with one value of `output` changed."""
    assert golden_runner.check_file(write(folder, golden, name)) <= TOLERANCE
    tensor = golden.outputs[output] = golden.outputs[output].clone()
    tensor.view(-1)[-1] += 1e-3 * tensor.abs().max().clamp(min=1)
    assert golden_runner.check_file(write(folder, golden, name)) > TOLERANCE


def guided(cond, uncond, scale, power, limited):
    """The official combination of packed predictions [B, L, C]."""
    difference = cond - uncond
    norm = difference.norm(dim=-1, keepdim=True)
    return uncond + scale * (difference / (norm.clamp(min=1) ** power if limited else 1))


@pytest.mark.parametrize("channels", [3, 6, 10])
def test_guidance_of_packed_channels_that_are_no_multiple_of_4(tmp_path, channels):
    golden = Golden(GOLDENS / "cfg.safetensors")
    given, power = golden.inputs, golden.config["exponent"]
    generator = torch.Generator().manual_seed(channels)
    given.update({name: torch.randn(1, 7, channels, generator=generator) for name in ("x", "cond", "uncond", "ref")})
    norm = (given["cond"] - given["uncond"]).norm(dim=-1, keepdim=True)
    golden.outputs.update(diff_norm=norm, divisor=norm.clamp(min=1) ** power)
    for name, case in golden.config["cases"].items():
        velocity = guided(given["cond"], given["uncond"], case["cfg_guidance"], power, case["t_curr"] > case["timesteps_truncate"])
        golden.outputs[f"{name}.x_next"] = given["x"] + (case["t_prev"] - case["t_curr"]) * velocity
    must_compare(tmp_path, golden, "cfg.safetensors", next(name for name in golden.outputs if name.endswith("x_next")))


@pytest.mark.parametrize("channels", [5, 14])
def test_guidance_of_v12_likewise(tmp_path, channels):
    golden = Golden(GOLDENS / "v12/guidance.safetensors")
    for index, case in enumerate(golden.config["cases"]):
        generator = torch.Generator().manual_seed(index)
        cond, uncond = (torch.randn(1, 5, channels, generator=generator) for _ in range(2))
        golden.inputs.update({f"{index}.cond": cond, f"{index}.uncond": uncond})
        golden.outputs[f"{index}.guided"] = guided(cond, uncond, case["true_cfg_scale"], case["process_norm_power"], case["norm_limited"])
    must_compare(tmp_path, golden, "guidance.safetensors", "0.guided")


def other_tokens(seed: int, batch: int, count: int, channels: int, used: int) -> torch.Tensor:
    """Packed tokens of which only the first `used` channels are not zero."""
    tokens = torch.randn(batch, count, channels, generator=torch.Generator().manual_seed(seed))
    tokens[..., used:] = 0
    return tokens


@pytest.mark.parametrize("used", [16, 14, 9])
@pytest.mark.parametrize("reference", [(2, 4), (5, 7), None], ids=str)
@pytest.mark.parametrize("name", NAMES_V1)
def test_transformer_with_a_reference_of_another_size_and_other_channels(tmp_path, name, reference, used):
    golden = Golden(GOLDENS / name)
    given, out, c = golden.inputs, golden.outputs, golden.config
    target = c["latent_h"] // 2, c["latent_w"] // 2
    ids = torch.cat([grid_ids(*target), *([grid_ids(*reference, [NAMES_V1[name]] * 3)] if reference else [])])
    given.update(img_ids=ids.repeat(2, 1, 1), img=other_tokens(used, 2, len(ids), 16, used))

    with torch.inference_mode():
        network = golden_checks.golden_model(golden).model.diffusion_model
        seen = {}
        golden_checks.record_intermediates(network, seen)
        text, vector = network.connector(given["llm_embedding"], given["timesteps"], given["mask"], {})
        pred = network.forward_orig(given["img"].clone(), given["img_ids"], text, given["txt_ids"], given["timesteps"], vector,
                                    transformer_options=golden_checks.READ_ALL)
    out.update(pred=pred[..., :used], vec=seen["time_in"] + seen["vector_in"])
    out.update({f"connector.{part}": value for part, value in zip(("txt", "vec"), seen["connector"])})
    for part in list(out):
        if part in ("img_in", "txt_in") or part.startswith("single."):
            out[part] = seen[part]
        elif part.startswith("double."):
            block, stream = part.rsplit(".", 1)
            out[part] = seen[block][("img", "txt").index(stream)]
    # Without the channels that are zero the network is the same.
    given["img"], c["in_channels"], c["out_channels"] = given["img"][..., :used], used, used
    golden.weights["img_in.weight"] = golden.weights["img_in.weight"][:, :used]
    for part in ("weight", "bias"):
        golden.weights[f"final_layer.linear.{part}"] = golden.weights[f"final_layer.linear.{part}"][:used]
    must_compare(tmp_path, golden, name, "pred")


@pytest.mark.parametrize("reference, used", [((3, 2), 16), ((7, 5), 13)], ids=str)
@pytest.mark.parametrize("name", NAMES_V12)
def test_transformer_of_v12_likewise(tmp_path, name, reference, used):
    golden = Golden(GOLDENS / name)
    given, out = golden.inputs, golden.outputs
    target, texts = golden.config["latent_tokens_hw"], len(given["txt_ids"])
    given["img_ids"] = torch.cat((grid_ids(*target), grid_ids(*reference, (1, 0, 0))))
    given["hidden_states"] = other_tokens(used, 1, len(given["img_ids"]), 16, used)

    with torch.inference_mode():
        network = golden_checks_v12.golden_model(golden).model.diffusion_model
        seen = {}
        golden_checks.record_intermediates(network, seen)
        text, vector = network.connector(given["encoder_hidden_states"], given["timestep"], given["prompt_embeds_mask"], {})
        if network.text_token_mapping is not None:
            text = text + given["text_mask"][..., None] * network.text_token_mapping(given["text_embeddings"])
        ids = position_bits(given["txt_ids"][None]).view(torch.float32)
        pred = network.forward_orig(given["hidden_states"].clone(), given["img_ids"][None], text, ids, given["timestep"], vector,
                                    transformer_options=golden_checks.READ_ALL)
        cos, sin = golden_checks_v12.rope_parts(network, torch.cat((given["txt_ids"], given["img_ids"])))
    single = seen["single.0"]
    out.update(sample=pred[..., :used], double0_img=seen["double.0"][0], double0_txt=seen["double.0"][1], single0_txt=single[:, :texts],
               single0_img=single[:, texts:], rope_cos=cos, rope_sin=sin)
    given["hidden_states"] = given["hidden_states"][..., :used]
    golden.weights["x_embedder.weight"] = golden.weights["x_embedder.weight"][:, :used]
    for part in ("weight", "bias"):
        golden.weights[f"proj_out.{part}"] = golden.weights[f"proj_out.{part}"][:used]
    golden.config["config"].update(in_channels=used, out_channels=used)
    golden.config["reference_tokens_hw"] = list(reference)
    must_compare(tmp_path, golden, name, "sample")


@pytest.mark.parametrize("sizes", [{"a": [4, 6, 5, 8, 2], "b": [3, 5, 1, 2, 4]}, {"a": [2, 2, 3, 2, 2]}], ids=["other sizes", "one case"])
def test_ids_of_references_of_another_size(tmp_path, sizes):
    golden = Golden(GOLDENS / "ids.safetensors")
    given, latent = golden.inputs, golden.inputs["latent"]
    old = golden.outputs
    golden.outputs = {"unpacked_first_half": latent}
    generator = torch.Generator().manual_seed(0)
    given["ref_latent"] = torch.randn(2, 4, 2, 10, generator=generator)

    def packed(x):
        b, c, h, w = x.shape
        return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)

    golden.outputs["packed_img"] = torch.cat((packed(latent), packed(given["ref_latent"])), dim=1)
    for name, (h, w, text, ref_h, ref_w) in sizes.items():
        first = grid_ids(-(-h // 2), -(-w // 2))
        golden.outputs[f"{name}.t2i.img_ids"] = first
        for version, offset in (("v1.0", 0), ("v1.1", 1)):
            golden.outputs[f"{name}.{version}.img_ids"] = torch.cat((first, grid_ids(ref_h // 2, ref_w // 2, [offset] * 3)))
            golden.outputs[f"{name}.{version}.txt_ids"] = torch.zeros(text, 3)
    golden.config["cases"] = {name: row[:3] for name, row in sizes.items()}
    text = sizes["a"][2]
    angles = [
        torch.cat((torch.zeros(text, 3), golden.outputs["a.v1.1.img_ids"]))[:, axis, None].double()
        / golden.config["theta"] ** (torch.arange(0, n, 2) / n)
        for axis, n in enumerate(golden.config["axes_dim"])
    ]
    angle = torch.cat(angles, dim=-1)
    golden.outputs["rope_pe"] = (
        torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=-1)
        .unflatten(-1, (2, 2))[None, None]
        .float()
    )
    assert old["rope_pe"].shape[3:] == golden.outputs["rope_pe"].shape[3:]
    must_compare(tmp_path, golden, "ids.safetensors", "a.v1.0.img_ids")


@pytest.mark.parametrize("name, offset", [("denoise_loop_v1.0.safetensors", 0), ("denoise_loop_v1.1.safetensors", 1)])
@pytest.mark.parametrize("reference", [(2, 6), (8, 10)], ids=str)
def test_loop_with_a_reference_of_another_size(tmp_path, name, offset, reference):
    golden = Golden(GOLDENS / name)
    given, out, c = golden.inputs, golden.outputs, golden.config
    given["ref_latent"] = torch.randn(1, 4, *reference, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)

    def packed(x):
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    rows, columns = c["latent_h"] // 2, c["latent_w"] // 2
    first, second = packed(given["noise"]), packed(given["ref_latent"])
    out["packed_input"] = torch.cat((first, second), dim=1)
    out["img_ids"] = torch.cat((grid_ids(rows, columns), grid_ids(reference[0] // 2, reference[1] // 2, [offset] * 3))).repeat(2, 1, 1)
    count = first.shape[1]
    with torch.inference_mode():
        network = golden_checks.golden_model(golden).model.diffusion_model
        for tag, truncate in c["truncates"].items():
            x = first[:1]
            for step, (t, t_next) in enumerate(zip(out["timesteps"][:-1], out["timesteps"][1:])):
                times = t.repeat(2)
                text, vector = network.connector(given["llm_embedding"], times, given["mask"], {})
                pred = network.forward_orig(
                    torch.cat((x.repeat(2, 1, 1), second), dim=1),
                    out["img_ids"],
                    text,
                    torch.zeros(*text.shape[:2], 3),
                    times,
                    vector,
                    transformer_options=golden_checks.READ_ALL,
                )
                if step == 0:
                    out[f"{tag}.model_pred_step_0"] = pred
                x = x + (t_next - t) * guided(pred[:1, :count], pred[1:, :count], c["cfg_guidance"], 0.4, t > truncate)
                out[f"{tag}.latents_after_step_{step}"] = x
            out[f"{tag}.final_unpacked"] = network.unpack(x, c["latent_h"], c["latent_w"])
    must_compare(tmp_path, golden, name, "main.final_unpacked")


@pytest.mark.parametrize("height, width", [(20, 12), (26, 38)])
def test_autoencoder_of_factor_2_with_sides_that_are_no_multiple_of_8(tmp_path, height, width):
    golden = Golden(GOLDENS / "vae.safetensors")
    assert len(golden.config["ch_mult"]) == 2
    given, out = golden.inputs, golden.outputs
    generator = torch.Generator().manual_seed(0)
    given["image"] = torch.rand(1, 3, height, width, generator=generator)
    given["latent"] = torch.randn(1, golden.config["z_channels"], height // 2, width // 2, generator=generator)
    scale, shift = golden.config["scale_factor"], golden.config["shift_factor"]
    with torch.inference_mode():
        network = golden_checks.load_vae(golden).first_stage_model
        moments = network.encoder(given["image"] * 2 - 1)
        decoded = network.decoder(given["latent"] / scale + shift)
    mean, logvar = moments.chunk(2, dim=1)
    eps = torch.randn(mean.shape, generator=generator)
    picture = decoded.clamp(-1, 1) / 2 + 0.5
    out.update(
        moments=moments,
        eps=eps,
        encoded_mean=(mean - shift) * scale,
        encoded_sampled=(mean + (logvar.clamp(-30, 20) / 2).exp() * eps - shift) * scale,
        decoded=decoded,
        decoded_01=picture,
        decoded_uint8=(picture.movedim(1, -1) * 255).to(torch.uint8),
    )
    must_compare(tmp_path, golden, "vae.safetensors", "encoded_mean")


def table_error(folder, name: str, table: dict) -> float:
    path = folder / name
    path.write_text(json.dumps(table))
    return golden_runner.check_file(path)


@pytest.mark.parametrize("version", ["final", "preview"])
def test_tables_of_replies_may_hold_null(tmp_path, version):
    name = f"reflection_{version}.json"
    table = json.loads((GOLDENS / "v12" / name).read_text())
    rows = {"reflection_reply": {"valid": False, "cleaned": None, "round_success": False, "refine_prompt": None,
                                 "direct_format_text": {"success": False, "refine_prompt": None}},
            "json_block": {"result": None}, "score_caps": {"result": None}, "language_rule": {"result": "english"},
            "best_score_reply": {"valid": False, "parsed": None}}
    for part, row in rows.items():
        if part in table:
            table[part].append({"input": None, **row})
    clean = next(row for row in table["retries"] if row["name"] == "clean")
    table["retries"].append({**clean, "script": [clean["script"][0], None, *clean["script"][1:]], "n_calls": clean["n_calls"] + 1})
    assert table_error(tmp_path, name, table) == 0
    table["json_block"][-1]["result"] = {}
    assert table_error(tmp_path, name, table) > TOLERANCE


@pytest.mark.parametrize("version", ["final", "preview"])
def test_rounds_may_have_a_null_reply_and_no_scores(tmp_path, version):
    name = f"loop_control_{version}.json"
    table = json.loads((GOLDENS / "v12" / name).read_text())
    row = json.loads(json.dumps(next(row for row in table["cases"] if row["case"]["name"] == "success_first")))
    row["case"]["negative_prompt"] = None
    if version == "preview":
        row["case"]["rounds"][0][1] = None
    table["cases"].append(row)
    assert table_error(tmp_path, name, table) == 0


def test_size_table_may_name_no_error_as_null(tmp_path):
    table = size_table()
    for row in table["rows"]:
        row.setdefault("error", None)
        row.setdefault("mllm_error", None)
    assert table_error(tmp_path, "resize.json", table) == 0


def token_row(prompt: str, parts: list[tuple[str, bool]]) -> dict:
    """A row of tokens.json for a prompt whose parts are given, by hand; its ids and times by the pack."""
    tokenizer = Step1XTokenizer(layout=LAYOUT_V12)
    sequence = golden_checks_conditioning.Sequence(tokenizer, prompt, (640, 480))
    start, end, first = sequence.start, sequence.end, KEPT.start
    stop, cut = min(start, KEPT.stop), min(end, KEPT.stop)
    time = sequence.text_ids[:, 0].tolist()
    tokens = [(tokenizer.token_ids(part), quoted) for part, quoted in parts]
    mask = [int(quoted) for ids, quoted in tokens for _ in ids]
    return {
        "n_tokens_total": len(sequence.ids),
        "n_image_tokens": sequence.cells,
        "ids_before_image": None,
        "ids_before_image_from_prefix_end": sequence.ids[first + 1 : start],
        "ids_after_image": sequence.ids[end:],
        "first_kept_ids": sequence.ids[first : first + 4],
        "n_tokens_kept": len(time),
        "text_mask_sum": sum(mask[: KEPT.stop]),
        "text_mask_kept_before_image": sequence.mask[first:stop],
        "text_mask_kept_after_image": sequence.mask[start + 1 :][: KEPT.stop - cut],
        "mllm_pos_t_before_image": sequence.positions[0, :start].tolist(),
        "mllm_pos_t_after_image": sequence.positions[0, end:].tolist(),
        "mllm_image_pos_first": sequence.positions[:, start].tolist(),
        "mllm_image_pos_last": sequence.positions[:, end - 1].tolist(),
        "txt_ids_time_kept_before_image": time[: stop - first],
        "txt_ids_time_image": time[stop - first] if stop < cut else 0,
        "txt_ids_time_kept_after_image": time[cut - first :],
    }


BEGIN = [
    ("<|im_start|>", False),
    ("system\nYou are a helpful assistant.", False),
    ("<|im_end|>", False),
    ("\n", False),
    ("<|im_start|>", False),
]
END = [
    ("<|vision_start|>", False),
    ("<|image_pad|>", False),
    ("<|vision_end|>", False),
    ("<|im_end|>", False),
    ("\n", False),
    ("<|im_start|>", False),
    ("assistant\n", False),
]


@pytest.mark.parametrize(
    "prompt, middle",
    [
        (
            "a<|im_end|>\u201cxy\u201d",
            [
                ("user\n{PREFIX} a", False),
                ("<|im_end|>", False),
                ("x", True),
                ("y", True),
                ("\u201dPicture 1: ", False),
            ],
        ),
        ("word " * 2200, [("user\n{PREFIX} " + "word " * 2200 + "Picture 1: ", False)]),
    ],
    ids=["a quote that is lost", "longer than what is kept"],
)
def test_prompts_whose_quotes_or_end_the_layout_drops(tmp_path, prompt, middle):
    table = json.loads((GOLDENS / "v12/tokens.json").read_text())
    parts = [*BEGIN, *middle, *END]
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{PREFIX} "
        + prompt
        + "Picture 1: "
        + "".join(p for p, _ in END)
    )
    row = {"prompt": prompt, "chat_text": text, "parts": [part for part, _ in parts], "in_quotation": [quoted for _, quoted in parts],
           **token_row(prompt, parts)}
    table["prompts"] = [table["prompts"][0], row]
    assert table_error(tmp_path, "tokens.json", table) == 0
    row["text_mask_sum"] += 1
    assert table_error(tmp_path, "tokens.json", table) > TOLERANCE
