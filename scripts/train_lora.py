#!/usr/bin/env python3
"""Trains a LoRA without the editor: `python scripts/train_lora.py DATASET OUT --model FILE --mllm FILE --vae FILE`.

DATASET is a folder with source/NAME.png, target/NAME.png and target/NAME.txt, or a JSON file in the official layout. OUT is a folder: lora.safetensors is the
result, progress.png shows losses and validation images. If interrupted, rerun the command to resume from state.safetensors. See docs/training.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent / "support"))
import environment

# As in the loader node: names of torch's types, and fp8 with scales.
WEIGHT_DTYPES = ("default", "float8_e4m3fn", "float8_e5m2", "fp8_scaled")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="file or folder of Step1X-Edit")
    parser.add_argument("--mllm", type=Path, required=True, help="file or folder of Qwen2.5-VL")
    parser.add_argument("--vae", type=Path, required=True, help="the FLUX VAE")
    parser.add_argument("--version", help="model version, if neither the tensors nor the file name identify it")
    parser.add_argument(
        "--weight-dtype", choices=WEIGHT_DTYPES, default="default", help="precision of the model's weights in memory"
    )
    parser.add_argument("--size-level", type=int, default=768)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="constant")
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument(
        "--ema", type=float, default=0.0, help="decay of an exponential moving average of the weights; 0 is off"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="faster, but needs several times the memory")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument(
        "--validation",
        type=int,
        default=0,
        help="number of pairs held out at the end of the dataset for validation images",
    )
    parser.add_argument("--validate-every", type=int, default=200)
    parser.add_argument(
        "--few-steps",
        type=int,
        metavar="STEPS",
        help="distil the model: train a LoRA that edits in 1 to 8 steps at CFG 1 as the model does with "
        "its own steps and CFG. DATASET then needs no targets: source/NAME.png and source/NAME.txt, one instruction "
        "per line",
    )
    parser.add_argument(
        "--teacher-steps",
        type=int,
        default=0,
        help="with --few-steps: steps of the model that is imitated; 0 is its version's default",
    )
    parser.add_argument(
        "--teacher-cfg", type=float, default=0.0, help="with --few-steps: its CFG; 0 is its version's default"
    )
    parser.add_argument(
        "--noises", type=int, default=1, help="with --few-steps: trajectories sampled for each instruction"
    )
    parser.add_argument(
        "--later",
        choices=("cached", "teacher", "trajectory", "final"),
        default="trajectory",
        help="with --few-steps: what the later part of the training starts from and aims at (docs/few_steps.md)",
    )
    parser.add_argument(
        "--share", type=float, default=0.5, help="with --few-steps: how much of the training that part is"
    )
    parser.add_argument(
        "--restart", action="store_true", help="start over; the files of an earlier run are moved to OUT.1"
    )
    parser.add_argument(
        "--also-save",
        choices=("diffusers", "PEFT"),
        action="append",
        default=[],
        help="save the LoRA under these layer names, too; may be given twice",
    )
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    environment.use_host_in_process(options.cpu)
    import torch

    from step1x_core.errors import Step1XError
    from step1x_core.host.checkpoints.loading import load_model, load_text_encoder, load_vae
    from step1x_core.host.training.cache import cache_pairs
    from step1x_core.host.training.distill import Lesson
    from step1x_core.host.training.train import LORA_FILE, edit_held_out, train
    from step1x_core.training.dataset import read_pairs, read_sources
    from step1x_core.training.distillation import Distillation
    from step1x_core.training.loss_curve import draw_progress
    from step1x_core.training.objective import Settings
    from step1x_core.versions import VERSIONS

    settings = Settings(
        options.steps,
        options.learning_rate,
        options.rank,
        options.alpha,
        options.batch,
        options.accumulation,
        options.seed,
        options.schedule,
        options.warmup,
        options.ema,
    )
    losses, rows = [], []

    def draw() -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        draw_progress(losses, rows).save(options.out / "progress.png")

    def tell(run) -> None:
        print(f"\rstep {run.step}/{options.steps}, loss {run.losses[-1]:.4f} ", end="", file=sys.stderr, flush=True)
        losses[:] = run.losses
        if run.step == options.steps or options.save_every and run.step % options.save_every == 0:
            draw()

    # Models must be loaded and used in the same mode, and the host uses them in this one.
    with torch.inference_mode():
        try:
            pairs = (read_pairs if options.few_steps is None else read_sources)(options.dataset)
            dtype = {"dtype": getattr(torch, options.weight_dtype)} if options.weight_dtype.startswith("float8") else {}
            quantise = "fp8" if options.weight_dtype == "fp8_scaled" else None
            model = load_model(options.model, options.version, dtype, quantise=quantise)
            layout = VERSIONS[model.model.diffusion_model.version].layout.name
            clip, vae = load_text_encoder(options.mllm, layout), load_vae(options.vae)
            folder = options.dataset if options.dataset.is_dir() else options.dataset.parent
            dataset, computed = cache_pairs(clip, vae, pairs, folder, options.size_level, options.validation)
            print(f"{len(dataset.pairs)} pairs, {computed} latents and conditionings encoded", file=sys.stderr)
            del clip

            lesson = None
            if options.few_steps is not None:
                few = Distillation(
                    options.few_steps,
                    options.teacher_steps,
                    options.teacher_cfg,
                    noises=options.noises,
                    later=options.later,
                    share=options.share,
                )
                lesson = Lesson(
                    model,
                    few,
                    lambda done, total: print(f"\r{done}/{total} trajectories ", end="", file=sys.stderr, flush=True),
                )

            def validate(model, step) -> None:
                rows[:] = (
                    lesson.compare_held_out(model, vae, dataset, options.seed)
                    if lesson
                    else edit_held_out(model, vae, dataset, 0, 0.0, options.seed)
                )
                draw()

            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            run = train(
                model,
                dataset,
                settings,
                options.out,
                not options.restart,
                not options.no_checkpointing,
                options.save_every,
                options.validate_every if dataset.validation else 0,
                validate,
                tell,
                lesson,
                tuple(dict.fromkeys(options.also_save)),
            )
        except Step1XError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ncancelled; the same command goes on", file=sys.stderr)
            return 130
    print(f"\n{options.out / LORA_FILE}: {run.step} steps", file=sys.stderr)
    if torch.cuda.is_available():
        print(
            f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the card's memory in use while training",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
