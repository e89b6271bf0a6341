"""Training a LoRA. What comes out goes to the stock 'Save LoRA Weights', 'Load LoRA Model' and 'Plot Loss Graph'."""

import comfy.utils
import numpy as np
from comfy_api.latest import io

from ..step1x_core.checks import check_kind
from ..step1x_core.host.prompts.encoding import check_vae
from ..step1x_core.host.sampling.sampler import check_model
from ..step1x_core.host.training.cache import cache_pairs
from ..step1x_core.host.training.distill import Lesson
from ..step1x_core.host.training.folders import dataset_path, run_folder
from ..step1x_core.host.training.run import EXPORTS
from ..step1x_core.host.training.train import edit_held_out, train
from ..step1x_core.images import from_uint8
from ..step1x_core.training.cache import EditDataset
from ..step1x_core.training.dataset import dataset_fingerprint, read_pairs, read_sources
from ..step1x_core.training.distillation import MAX_STEPS, STAGES, TRAJECTORY, Distillation
from ..step1x_core.training.loss_curve import draw_progress
from ..step1x_core.training.objective import ALPHA, CONSTANT, LEARNING_RATE, RANK, SCHEDULES, Settings
from .categories import TRAINING
from .widgets import check_widgets, seed_input

DATASET = io.Custom("STEP1X_EDIT_DATASET")
# Steps between two pictures of the curve.
SHOW_EVERY = 5
PREVIEW_FORMAT, PREVIEW_SIZE = "JPEG", 1024
# What a training learns: targets of pairs, or the model's own edits in fewer steps.
EDIT_PAIRS, FEW_STEPS = "edit pairs", "few steps"
NOTHING = "none"


def few_steps() -> list[io.Input]:
    return [
        io.Int.Input("few_steps", default=8, min=1, max=MAX_STEPS,
                     tooltip="Number of steps that the LoRA is made for, at CFG 1. 8 and 4 are the safest; fewer need "
                             "a longer training."),
        io.Int.Input("teacher_steps", default=0, min=0, max=200,
                     tooltip="Steps of the model that is imitated. 0 uses the version's default: 28, or 50 for v1.2."),
        io.Float.Input("teacher_cfg", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01,
                       tooltip="CFG of the model that is imitated. 0 uses the version's default: 6, 4 for "
                               "v1.2-preview and 3 for RealRestorer."),
        io.Int.Input("noises", default=1, min=1, max=64,
                     tooltip="Trajectories sampled for each instruction, from different noise. Each takes as long as "
                             "an edit. Use more for a small dataset."),
        io.Combo.Input("later", options=list(STAGES), default=TRAJECTORY,
                       tooltip="What the later part of the training starts from and aims at. cached: the cached "
                               "trajectories, as in the first part. trajectory: from the LoRA's own steps back to the "
                               "cached trajectory. teacher: from its own steps to where the teacher gets from there, "
                               "which is slower. final: the final latent, through all of its steps."),
        io.Float.Input("share", default=0.5, min=0.0, max=1.0, step=0.05,
                       tooltip="Part of the training that 'later' applies to, at its end."),
    ]


class Step1XEditTrainDataset(io.ComfyNode):
    """The stock dataset nodes read images with captions. Here are two images and an instruction, and the language model
    sees one of the images."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditTrainDataset",
            display_name="Step1X-Edit Dataset",
            category=TRAINING,
            description="Reads pairs of images before and after an edit, with instructions, and encodes them for "
                        "'Step1X-Edit Train LoRA'. The encoded pairs are cached on disk.",
            search_aliases=["dataset", "edit pairs", "training data", "cache latents", "lora"],
            inputs=[
                io.Clip.Input("clip",
                              tooltip="Text encoder from 'Load Step1X-Edit MLLM', for the model version to be "
                                      "trained."),
                io.Vae.Input("vae", tooltip="FLUX VAE: the stock 'Load VAE' with ae.safetensors, or the VAE output of "
                                          "'Load Step1X-Edit Model' for a diffusers folder."),
                io.String.Input("dataset", default="", placeholder="my_pairs",
                                tooltip="Name of a folder in ComfyUI's input folder with source/NAME.png, "
                                        "target/NAME.png and target/NAME.txt (the instruction), or of a JSON file in"
                                        " the layout of the official training code. For a dataset in the output "
                                        "folder, append ' [output]' to its name or connect 'folder' of 'Step1X-Edit "
                                        "Save Pairs'."),
                io.Int.Input("size_level", default=768, min=64, max=2048, step=16,
                             tooltip="Training resolution: each pair is scaled to about this many pixels squared and"
                                     " keeps its aspect ratio. The official code uses 512 to 1024. Lower values need"
                                     " less VRAM."),
                io.Int.Input("validation", default=2, min=0, max=64,
                             tooltip="Number of pairs held out at the end of the dataset for validation images."),
                io.Boolean.Input("sources_only", default=False, optional=True,
                                 tooltip="On: read source images and instructions only, for the few-step mode of "
                                         "'Step1X-Edit Train LoRA': source/NAME.png and source/NAME.txt, with one "
                                         "instruction per line. The targets of a dataset of pairs are not read."),
            ],
            outputs=[
                DATASET.Output(display_name="dataset", tooltip="Encoded pairs for 'Step1X-Edit Train LoRA'."),
                io.String.Output(display_name="report",
                tooltip="Number of pairs, and how much was encoded or found in the cache."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, dataset="", sources_only=False, **inputs):
        # The host does not know the value of a connected input yet; the node it comes from has its own fingerprint.
        return (
            dataset_fingerprint(*dataset_path(dataset), read_sources if sources_only else read_pairs) if dataset else ""
        )

    @classmethod
    def execute(cls, clip, vae, dataset, size_level, validation, sources_only=False) -> io.NodeOutput:
        check_widgets(cls, dataset=dataset, size_level=size_level, validation=validation, sources_only=sources_only)
        path, root = dataset_path(dataset)
        folder = path if path.is_dir() else path.parent
        pairs = (read_sources if sources_only else read_pairs)(path, root)
        cached, computed = cache_pairs(clip, vae, pairs, folder, size_level, validation)
        counts = f"{len(cached.pairs)} {'instructions' if sources_only else 'pairs'} to train on, {len(cached.validation)} held out for validation"
        return io.NodeOutput(
            cached, f"{counts}; {computed} latents and conditionings were encoded, the rest was in the cache."
        )


class Step1XEditTrainLora(io.ComfyNode):
    """The stock 'Train LoRA' fails on a conditioning with reference latents, and knows neither this model's objective
    nor its layers."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Step1XEditTrainLora",
            display_name="Step1X-Edit Train LoRA",
            category=TRAINING,
            description="Trains a LoRA on pairs of images, or one that edits in 1 to 8 steps as the model itself does "
                        "in "
            "many. Can be cancelled and resumed. The LoRA is also saved in output/step1x_training.",
            search_aliases=[
                "train lora",
                "fine-tuning",
                "finetune",
                "training",
                "distillation",
                "few steps",
                "lightning",
                "turbo",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Model from 'Load Step1X-Edit Model', in any precision. fp8 halves the VRAM "
                    "for its weights. A LoRA applied to the model stays in place, and the new one"
                    " is trained on top of it.",
                ),
                DATASET.Input("dataset", tooltip="Encoded pairs from 'Step1X-Edit Dataset'."),
                io.String.Input(
                    "name",
                    default="my_lora",
                    tooltip="Name of the run's folder in output/step1x_training. It holds "
                    "lora.safetensors and state.safetensors, from which the run is resumed.",
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=1000000,
                    tooltip="Total number of steps, including those of an earlier run that is resumed. "
                    "Raise it to continue a finished run.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=LEARNING_RATE,
                    min=0.0,
                    max=1.0,
                    step=0.00001,
                    round=False,
                    tooltip="Size of each update. The official code uses 0.0001. Lower it if the loss becomes NaN.",
                ),
                io.Int.Input(
                    "rank",
                    default=RANK,
                    min=1,
                    max=512,
                    tooltip="Rank of the LoRA. Higher ranks can learn more and need more VRAM and larger "
                    "files. The official code uses 64.",
                ),
                io.Float.Input(
                    "alpha",
                    default=ALPHA,
                    min=0.001,
                    max=512.0,
                    step=0.5,
                    round=False,
                    tooltip="The LoRA is scaled by alpha / rank. The official code uses 32.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="Pairs per batch. Pairs of different sizes are computed one after the other.",
                ),
                io.Int.Input(
                    "accumulation",
                    default=1,
                    min=1,
                    max=1024,
                    tooltip="Batches per step. Has the effect of a larger batch without its memory.",
                ),
                seed_input("Random seed. The same seed and inputs give the same LoRA."),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="On: resume the earlier run of this name. Off: start over; the files of the"
                    " earlier run are moved to a folder NAME.1.",
                ),
                io.Int.Input(
                    "save_every",
                    default=100,
                    min=0,
                    max=100000,
                    advanced=True,
                    tooltip="Steps between saves. 0 saves only at the end and when the run is cancelled.",
                ),
                io.Int.Input(
                    "validate_every",
                    default=200,
                    min=0,
                    max=100000,
                    tooltip="Steps between validation images, which are edits of the held-out pairs. They "
                    "need 'vae'. 0 makes none.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default=CONSTANT,
                    advanced=True,
                    tooltip="Learning rate schedule. constant keeps the rate; cosine lowers it to 0 by the last step.",
                ),
                io.Int.Input(
                    "warmup",
                    default=0,
                    min=0,
                    max=100000,
                    advanced=True,
                    tooltip="Steps during which the learning rate rises from 0 to its full value.",
                ),
                io.Float.Input(
                    "ema",
                    default=0.0,
                    min=0.0,
                    max=0.99999,
                    step=0.0001,
                    round=False,
                    advanced=True,
                    tooltip="Decay of an exponential moving average of the weights, which is saved in "
                    "their place. Typical values are 0.99 to 0.999; 0 turns it off.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Recompute each block in the backward pass. Saves most of the VRAM and makes steps slower.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="VAE of the dataset. Needed for validation images."),
                io.DynamicCombo.Input(
                    "mode",
                    optional=True,
                    options=[io.DynamicCombo.Option(EDIT_PAIRS, []), io.DynamicCombo.Option(FEW_STEPS, few_steps())],
                    tooltip="edit pairs trains on the targets of the dataset. few steps distils the model: the LoRA "
                    "learns to edit in few steps at CFG 1 as the model does with its own steps and CFG. It "
                    "needs a dataset with 'sources_only'.",
                ),
                io.Combo.Input(
                    "also_save",
                    options=[NOTHING, *EXPORTS],
                    default=NOTHING,
                    optional=True,
                    tooltip="Save the LoRA under other layer names, too. lora.safetensors always has kohya's names. "
                    "diffusers adds lora_diffusers.safetensors for diffusers and most other programs; PEFT adds the "
                    "folder lora_peft.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="lora", tooltip="The LoRA, for the stock 'Save LoRA Weights' and 'Load LoRA Model'."
                ),
                io.LossMap.Output(display_name="loss", tooltip="Loss of every step, for the stock 'Plot Loss Graph'."),
                io.Int.Output(display_name="steps", tooltip="Total number of steps trained."),
                io.Image.Output(
                    display_name="progress",
                    tooltip="Loss curve, with source, result and target of each validation pair below it; in "
                    "the few-step mode the target is the teacher's edit.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, dataset, name, steps, learning_rate, rank, alpha, batch_size, accumulation, seed, resume,
                save_every, validate_every, schedule, warmup, ema, gradient_checkpointing, vae=None,
                mode=None, also_save=NOTHING) -> io.NodeOutput:
        check_widgets(cls, name=name, steps=steps, learning_rate=learning_rate, rank=rank, alpha=alpha, seed=seed,
                      batch_size=batch_size, accumulation=accumulation, resume=resume, save_every=save_every,
                      validate_every=validate_every, schedule=schedule, warmup=warmup, ema=ema,
                      gradient_checkpointing=gradient_checkpointing, also_save=also_save)
        if mode is not None:  # workflows of earlier releases have none
            check_widgets(cls, mode=mode)
        check_model(model)
        check_kind(dataset, EditDataset, "dataset", "'Step1X-Edit Dataset'")
        if vae is not None:
            check_vae(vae)
        settings = Settings(steps, learning_rate, rank, alpha, batch_size, accumulation, seed, schedule, warmup, ema)
        lesson = lesson_of(model, mode)
        progress, rows = comfy.utils.ProgressBar(steps), []

        def show(run) -> None:
            picture = None
            if run.step % SHOW_EVERY == 0 or run.step == steps:
                picture = (PREVIEW_FORMAT, draw_progress(run.losses, rows), PREVIEW_SIZE)
            progress.update_absolute(run.step, steps, picture)

        def validate(model, step) -> None:
            rows[:] = (lesson.compare_held_out(model, vae, dataset, seed) if lesson
                       else edit_held_out(model, vae, dataset, 0, 0.0, seed))

        looks = vae is not None and dataset.validation and validate_every
        run = train(model, dataset, settings, run_folder(name), resume, gradient_checkpointing, save_every,
                    validate_every, validate if looks else None, show, lesson,
                    () if also_save == NOTHING else (also_save,))
        sheet = from_uint8(np.asarray(draw_progress(run.losses, rows)))[None]
        return io.NodeOutput(run.lora(), {"loss": run.losses}, run.step, sheet)


def lesson_of(model, mode: dict | None) -> Lesson | None:
    """What a choice of the training's mode teaches; None for pairs. mode: as the executor hands it over."""
    if mode is None or mode["mode"] == EDIT_PAIRS:
        return None
    return Lesson(
        model,
        Distillation(
            steps=mode["few_steps"],
            teacher_steps=mode["teacher_steps"],
            teacher_cfg=mode["teacher_cfg"],
            noises=mode["noises"],
            later=mode["later"],
            share=mode["share"],
        ),
    )
