#!/usr/bin/env python3
"""A few-step edit with full-size models, and what distilling one costs: `python benchmarks/gpu_few_steps.py`.

The weights are random, which costs the same time as trained ones. A LoRA of one layer carries the few-step settings, so the sampler's defaults, the left-out
negative prompt and the merged weights are those of a real one. Parts: "edit" times sampling and the whole edit and breaks it down, "vae" compares ways to run
the VAE, "distill" times a trajectory of the teacher and the steps of a distillation, with their memory. Times are medians after a warm-up, with half the spread.
`--tiny` runs the same code with miniature models, on a CPU too: it shows that the script works, not how fast anything is.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment
from gpu_edit import PROMPT, Clock, made_up_conditioning, models_folder, write_models

MODES = ("fp8 attention", "fp8_scaled", "bf16")
PARTS = ("edit", "vae", "distill")
STARTED = time.perf_counter()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", choices=("v1.1", "v1.2"), default="v1.1")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--size", type=int, default=1024, help="size level of the edit's square picture")
    parser.add_argument("--distill-sizes", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=280, help="no new measurement starts after so many")
    parser.add_argument("--tiny", action="store_true", help="miniature models")
    parser.add_argument(
        "--models", type=Path, help="keep the checkpoints in this folder, or take those that an earlier run kept there"
    )
    parser.add_argument("--json", type=Path, default=Path("gpu_few_steps.json"), help="where all numbers go")
    return parser.parse_args()


def say(text: str = "") -> None:
    print(text, flush=True)


class Record(dict):
    """All numbers by name. Written to the file at every entry, so that a run that is cut off loses nothing."""

    def __init__(self, path: Path, limit: float):
        super().__init__()
        self.path, self.limit = path, limit

    def add(self, name: str, values, unit: str = "s", digits: int = 3) -> None:
        """Keep and print the values of repeated measurements, or one value."""
        values = values if isinstance(values, list) else [values]
        self[name] = values
        self.path.write_text(json.dumps(self, indent=1), encoding="utf-8")
        spread = f" +- {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        say(f"[{time.perf_counter() - STARTED:5.0f}] {name:<58}{statistics.median(values):10.{digits}f} {unit}{spread}")

    def has_time(self, name: str) -> bool:
        left = self.limit - (time.perf_counter() - STARTED)
        if left < 0:
            say(f"{name}: left out, no time")
        return left >= 0


def timed(function, repeats: int = 1) -> list[float]:
    """Seconds of each of the calls, the device's work included."""
    out = []
    for _ in range(repeats):
        times = {}
        with Clock(times, "t"):
            function()
        out.append(times["t"])
    return out


class Stages:
    """Time spent in functions, each with the device's work, summed over their calls. They wait for the device, so the whole is slower than without."""

    def __init__(self):
        self.times, self.calls = Counter(), Counter()

    def around(self, name: str, function):
        def wrapped(*args, **kwargs):
            times = {}
            with Clock(times, "t"):
                out = function(*args, **kwargs)
            self.times[name] += times["t"]
            self.calls[name] += 1
            return out
        return wrapped

    @contextmanager
    def watched(self, targets: dict[str, tuple]):
        """targets: by name the object and the attribute that holds the function."""
        with ExitStack() as stack:
            for name, (owner, attribute) in targets.items():
                stack.enter_context(mock.patch.object(owner, attribute, self.around(name, getattr(owner, attribute))))
            yield self


def write_lora(path: Path, steps: int, hidden: int, columns: int) -> None:
    """A few-step LoRA of one layer, with zeros: the edit's arithmetic is that of the model with merged weights."""
    import torch
    from safetensors.torch import save_file

    from step1x_core.sampling.few_steps import FewSteps

    name = "lora_unet_single_blocks_0_linear2"
    tensors = {
        f"{name}.lora_down.weight": torch.zeros(2, columns),
        f"{name}.lora_up.weight": torch.zeros(hidden, 2),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, path, metadata=FewSteps(steps, teacher={"version": "v1.1", "steps": 28, "cfg": 6.0}).metadata())


class Edit:
    """One few-step edit, in phases. model: with its LoRA; the defaults decide steps and CFG."""

    def __init__(self, model, clip, vae, size: int):
        import torch

        from step1x_core.host.sampling.few_steps import reads_negative, version_defaults

        self.model, self.clip, self.vae, self.size = model, clip, vae, size
        self.steps, self.cfg = version_defaults(model, 0, 0.0)
        assert not reads_negative(model, 0.0), "the negative prompt would be encoded"
        # Whole 8-bit values, as of a file.
        self.picture = torch.randint(0, 256, (1, size, size, 3), generator=torch.Generator().manual_seed(0)) / 255

    def encode(self):
        from step1x_core.host.prompts.encoding import encode_edit

        return encode_edit(self.clip, self.vae, self.picture, PROMPT, "", self.size, with_negative=False)

    def sample(self, encoded):
        from step1x_core.host.sampling.sampler import model_sigmas, sample

        positive, negative, latent = encoded
        return sample(
            self.model,
            positive,
            negative,
            latent,
            model_sigmas(self.model, self.steps, latent["samples"]),
            self.cfg,
            0,
            callback=lambda *args: None,
        )

    def decode(self, latent):
        from step1x_core.host.prompts.encoding import decode_edit

        return decode_edit(self.vae, latent, self.picture)

    def whole(self):
        return self.decode(self.sample(self.encode()))


def watched_parts(edit: Edit) -> dict[str, tuple]:
    """What the breakdown watches. The entries overlap: loading is part of encoding, sampling and decoding."""
    import comfy.model_management
    import comfy.sample
    import comfy.samplers

    from step1x_core.host.network.transformer import Step1XTransformer
    from step1x_core.host.prompts import encoding
    from step1x_core.host.prompts.text_encoder import Step1XTextModel
    from step1x_core.host.sampling import sampler
    from step1x_core.network.connector import Connector

    return {
        "encode: resize": (encoding, "to_working_size"),
        "encode: tokenise": (edit.clip, "tokenize"),
        "encode: language model": (Step1XTextModel, "forward"),
        "encode: VAE, with its copies": (encoding, "encode_pictures"),
        "encode: VAE encoder": (edit.vae.first_stage_model, "encode"),
        "sample: noise": (comfy.sample, "prepare_noise"),
        "sample: copies": (sampler, "copied"),
        "sample: conditions": (comfy.samplers, "process_conds"),
        "sample: transformer": (Step1XTransformer, "_forward"),
        "sample: of it connector": (Connector, "forward"),
        "decode: VAE, with its copies": (encoding, "decode"),
        "decode: VAE decoder": (edit.vae.first_stage_model, "decode"),
        "all: host's loading of models": (comfy.model_management, "load_models_gpu"),
        "all: checks for NaN": (encoding, "check_finite"),
    }


def break_down(edit: Edit, name: str, record: Record) -> None:
    """Where the time of one edit goes, phase by phase."""
    stages, encoded = Stages(), edit.encode()
    with stages.watched(watched_parts(edit)):
        phases = {"encode": timed(edit.encode)[0], "sample": timed(lambda: edit.sample(encoded))[0]}
        latent = edit.sample(encoded)
        phases["decode"] = timed(lambda: edit.decode(latent))[0]
    say(
        f"  {name}, every piece waited for: "
        + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in phases.items())
    )
    for part, seconds in stages.times.items():
        # Sampled twice above.
        runs = 2 if part.startswith("sample") else 1
        say(f"    {part:<34}{1000 * seconds / runs:9.1f} ms in {stages.calls[part] // runs} calls")
        record[f"{name}: {part}"] = [seconds / runs]


def find_waits(edit: Edit) -> None:
    """The lines of Python at which sampling waits for the device."""
    import torch

    encoded, found = edit.encode(), Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            edit.sample(encoded)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            found["/".join(Path(warning.filename).parts[-3:]) + f":{warning.lineno}"] += 1
    say(f"  waits for the device in one sampling of {edit.steps} steps: {sum(found.values())}")
    for place, count in found.most_common(20):
        say(f"    {count:4d} x {place}")


def profile(edit: Edit, record: Record, name: str) -> None:
    """How long the device works during one sampling, in how many kernels."""
    import torch
    from torch.profiler import ProfilerActivity

    encoded = edit.encode()
    edit.sample(encoded)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = timed(lambda: edit.sample(encoded))[0]
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    busy, count = sum(event.self_device_time_total for event in kernels) / 1e6, sum(event.count for event in kernels)
    say(f"  {name}: the device works {busy:.3f} of {seconds:.3f} s in {count} kernels")
    record[f"{name}: busy"], record[f"{name}: kernels"] = [busy], [count]
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:10]:
        say(f"    {event.self_device_time_total / 1000:9.1f} ms {event.count:6d} x {event.key[:90]}")


def peak() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def measure_edits(options, paths: dict, folder: Path, clip, vae, record: Record) -> None:
    import comfy.model_management
    import torch

    from step1x_core.host.checkpoints.loading import load_model
    from step1x_core.host.checkpoints.lora import apply_lora_file
    from step1x_core.host.speed.fp8_attention import missing_for_fp8, set_fp8_attention

    base, loaded_as = None, None
    for mode in options.modes:
        if not record.has_time(mode):
            continue
        fp8 = mode != "bf16"
        if loaded_as != fp8:
            base = None
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()
            base, loaded_as = load_model(paths["transformer"], options.version, quantise="fp8" if fp8 else None), fp8
        missing = missing_for_fp8(base.load_device) if mode == "fp8 attention" else None
        if missing:
            say(f"{mode}: left out ({missing})")
            continue
        layer = base.model.diffusion_model.single_blocks[0].linear2
        for steps in options.steps:
            write_lora(folder / f"{steps}.safetensors", steps, layer.out_features, layer.in_features)
            model = apply_lora_file(base, folder / f"{steps}.safetensors", 1.0)
            model = set_fp8_attention(model) if mode == "fp8 attention" else model
            edit, name = Edit(model, clip, vae, options.size), f"{mode}, {steps} x 1 at {options.size}"
            edit.whole()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            encoded = edit.encode()
            record.add(f"{name}: sampling", timed(lambda: edit.sample(encoded), options.repeats))
            record.add(f"{name}: whole edit", timed(edit.whole, options.repeats))
            record.add(f"{name}: peak", peak(), "GB")
            if steps == options.steps[0]:
                record.add(f"{name}: encode", timed(edit.encode, options.repeats))
                latent = edit.sample(encoded)
                record.add(f"{name}: decode", timed(lambda: edit.decode(latent), options.repeats))
                break_down(edit, name, record)
                if torch.cuda.is_available():
                    profile(edit, record, name)
                    find_waits(edit)


def measure_vae(options, vae, record: Record) -> None:
    """The VAE alone, with weights in either memory layout and with cuDNN choosing its kernels by trying them."""
    import torch

    if not record.has_time("vae"):
        return
    picture = torch.rand(1, options.size, options.size, 3)
    latent = vae.encode(picture)
    say(f"  VAE in {vae.vae_dtype} on {vae.device}")
    exact = vae.decode(latent)
    for layout in (torch.contiguous_format, torch.channels_last):
        vae.first_stage_model.to(memory_format=layout)
        for tries in (False, True):
            torch.backends.cudnn.benchmark = tries
            name = f"VAE, {str(layout).removeprefix('torch.')}{', benchmark' if tries else ''}"
            timed(lambda: vae.decode(vae.encode(picture)), 2)
            record.add(f"{name}: encode", timed(lambda: vae.encode(picture), options.repeats))
            record.add(f"{name}: decode", timed(lambda: vae.decode(latent), options.repeats))
            record.add(f"{name}: largest difference", (vae.decode(latent) - exact).abs().max().item(), "")
    torch.backends.cudnn.benchmark = False
    vae.first_stage_model.to(memory_format=torch.contiguous_format)


def made_up_sources(folder: Path, version: str, size: int, width: int):
    """Two cached sources with instructions, of random numbers, as an EditDataset. width: channels of the language model's states."""
    import torch

    from step1x_core.training.cache import Cache, CachedPair, EditDataset, pack_conditioning
    from step1x_core.training.dataset import EditPair

    cache = Cache(folder)
    positive, negative, latent = made_up_conditioning(version, size, width)
    cache.store("text", pack_conditioning(positive))
    cache.store("empty", pack_conditioning(negative))
    shape = latent["samples"].shape
    for number in range(2):
        cache.store(f"source{number}", {"latent": torch.randn(shape, generator=torch.Generator().manual_seed(number))})
    pairs = [
        CachedPair(
            EditPair(folder, folder, ""), "text", f"source{number}", None, tuple(shape[-2:]), "empty", f"{number:016x}"
        )
        for number in range(2)
    ]
    return EditDataset(cache, pairs)


def measure_distillation(options, paths: dict, folder: Path, record: Record) -> None:
    """Seconds of a trajectory and of a step of each stage, with an fp8 base, and the most memory that each took."""
    try:
        from step1x_core.host.training.distill import Lesson
        from step1x_core.training.distillation import CACHED, TEACHER, TRAJECTORY, Distillation
    except ImportError as problem:
        say(f"distillation: left out, this tree has none ({problem})")
        return
    import gc

    import comfy.model_management
    import torch

    from step1x_core.host.checkpoints.loading import load_model
    from step1x_core.host.training.train import train
    from step1x_core.training.objective import Settings

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    model = load_model(paths["transformer"], options.version, quantise="fp8")
    width = model.model.diffusion_model.connector.S.c_embedder.linear_1.in_features
    for size in options.distill_sizes:
        if not record.has_time(f"distillation at {size}"):
            continue
        dataset = made_up_sources(folder / f"sources{size}", options.version, size, width)
        moments = []

        def note(*args, moments=moments) -> None:
            Clock.wait()
            moments.append(time.perf_counter())

        for stage, share, count in ((CACHED, 0.0, 4), (TRAJECTORY, 1.0, 6), (TEACHER, 1.0, 4)):
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            teacher = Distillation(
                steps=4, teacher_steps=8 if options.tiny else 28, teacher_cfg=6.0, later=stage, share=share
            )
            lesson = Lesson(model, teacher, note)
            if stage == CACHED:
                moments.clear()
                with mock.patch.object(
                    comfy.model_management, "load_models_gpu", watch_start(comfy.model_management.load_models_gpu, note)
                ):
                    lesson.prepare(model, dataset, Settings(2))
                passes = f"{lesson.settings.stored * lesson.settings.substeps} x 2"
                record.add(
                    f"distillation at {size}: a trajectory of {passes}", [b - a for a, b in zip(moments, moments[1:])]
                )
                record.add(f"distillation at {size}: trajectory, peak", peak(), "GB")
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
            moments.clear()
            losses = train(
                model,
                dataset,
                Settings(count, rank=64),
                folder / f"run{size}{stage}",
                resume=False,
                report=note,
                lesson=lesson,
            ).losses
            if not all(loss == loss for loss in losses):
                raise FloatingPointError(f"A loss of size {size} is not a number.")
            record.add(f"distillation at {size}: step, stage {stage}", [b - a for a, b in zip(moments, moments[1:])])
            record.add(f"distillation at {size}: stage {stage}, peak", peak(), "GB")


def watch_start(load, note):
    """`load_models_gpu` that notes when it is done."""
    def loaded(*args, **kwargs):
        load(*args, **kwargs)
        note()
    return loaded


def main() -> int:
    import torch

    options = arguments()
    environment.use_host_in_process(cpu=not torch.cuda.is_available())
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    from comfyui_version import __version__ as host_version

    from step1x_core.host.checkpoints.loading import load_text_encoder

    comfy.utils.set_progress_bar_enabled(False)
    device = comfy.model_management.get_torch_device()
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(
        f"{card}, torch {torch.__version__}, ComfyUI {host_version}, Step1X-Edit {options.version}{' (miniature)' if options.tiny else ''}, "
        f"{options.repeats} runs after a warm-up"
    )
    record = Record(options.json, options.seconds)
    with (
        models_folder(options.models) as models,
        tempfile.TemporaryDirectory() as folder,
        torch.inference_mode(),
    ):
        record.add(
            "writing the checkpoints",
            timed(lambda: write_models(models, options.version, options.tiny, device, False)),
            digits=1,
        )
        paths = write_models(models, options.version, options.tiny, device, False)
        folder = Path(folder)
        if {"edit", "vae"} & {*options.parts}:
            clip = load_text_encoder(paths["mllm"], options.version)
            vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(paths["vae"])))
            if "edit" in options.parts:
                measure_edits(options, paths, folder, clip, vae, record)
            if "vae" in options.parts:
                measure_vae(options, vae, record)
            del clip, vae
        if "distill" in options.parts:
            measure_distillation(options, paths, folder, record)
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
