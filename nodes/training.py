"""Training a LoRA. What comes out goes to the stock 'Save LoRA Weights', 'Load LoRA Model' and 'Plot Loss Graph'."""

import comfy.utils
import numpy as np
from comfy_api.latest import io

from ..step1x_core.checks import check_kind
from ..step1x_core.host.prompts.encoding import check_vae
from ..step1x_core.host.sampling.sampler import check_model
from ..step1x_core.host.training.cache import cache_pairs
from ..step1x_core.host.training.folders import dataset_path, run_folder
from ..step1x_core.host.training.train import edit_held_out, train
from ..step1x_core.images import from_uint8
from ..step1x_core.training.dataset import EditDataset, dataset_fingerprint, read_pairs
from ..step1x_core.training.loss_curve import draw_progress
from ..step1x_core.training.objective import ALPHA, CONSTANT, LEARNING_RATE, RANK, SCHEDULES, Settings
from .categories import TRAINING
from .widgets import check_widgets

DATASET = io.Custom("STEP1X_EDIT_DATASET")
# Steps between two pictures of the curve.
SHOW_EVERY = 5
PREVIEW_FORMAT, PREVIEW_SIZE = "JPEG", 1024


class Step1XEditDataset(io.ComfyNode):
    """The stock dataset nodes know pictures with captions; here are two pictures and an instruction, and the language model sees one of them."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditDataset",
            display_name="Step1X-Edit Dataset",
            category=TRAINING,
            description="Reads pairs of pictures before and after an edit, with instructions, and encodes them for 'Step1X-Edit Train LoRA'. "
                        "What is encoded stays on disk.",
            search_aliases=["dataset", "edit pairs", "training data", "cache latents", "lora"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder from 'Load Step1X-Edit MLLM', of the version that is trained."),
                io.Vae.Input("vae", tooltip="The FLUX VAE: the stock 'Load VAE' with ae.safetensors, or the VAE output of 'Load Step1X-Edit Model' for a diffusers folder."),
                io.String.Input("dataset", default="", placeholder="my_pairs",
                                tooltip="A folder in ComfyUI's input folder with source/NAME.png, target/NAME.png and target/NAME.txt (the instruction), "
                                        "or a JSON file in the layout of the official training code. One in the output folder has ' [output]' behind its name; "
                                        "or connect the output 'folder' of 'Step1X-Edit Save Pairs'."),
                io.Int.Input("size_level", default=768, min=64, max=2048, step=16,
                             tooltip="Each pair is trained at about this many pixels squared, keeping its aspect ratio. The official code uses 512 to 1024."),
                io.Int.Input("validation", default=2, min=0, max=64,
                             tooltip="So many pairs from the end are not trained on, but edited now and then to show how far the training is."),
            ],
            outputs=[
                DATASET.Output(display_name="dataset", tooltip="For 'Step1X-Edit Train LoRA'."),
                io.String.Output(display_name="report", tooltip="How many pairs there are, and how much had to be encoded."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, dataset="", **inputs):
        # The host does not know the value of a connected input yet; the node that it comes from has its own fingerprint.
        return dataset_fingerprint(*dataset_path(dataset)) if dataset else ""

    @classmethod
    def execute(cls, clip, vae, dataset, size_level, validation) -> io.NodeOutput:
        check_widgets(cls, dataset=dataset, size_level=size_level, validation=validation)
        path, root = dataset_path(dataset)
        cached, computed = cache_pairs(clip, vae, read_pairs(path, root), path if path.is_dir() else path.parent, size_level, validation)
        return io.NodeOutput(cached, f"{len(cached.pairs)} pairs to train on, {len(cached.validation)} to look at; "
                                     f"{computed} latents and conditionings were encoded, the rest was in the cache.")


class Step1XEditTrainLora(io.ComfyNode):
    """The stock 'Train LoRA' fails on a conditioning with reference latents, and knows neither this model's objective nor its layers."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditTrainLora",
            display_name="Step1X-Edit Train LoRA",
            category=TRAINING,
            description="Trains a LoRA on pairs of pictures. It can be cancelled and goes on where it was. The result is also a file in output/step1x_training.",
            search_aliases=["train lora", "fine-tuning", "finetune", "training"],
            inputs=[
                io.Model.Input("model",
                               tooltip="The model from 'Load Step1X-Edit Model', in any precision; fp8 halves the memory. "
                                       "A LoRA that is applied to it is trained on top of."),
                DATASET.Input("dataset", tooltip="The pairs from 'Step1X-Edit Dataset'."),
                io.String.Input("name", default="my_lora",
                                tooltip="The training's folder in output/step1x_training: lora.safetensors, and state.safetensors to go on from."),
                io.Int.Input("steps", default=1000, min=1, max=1000000, tooltip="The number of steps in all. A finished training goes on when this is raised."),
                io.Float.Input("learning_rate", default=LEARNING_RATE, min=0.0, max=1.0, step=0.00001, round=False,
                               tooltip="How far each step goes. The official code uses 0.0001."),
                io.Int.Input("rank", default=RANK, min=1, max=512, tooltip="The size of the LoRA. The official code uses 64."),
                io.Float.Input("alpha", default=ALPHA, min=0.001, max=512.0, step=0.5, round=False,
                               tooltip="The LoRA is scaled by alpha / rank. The official code uses 32."),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="Pairs at a time. Pairs of different sizes are computed one after the other."),
                io.Int.Input("accumulation", default=1, min=1, max=1024,
                             tooltip="Batches for each step: the same effect as a larger batch, without its memory."),
                io.Int.Input("seed", default=42, min=0, max=0xffffffffffffffff, control_after_generate=True,
                             tooltip="The random seed: same seed and inputs, same LoRA."),
                io.Boolean.Input("resume", default=True, tooltip="Go on from the state of an earlier run of this name. "
                                     "Off: begin anew; the files of the earlier run are moved to a folder NAME.1."),
                io.Int.Input("save_every", default=100, min=0, max=100000, advanced=True,
                             tooltip="Steps between two savings. 0: only at the end and on cancel."),
                io.Int.Input("validate_every", default=200, min=0, max=100000,
                             tooltip="Steps between two looks at the pairs for validation. It needs the VAE. 0: never."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default=CONSTANT, advanced=True,
                               tooltip="cosine: the learning rate falls to 0 at the last step."),
                io.Int.Input("warmup", default=0, min=0, max=100000, advanced=True, tooltip="Steps in which the learning rate rises."),
                io.Float.Input("ema", default=0.0, min=0.0, max=0.99999, step=0.0001, round=False, advanced=True,
                               tooltip="Decay of a running mean of the weights, which is saved in their place. 0 is off; 0.99 to 0.999 are usual."),
                io.Boolean.Input("gradient_checkpointing", default=True, advanced=True, tooltip="Blocks are computed twice, which saves most of the memory."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the dataset, to look at the pairs for validation."),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="The LoRA, for the stock 'Save LoRA Weights' and 'Load LoRA Model'."),
                io.Custom("LOSS_MAP").Output(display_name="loss", tooltip="The losses, for the stock 'Plot Loss Graph'."),
                io.Int.Output(display_name="steps", tooltip="The number of steps in all."),
                io.Image.Output(display_name="progress", tooltip="The curve of the losses, and below it source, result and target of each pair for validation."),
            ],
        )

    @classmethod
    def execute(cls, model, dataset, name, steps, learning_rate, rank, alpha, batch_size, accumulation, seed, resume, save_every, validate_every, schedule, warmup, ema,
                gradient_checkpointing, vae=None) -> io.NodeOutput:
        check_widgets(cls, name=name, steps=steps, learning_rate=learning_rate, rank=rank, alpha=alpha, batch_size=batch_size, accumulation=accumulation, seed=seed,
                      save_every=save_every, validate_every=validate_every, schedule=schedule, warmup=warmup, ema=ema, resume=resume,
                      gradient_checkpointing=gradient_checkpointing)
        check_model(model)
        check_kind(dataset, EditDataset, "dataset", "'Step1X-Edit Dataset'")
        if vae is not None:
            check_vae(vae)
        settings = Settings(steps, learning_rate, rank, alpha, batch_size, accumulation, seed, schedule, warmup, ema)
        progress, rows = comfy.utils.ProgressBar(steps), []

        def show(run) -> None:
            picture = None
            if run.step % SHOW_EVERY == 0 or run.step == steps:
                picture = (PREVIEW_FORMAT, draw_progress(run.losses, rows), PREVIEW_SIZE)
            progress.update_absolute(run.step, steps, picture)

        def validate(model, step) -> None:
            rows[:] = edit_held_out(model, vae, dataset, 0, 0.0, seed)

        looks = vae is not None and dataset.validation and validate_every
        run = train(model, dataset, settings, run_folder(name), resume, gradient_checkpointing, save_every, validate_every, validate if looks else None, show)
        sheet = from_uint8(np.asarray(draw_progress(run.losses, rows)))[None]
        return io.NodeOutput(run.lora(), {"loss": run.losses}, run.step, sheet)
