#!/usr/bin/env python3
"""Makes the pictures that the template browser shows beside each workflow: `python scripts/dev/thumbnails.py [workflow ...]`.

Each is a real run of the shipped workflow with the miniature model (miniature/weights) on pictures it was not trained on. There is no
miniature of v1.2: the pictures of those workflows come from the same edits with v1.1, and their captions say what the workflow adds.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "support"))  # missing in an embedded Python
import environment

if __name__ == "__main__":
    environment.reexecute_in_host(__file__)

import demo_model
import numpy as np
from comfy_server import Client, ComfyServer, find_nodes, install_pack, to_api
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tiny_models import pixel_repeater

sys.path += [str(environment.PACK), str(environment.PACK / "benchmarks")]
from lora_demo import line_pair, write_dataset

from miniature.scenes import pair_at
from step1x_core.pairs.makers import damage, weather

WORKFLOWS = environment.PACK / "workflows"
SIDE, MARGIN, CAPTION = 384, 8, 72
BACKGROUND, INK, MARK = (24, 26, 30), (232, 232, 228), (255, 64, 64)
QUALITY = 88
LORA = "purple-means-red.safetensors"
UPSCALER = "repeat.safetensors"


def scene(kind: str, index: int):
    """An edit of a held-out scene: source uint8 [128, 128, 3], region bool [128, 128], instruction."""
    return pair_at(7, index, "heldout", kind=kind, language="en")


def wall():
    """Nine scenes in one picture, uint8 [384, 384, 3], and the middle one's circle as a mask."""
    pictures = [scene("recolour", index).source for index in (1, 3, 6, 7, 4, 5, 0, 2, 8)]
    rows = [np.concatenate(pictures[i:i + 3], axis=1) for i in (0, 3, 6)]
    return np.concatenate(rows), np.pad(spread(scene("recolour", 4).region, 8), 128)


def spread(mask, pixels: int):
    """The rectangle around a mask, that much larger on each side. mask bool [H, W]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    out = np.zeros_like(mask)
    out[max(rows[0] - pixels, 0):rows[-1] + 1 + pixels, max(columns[0] - pixels, 0):columns[-1] + 1 + pixels] = True
    return out


class Studio:
    """Runs shipped workflows with the miniature model in a ComfyUI at `client`."""

    def __init__(self, client, folder: Path):
        self.client = client
        self.folder = folder
        self.info = client.get("/object_info")
        self.uploads = 0

    def upload(self, pixels, mask=None) -> str:
        """uint8 [H, W, 3] and bool [H, W], as the mask editor saves it: what is painted is transparent -> the input's name."""
        self.uploads += 1
        name = f"{self.uploads}.png"
        Image.fromarray(pixels if mask is None else np.dstack([pixels, np.where(mask, 0, 255).astype(np.uint8)])).save(
            self.folder / name
        )
        self.client.upload_image(self.folder / name, name)
        return name

    def run(self, workflow: str, pictures=(), prompts=(), **changes) -> list:
        """Pictures in the order of the Save Image nodes. prompts: one for each encoder. changes: inputs by class of node."""
        prompt = to_api(json.loads((WORKFLOWS / f"{workflow}.json").read_text(encoding="utf-8")), self.info)
        sampling = {"steps": demo_model.STEPS, "cfg": demo_model.CFG}
        size = {"size_level": demo_model.SIZE_LEVEL}
        settings = {
            "Step1XEditLoader": {"unet_name": demo_model.MODEL_FILE},
            "Step1XEditMLLM": {"clip_name": demo_model.MLLM_FILE},
            "VAELoader": {"vae_name": demo_model.VAE_FILE},
            "Step1XEditEncode": size,
            "Step1XEditSampler": sampling,
            "Step1XEditBatchImages": {**size, **sampling},
            "CFGGuider": {"cfg": demo_model.CFG},
            "Step1XEditScheduler": {"steps": demo_model.STEPS},
            "Step1XEditStitchCrop": {"feather": 4},
            "Step1XEditLoadLora": {"lora_name": LORA},
            "UpscaleModelLoader": {"model_name": UPSCALER},
        }
        for values in (settings, changes):
            for class_type, inputs in values.items():
                for node in find_nodes(prompt, class_type):
                    prompt[node]["inputs"].update(inputs)
        for class_type, name, values in (("LoadImage", "image", pictures), ("Step1XEditEncode", "prompt", prompts)):
            for node, value in zip(find_nodes(prompt, class_type), values, strict=bool(values)):
                prompt[node]["inputs"][name] = value
        return [Image.open(io.BytesIO(image)).convert("RGB") for image in self.client.run(prompt).images]


def sheet(tiles, columns: int, caption: str):
    """Pictures [W, H] in rows of `columns`, with a caption below, as one square picture."""
    rows = -(-len(tiles) // columns)
    side = min((SIDE - MARGIN) // columns, (SIDE - CAPTION - MARGIN) // rows) - MARGIN
    canvas = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    left, top = (
        (SIDE - columns * (side + MARGIN) + MARGIN) // 2,
        (SIDE - CAPTION - rows * (side + MARGIN) + MARGIN) // 2,
    )
    for i, tile in enumerate(tiles):
        scale = side / max(tile.size)
        tile = tile.resize((round(tile.width * scale), round(tile.height * scale)), Image.LANCZOS)
        canvas.paste(
            tile,
            (
                left + i % columns * (side + MARGIN) + (side - tile.width) // 2,
                top + i // columns * (side + MARGIN) + (side - tile.height) // 2,
            ),
        )
    ImageDraw.Draw(canvas).multiline_text(
        (SIDE // 2, top + rows * (side + MARGIN) + MARGIN),
        caption,
        INK,
        ImageFont.load_default(22),
        anchor="ma",
        align="center",
    )
    return canvas


def marked(pixels, mask):
    """The picture with a frame around the mask."""
    picture = Image.fromarray(pixels)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    ImageDraw.Draw(picture).rectangle(
        (columns[0], rows[0], columns[-1], rows[-1]), outline=MARK, width=max(2, len(pixels) // 100)
    )
    return picture


def plain(studio, workflow, kind, index, caption):
    pair = scene(kind, index)
    return sheet(
        [Image.fromarray(pair.source), *studio.run(workflow, [studio.upload(pair.source)], [pair.instruction])],
        2,
        caption,
    )


def first_edit(studio):
    source = Image.open(demo_model.SAMPLE_IMAGE).convert("RGB")
    return sheet(
        [source, *studio.run("step1x_edit", [studio.upload(np.asarray(source))], [demo_model.SAMPLE_PROMPT])],
        2,
        demo_model.SAMPLE_PROMPT,
    )


def keep_unedited(studio):
    """Before, after, the mask, and what the decoder alone changed outside of it, 16 times as strong."""
    pair = scene("recolour", 1)
    name = studio.upload(pair.source)
    plain, = studio.run("step1x_edit", [name], [pair.instruction], Step1XEditDecode={"keep_unedited": "off"})
    pictures = studio.run("step1x_keep_unedited", [name], [pair.instruction])
    # In the order of their nodes' ends: the mask is the one without colours, the source is known.
    mask = next(picture for picture in pictures if not np.ptp(np.asarray(picture), axis=-1).any())
    source = Image.fromarray(pair.source)
    after = next(p for p in pictures if p is not mask and np.asarray(p).tobytes() != pair.source.tobytes())
    drift = np.abs(np.asarray(plain, np.int16) - pair.source) * 16 * (np.asarray(mask) == 0)
    drift = Image.fromarray(drift.clip(0, 255).astype(np.uint8))
    return sheet([source, after, mask, drift], 2, "before, after, mask,\nand what is no longer lost (x16)")


def lora(studio):
    name = studio.upload(np.asarray(Image.open(demo_model.SAMPLE_IMAGE).convert("RGB")))
    without, = studio.run("step1x_edit", [name], [demo_model.SAMPLE_PROMPT])
    return sheet(
        [without, *studio.run("step1x_lora", [name], [demo_model.SAMPLE_PROMPT])],
        2,
        "one instruction,\nwithout and with a LoRA",
    )


def train_lora(studio):
    """A short training on few pairs: enough to see that it learns."""
    write_dataset(studio.folder / "input" / "lines", [line_pair(0, index, "train") for index in range(9)])
    training = {"steps": 100, "learning_rate": 3e-3, "rank": 8, "alpha": 8.0, "batch_size": 2, "validate_every": 100}
    dataset = {"dataset": "lines", "size_level": demo_model.SIZE_LEVEL, "validation": 1}
    return sheet(
        studio.run("step1x_train_lora", Step1XEditTrainDataset=dataset, Step1XEditTrainLora=training),
        1,
        "from pairs of images\nto a LoRA",
    )


def lightning(studio):
    """The miniature's own few-step LoRA, which decides steps and CFG."""
    pair = scene("recolour", 4)
    made = studio.run(
        "step1x_lightning",
        [studio.upload(pair.source)],
        [pair.instruction],
        Step1XEditSampler={"steps": 0, "cfg": 0.0},
        Step1XEditLoadLora={"lora_name": demo_model.FAST_FILE.name},
    )
    return sheet([Image.fromarray(pair.source), *made], 2, "few steps, one pass each,\nwith a LoRA")


def distill(studio):
    """A short distillation on a few images: enough to see that it learns."""
    sources = studio.folder / "input" / "my_sources" / "source"
    sources.mkdir(parents=True)
    for index in range(4):
        pair = scene("recolour", index)
        Image.fromarray(pair.source).save(sources / f"{index}.png")
        (sources / f"{index}.txt").write_text(pair.instruction, encoding="utf-8")
    training = {
        "steps": 40,
        "learning_rate": 1e-3,
        "rank": 8,
        "alpha": 8.0,
        "accumulation": 1,
        "warmup": 0,
        "ema": 0.0,
        "validate_every": 40,
        "mode.few_steps": 2,
        "mode.teacher_steps": demo_model.STEPS,
        "mode.teacher_cfg": demo_model.CFG,
    }
    dataset = {"size_level": demo_model.SIZE_LEVEL, "validation": 1}
    return sheet(
        studio.run("step1x_distill", Step1XEditTrainDataset=dataset, Step1XEditTrainLora=training),
        1,
        "images and instructions\nto a few-step LoRA",
    )


def in_turns(studio):
    pair = scene("recolour", 3)
    name, prompts = studio.upload(pair.source), f"{pair.instruction}\nmake the background light green"
    turns = [
        studio.run("step1x_edit_in_turns", [name], Step1XEditBatchImages={"prompts": prompts, "show_turn": turn})
        for turn in (1, 2)
    ]
    return sheet(
        [Image.fromarray(pair.source), *(picture for pictures in turns for picture in pictures)],
        3,
        "one edit after the other",
    )


def masked(studio):
    pair = scene("recolour", 6)
    mask = spread(pair.region, 8)
    return sheet(
        [
            marked(pair.source, mask),
            *studio.run("step1x_masked_edit", [studio.upload(pair.source, mask)], [pair.instruction]),
        ],
        2,
        "only what is painted changes",
    )


def on_the_wall(studio, workflow, prompt):
    """The wall with a frame around the mask, and the result."""
    source, mask = wall()
    return [
        marked(source, mask),
        *studio.run(
            workflow, [studio.upload(source, mask)], [prompt], Step1XEditCropToMask={"context": 1 / 3, "min_size": 128}
        ),
    ]


def crop_and_stitch(studio):
    return sheet(
        on_the_wall(studio, "step1x_local_edit", "Please color the orange circle blue"),
        2,
        "a small part\nof a large image",
    )


def crop_stitch_upscale(studio):
    source, large = on_the_wall(studio, "step1x_local_edit_upscale", "Please color the orange circle green")
    width, height = large.size
    return sheet(
        [source, large.crop((width // 3, height // 3, 2 * width // 3, 2 * height // 3))],
        2,
        "edit a small part,\nthen enlarge the whole",
    )


def batch(studio):
    sources = [scene("recolour", index).source for index in (7, 1)]
    prompts = "give the picture a black background\nturn the picture into a negative"
    made = studio.run(
        "step1x_edit_batch", [studio.upload(source) for source in sources], Step1XEditBatchImages={"prompts": prompts}
    )
    tiles = [
        picture for i, source in enumerate(sources) for picture in (Image.fromarray(source), *made[2 * i : 2 * i + 2])
    ]
    return sheet(tiles, 3, "every instruction on every image")


def product_variants(studio):
    source = scene("recolour", 4).source
    prompts = [
        "Please color the orange circle blue",
        "Please color the orange circle purple",
        "The orange circle should become a star",
        "give the picture a black background",
        "make the background light green",
    ]
    made = studio.run(
        "step1x_product_variants", [studio.upload(source)], Step1XEditBatchImages={"prompts": "\n".join(prompts)}
    )
    return sheet([Image.fromarray(source), *made], 3, "one product, many variants")


def social_media_set(studio):
    names = [studio.upload(scene("recolour", index).source) for index in (6, 7, 3)]
    made = studio.run(
        "step1x_social_media_set", names, Step1XEditBatchImages={"prompts": "give the picture a black background"}
    )
    # Which of the three Save Image nodes ends first is open: the square ones first, the stories last.
    return sheet(sorted(made, key=lambda image: -image.width / image.height), 3, "one look in three formats")


def building_material(studio):
    pair = scene("recolour", 2)
    mask = spread(pair.region, 6)
    prompts = [f"Turn the orange square in the top left corner {colour}" for colour in ("red", "blue")]
    return sheet(
        [
            marked(pair.source, mask),
            *studio.run("step1x_interior_material", [studio.upload(pair.source, mask)], prompts),
        ],
        3,
        "one surface in two materials",
    )


def text_to_image(studio):
    made = studio.run("step1x_text_to_image", CLIPTextEncode={"text": "draw a yellow star in the top left corner."},
                      EmptySD3LatentImage={"width": 128, "height": 128}, Step1XEditSampler={"seed": 1})
    return sheet(made, 1, "an image from text")


def loop(studio):
    """What a loop keeps: a first round that is not good enough, here for want of steps, and a better one."""
    pair = scene("add", 0)
    name = studio.upload(pair.source)
    rounds = [
        studio.run("step1x_edit", [name], [pair.instruction], Step1XEditSampler={"steps": steps})[0]
        for steps in (1, demo_model.STEPS)
    ]
    return sheet([Image.fromarray(pair.source), *rounds], 3, "v1.2: edit, judge, try again")


def make_pairs(studio):
    source = Image.open(environment.PACK / "assets" / "coffee.jpg").convert("RGB")
    (pairs,) = studio.run(
        "step1x_make_pairs",
        [studio.upload(np.asarray(source))],
        Step1XEditPairCompute={"count": 4},
        Step1XEditPairSave={"name": "", "limit": 4},
    )
    # Source and target of the first two pairs, without letters and margins.
    tiles = [pairs.crop((left, 70, left + 200, 202)) for left in (12, 216, 428, 632)]
    return sheet(tiles, 2, "training pairs from an image,\ncomputed, with instructions")


def propose_pairs(studio):
    """The miniature language model cannot write, so the proposals are made up and only the edits are real."""
    pair = scene("recolour", 3)
    name = studio.upload(pair.source)
    prompts = [pair.instruction, "make the background light green", "turn the picture into a negative"]
    return sheet(
        [Image.fromarray(pair.source), *(studio.run("step1x_edit", [name], [prompt])[0] for prompt in prompts)],
        2,
        "propose, edit, judge:\ntraining pairs",
    )


def first_try(studio):
    """The workflow as it is shipped."""
    shipped = {"Step1XEditLoader": {"unet_name": "miniature/"}, "Step1XEditMLLM": {"clip_name": "miniature/"}}
    made = studio.run("step1x_first_try", **shipped)
    return sheet(made, 2, "a first try\nthat needs no files")


def compose(studio):
    """An object cut out of one scene, pasted into another, and an edit of the two."""
    first, second = scene("recolour", 0), scene("recolour", 4)
    mask = (second.source != second.target).any(2)
    names = [studio.upload(first.source), studio.upload(second.source, mask)]
    made = studio.run(
        "step1x_compose",
        names,
        ["make the background light green"],
        ImageScale={"height": 36},
        ImageCompositeMasked={"x": 10, "y": 10},
    )
    return sheet([Image.fromarray(first.source), marked(second.source, mask), *made], 2, "cut out, paste, edit")


def restore(studio):
    """Photographs to be restored. The miniature was not trained for it, so what comes out is not shown."""
    rng, photo = np.random.default_rng(3), Image.open(environment.PACK / "assets" / "coffee.jpg").convert("RGB")
    pixels = np.asarray(photo.resize((192, 128), Image.LANCZOS))
    spoilt = (damage.blur, damage.add_noise, damage.darken, weather.fog, weather.rain, damage.compress)
    tiles = [Image.fromarray(np.asarray(spoil(pixels, rng)[0], np.uint8)) for spoil in spoilt]
    return sheet(tiles, 3, "RealRestorer: photographs\nto be restored")


MAKERS = {
    "step1x_edit": first_edit,
    "step1x_edit_custom_sampler": lambda studio: plain(
        studio, "step1x_edit_custom_sampler", "recolour", 7, "the stock custom sampler"
    ),
    "step1x_edit_in_turns": in_turns,
    "step1x_edit_v12": lambda studio: plain(studio, "step1x_edit", "remove", 0, "v1.2: get rid of the triangle"),
    "step1x_edit_v12_thinking": lambda studio: plain(studio, "step1x_edit", "replace", 7, "v1.2: think, then edit"),
    "step1x_edit_v12_loop": loop,
    "step1x_text_to_image": text_to_image,
    "step1x_keep_unedited": keep_unedited,
    "step1x_masked_edit": masked,
    "step1x_local_edit": crop_and_stitch,
    "step1x_local_edit_upscale": crop_stitch_upscale,
    "step1x_edit_batch": batch,
    "step1x_product_variants": product_variants,
    "step1x_social_media_set": social_media_set,
    "step1x_interior_material": building_material,
    "step1x_lora": lora,
    "step1x_train_lora": train_lora,
    "step1x_lightning": lightning,
    "step1x_distill": distill,
    "step1x_make_pairs": make_pairs,
    "step1x_propose_pairs": propose_pairs,
    "step1x_low_vram": lambda studio: plain(
        studio, "step1x_low_vram", "text", 1, "for little VRAM:\nfp8, smaller, in tiles"
    ),
    "step1x_fast": lambda studio: plain(studio, "step1x_fast", "text", 5, "fast: fp8, TeaCache,\nfewer steps"),
    "step1x_gated_edit": lambda studio: plain(
        studio, "step1x_edit", "recolour", 3, "a content gate\nbefore the image is saved"
    ),
    "step1x_gedit_edit": lambda studio: plain(studio, "step1x_edit", "replace", 2, "GEdit-Bench:\nedit its images"),
    "step1x_gedit_judge": lambda studio: plain(studio, "step1x_edit", "replace", 4, "GEdit-Bench:\njudge and report"),
    "step1x_restore": restore,
    "step1x_first_try": first_try,
    "step1x_compose": compose,
    "step1x_region": lambda studio: plain(
        studio, "step1x_region", "recolour", 0, "only the edited region\nis computed"
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workflow", nargs="*", help=f"without .json; default: all ({len(MAKERS)})")
    parser.add_argument("--folder", type=Path, default=WORKFLOWS, help="where the pictures go")
    options = parser.parse_args()
    unknown = {*options.workflow} - {*MAKERS}
    if unknown:
        parser.error(f"no thumbnail is known for {', '.join(sorted(unknown))}")


    with tempfile.TemporaryDirectory(prefix="step1x-thumbnails-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        install_pack(base)
        for name in ("loras", "upscale_models"):
            (base / "models" / name).mkdir(parents=True)
        save_file(pixel_repeater(), base / "models" / "upscale_models" / UPSCALER)
        subprocess.run(
            [
                sys.executable,
                str(environment.PACK / "miniature" / "demo_lora.py"),
                str(base / "models" / "loras" / LORA),
            ],
            check=True,
        )
        with ComfyServer(Path(os.environ["STEP1X_COMFYUI"]), base, demo_model.FOLDER) as server:
            studio = Studio(Client(server.url, server.log), base)
            for name in options.workflow or MAKERS:
                path = options.folder / f"{name}.jpg"
                MAKERS[name](studio).save(path, quality=QUALITY, optimize=True)
                environment.say(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    with environment.cancellable():
        sys.exit(main())
