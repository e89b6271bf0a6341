#!/usr/bin/env python3
"""Speed and error of the text encoder's prompts, and of judging and proposing: `python benchmarks/gpu_encode.py`.

The weights are random and full-size. transformers runs on the same weights in the same process. The error is the relative L2 distance of
the conditioning to that of transformers in float32. "fp8" is as the
pack computes it; "multiplied" has the host round the inputs of quantised layers and multiply in fp8.
`--core FOLDER` measures another version of the pack's core. `--tiny` runs the same code with a miniature model, on a CPU too: it shows that
the script works, not how fast anything is.
"""

import argparse
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).absolute().parent.parent / "scripts" / "support"))
import environment
import gpu_edit

PARTS = ("encode", "error", "profile", "judge", "propose")
VERSIONS = ("v1.1", "v1.2")
IDEAS = '{"objects": [{"en": "a red sofa", "zh": "红色沙发", "colour": "green", "colour_zh": "绿色"}]}'
SCORES = '{"score": [8, 8], "reasoning": ""}'


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=("bf16", "float32", "fp8"), default=["bf16", "float32", "fp8"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=int, default=1024, help="size level and side of a square image")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--edits", type=int, default=16, help="edits that are judged, and images that edits are proposed for"
    )
    parser.add_argument(
        "--tokens", type=int, default=80, help="length of a judging reply; a proposal is three times as long"
    )
    parser.add_argument("--core", type=Path, help="folder that holds another step1x_core")
    parser.add_argument("--tiny", action="store_true", help="a miniature model")
    parser.add_argument(
        "--models", type=Path, help="keep the checkpoints in this folder, or take those that an earlier run kept there"
    )
    return parser.parse_args()


def say(text: str) -> None:
    print(text, flush=True)


def wait() -> None:
    gpu_edit.Clock.wait()


def timed(function, repeats: int) -> tuple[float, float]:
    """Median and half the spread of the seconds that a call takes, the device's work included, after three warm-ups."""
    times = []
    for _ in range(repeats + 3):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    times = times[3:]
    return statistics.median(times), (max(times) - min(times)) / 2


@contextmanager
def staged(modules: dict[str, object], times: dict[str, float]):
    """Adds the seconds spent in each module to `times`, waiting for the device around each."""
    with ExitStack() as stack:
        for name, module in modules.items():
            def before(module, args, name=name):
                wait()
                times[name] = times.get(name, 0) - time.perf_counter()

            def after(module, args, out, name=name):
                wait()
                times[name] += time.perf_counter()

            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


def load(path: Path, version: str, kind: str):
    """A text encoder whose prompts are computed as `kind` says."""
    import comfy.cli_args

    from step1x_core.host.checkpoints.loading import load_text_encoder

    comfy.cli_args.args.fp32_text_enc = kind == "float32"
    return load_text_encoder(path, version)


def multiply(clip, in_fp8: bool) -> None:
    """Have the host's quantised layers round their input and multiply in fp8, or bring the weights to the input's dtype."""
    for module in inner(clip).modules():
        if getattr(module, "layout_type", None) is not None and hasattr(module, "_full_precision_mm"):
            module._full_precision_mm = not in_fp8
            module.comfy_force_cast_weights = not in_fp8  # set by the patcher, since the host computes text in float32


def inner(clip):
    return clip.cond_stage_model.qwen25_7b.transformer


def picture(size: int, seed: int = 0):
    import torch

    return torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(seed))


def encode_speed(options, clip, version: str, kind: str) -> None:
    """One prompt, both prompts, and the stages of one."""
    from step1x_core.host.prompts.encoding import encode_edit

    image, vae = picture(options.size), SimpleNamespace(latent_channels=16, latent_dim=2)

    def tokenize():
        return clip.tokenize(gpu_edit.PROMPT, images=[image], size_level=options.size)

    tokens = tokenize()
    one = timed(lambda: clip.encode_from_tokens_scheduled(tokenize()), options.repeats)
    both = timed(
        lambda: encode_edit(clip, vae, image, gpu_edit.PROMPT, "", options.size, known={"samples": image}),
        options.repeats,
    )
    stages = {
        "tokenise": timed(tokenize, options.repeats)[0],
        "load": timed(lambda: clip.load_model(tokens), options.repeats)[0],
    }
    with staged({"vision": inner(clip).visual, "language": inner(clip).model}, stages):
        for _ in range(options.repeats):
            clip.encode_from_tokens_scheduled(tokens)
    stages |= {name: stages[name] / options.repeats for name in ("vision", "language")}
    length = sum(len(inner_tokens) for inner_tokens in [tokens["qwen25_7b"][0]])
    say(
        f"encode {version} {kind}: one prompt {one[0] * 1e3:.1f} ms (+-{one[1] * 1e3:.1f}), both {both[0] * 1e3:.1f} ms (+-{both[1] * 1e3:.1f}); "
        + ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in stages.items())
        + f" ms; {length} entries, CFG pair without VAE"
    )


def profile(options, clip, name: str) -> None:
    """The kernels and the calls that one prompt takes."""
    import torch

    def run():
        clip.encode_from_tokens_scheduled(
            clip.tokenize(gpu_edit.PROMPT, images=[picture(options.size)], size_level=options.size)
        )
        wait()

    run()
    kinds = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
    ]
    with torch.profiler.profile(activities=kinds) as found:
        run()
    for key in (
        ("self_cuda_time_total", "self_cpu_time_total") if torch.cuda.is_available() else ("self_cpu_time_total",)
    ):
        say(
            f"profile {name}, by {key}\n{found.key_averages().table(sort_by=key, row_limit=16, max_name_column_width=60)}"
        )


def states_of(clip, size: int):
    """The conditioning and the sequence behind it: states after the norm, input embeddings [1, L, C], and tokens."""
    import comfy.model_management

    tokens = clip.tokenize(gpu_edit.PROMPT, images=[picture(size)], size_level=size)
    clip.load_model(tokens)
    device = comfy.model_management.get_torch_device()
    sequence = [token[0] for token in tokens["qwen25_7b"][0]]
    states, embeds, positions = inner(clip).encode(sequence, device, hide_zeros=False)
    return states.float().cpu(), embeds.float().cpu(), positions.cpu(), sequence


def transformers_model(path: Path, tiny: bool, device):
    """Hugging Face's own model with these weights."""
    import tiny_models
    import torch
    from safetensors.torch import load_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    config = tiny_models.TINY_MLLM if tiny else gpu_edit.FULL_MLLM
    text = {key: value for key, value in config.items() if key != "vision_config"}
    settings = Qwen2_5_VLConfig(
        text_config=text, vision_config=config["vision_config"], image_token_id=151655, vision_start_token_id=151652
    )
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2_5_VLModel(settings).eval()
        torch.set_default_dtype(torch.float32)
    # Made on the device in bf16, but the rotation's frequencies are to be float32 as they are after from_pretrained.
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config) if hasattr(module, "config") else type(module)(module.dim)
            module.inv_freq = fresh.inv_freq.to(device)
    weights = load_file(path, device=str(device))
    model.load_state_dict(
        {
            key.replace("model.", "language_model.", 1): weight
            for key, weight in weights.items()
            if not key.startswith("lm_head")
        },
        strict=True,
    )
    return model


def transformers_states(model, sequence: list, positions, device):
    """States and input embeddings of transformers for a sequence of ours."""
    import torch
    from comfy.text_encoders.qwen_vl import process_qwen2vl_images

    at = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
    patches, grid = process_qwen2vl_images(sequence[at]["data"][None].float() / 255)
    ids = torch.tensor([[*sequence[:at], *[151655] * (len(patches) // 4), *sequence[at + 1:]]], device=device)
    seen = []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    out = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions[:, None].to(device),
        pixel_values=patches.to(device, next(model.parameters()).dtype),
        image_grid_thw=grid.reshape(1, 3).to(device),
    ).last_hidden_state
    hook.remove()
    return out.float(), seen[0].float()


def errors(options, paths: dict[str, Path]) -> None:
    """Distances to transformers in float32, of ours and of transformers in bf16."""
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    ours, sequences = {}, {}
    for kind in options.formats:
        for version in VERSIONS:
            clip = load(paths["fp8" if kind == "fp8" else "bf16"], version, kind)
            *ours[kind, version], sequences[version] = states_of(clip, options.size)
            if kind == "fp8":
                for name, multiplied in (("fp8 weights only", False), ("fp8 multiplied", True)):
                    multiply(clip, multiplied)
                    *ours[name, version], _ = states_of(clip, options.size)
                multiply(clip, False)
                comfy.cli_args.args.fp32_text_enc = True
                *ours["fp8 in float32", version], _ = states_of(clip, options.size)
                comfy.cli_args.args.fp32_text_enc = False
            clip = None
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()
    model = transformers_model(paths["bf16"], options.tiny, device)
    theirs = {
        version: transformers_states(model, sequences[version], ours[options.formats[0], version][2], device)
        for version in VERSIONS
    }
    seconds = timed(
        lambda: transformers_states(model, sequences["v1.1"], ours[options.formats[0], "v1.1"][2], device),
        options.repeats,
    )[0]
    say(f"transformers bf16: {seconds * 1e3:.1f} ms with vision, without resizing")
    model = model.float()

    def distance(found, exact) -> str:
        return f"{((found.to(exact.device) - exact).norm() / exact.norm()).item():.3e}"

    for version in VERSIONS:
        exact = transformers_states(model, sequences[version], ours[options.formats[0], version][2], device)
        say(
            f"error {version} transformers bf16: states {distance(theirs[version][0], exact[0])}, embeddings {distance(theirs[version][1], exact[1])}"
        )
        for kind, name in ours:
            if name == version:
                found = ours[kind, version]
                say(
                    f"error {version} ours {kind}: states {distance(found[0], exact[0])}, embeddings {distance(found[1], exact[1])}"
                )
        if ("fp8 in float32", version) in ours:
            exact = ours["fp8 in float32", version]
            for kind in ("fp8", "fp8 weights only", "fp8 multiplied"):
                say(
                    f"error {version} ours {kind} to the same weights in float32: states {distance(ours[kind, version][0], exact[0])}"
                )


def replaced(name: str, tokens: int, reply: str):
    """`generate_text` or `generate_texts` of the pack with replies of a fixed length, read as `reply`."""
    import step1x_core.host.reasoning.generation as generation

    true = getattr(generation, name)

    def replies(clip, *args, **kwargs):
        # The budget is the last of the positional arguments of both, or one before the seed.
        args = list(args)
        args[2 if name == "generate_text" else 1] = tokens
        out = true(clip, *args, **kwargs)
        return reply if isinstance(out, str) else [reply] * len(out)

    return replies


def judging(options, clip, kind: str) -> None:
    """Edits judged in a minute, with replies of a fixed length."""
    import numpy as np
    from PIL import Image

    try:
        from step1x_core.host.reasoning import judging as module
    except ImportError:  # an older core
        from step1x_core.host.gedit import benchmark as module

    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)) for _ in range(4)]
    edits = [(f"edit {i}", images[i % 4], images[(i + 1) % 4], gpu_edit.PROMPT) for i in range(options.edits)]
    with mock.patch.object(module, "generate_texts", replaced("generate_texts", options.tokens, SCORES)):
        def run(some):
            found = list(module.judge_edits(clip, some, 0))
            assert len(found) == len(some) and all(verdict.semantics == (8, 8) for _, verdict in found)

        run(edits[:2])
        start = time.perf_counter()
        run(edits)
        wait()
    seconds = time.perf_counter() - start
    say(
        f"judge {kind}: {60 * len(edits) / seconds:.1f} edits a minute, two replies of {options.tokens} tokens each ({seconds:.1f} s for {len(edits)})"
    )


def proposing(options, clip, kind: str) -> None:
    """Images that edits are proposed for in a minute, with replies of a fixed length."""
    from step1x_core.host.pairs import making
    from step1x_core.host.reasoning import thinking

    images = [picture(1024, seed) for seed in range(options.edits)]
    with ExitStack() as stack:
        try:
            from step1x_core.host.reasoning import pool
        except ImportError:  # an older core, which asks about one image at a time
            pool = None
        module, name = (thinking, "generate_text") if pool is None else (pool, "generate_texts")
        stack.enter_context(mock.patch.object(module, name, replaced(name, 3 * options.tokens, IDEAS)))

        def run(some):
            if pool is None:
                return [making.propose_edits(clip, image, "", 4, 0) for image in some]
            return making.propose_edits(clip, [{"image": image, "kinds": "", "count": 4, "seed": 0} for image in some])

        run(images[:1])
        start = time.perf_counter()
        run(images)
        wait()
    seconds = time.perf_counter() - start
    say(
        f"propose {kind}: {60 * len(images) / seconds:.1f} images a minute, a reply of {3 * options.tokens} tokens each ({seconds:.1f} s for {len(images)})"
    )


def main() -> int:
    import torch

    options = arguments()
    environment.use_host_in_process(cpu=not torch.cuda.is_available())
    if options.core:
        sys.path.insert(1, str(options.core.absolute()))
    import comfy.model_management
    import comfy.utils
    from comfyui_version import __version__ as host_version

    import step1x_core

    comfy.utils.set_progress_bar_enabled(False)
    device = comfy.model_management.get_torch_device()
    say(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}, ComfyUI {host_version}, size {options.size}, "
        f"core {Path(step1x_core.__file__).parent}{' (miniature)' if options.tiny else ''}"
    )
    shared = Path("/dev/shm")
    start = time.perf_counter()
    with (
        gpu_edit.models_folder(options.models, shared if shared.is_dir() else None) as folder,
        torch.inference_mode(),
    ):
        paths = gpu_edit.write_language_models(
            folder, options.tiny, device, ["bf16", *({"fp8"} & {*options.formats})], fp8_head=False
        )
        for kind in options.formats:
            for version in VERSIONS:
                clip = load(paths["fp8" if kind == "fp8" else "bf16"], version, kind)
                if "encode" in options.parts:
                    encode_speed(options, clip, version, kind)
                    if kind == "fp8":
                        multiply(clip, True)
                        encode_speed(options, clip, version, "fp8 multiplied")
                        multiply(clip, False)
                if "profile" in options.parts and kind != "float32" and version == "v1.1":
                    profile(options, clip, f"{version} {kind}")
                if version == "v1.1" and kind != "float32":
                    if "judge" in options.parts:
                        judging(options, clip, kind)
                    if "propose" in options.parts:
                        proposing(options, clip, kind)
                clip = None
                comfy.model_management.unload_all_models()
                comfy.model_management.soft_empty_cache()
                say(f"{time.perf_counter() - start:.0f} s so far")
        if "error" in options.parts:
            errors(options, paths)
    say(f"{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    environment.reexecute_in_host(__file__)
    sys.exit(main())
