#!/usr/bin/env python3
"""Make a smaller or faster copy of a Step1X-Edit model or of its language model: `python scripts/convert.py IN OUT --format fp8`.
Write a LoRA under the names of other programs: `python scripts/convert.py LORA OUT --format diffusers`.

IN is a single file, a folder of shards or a diffusers folder, in bf16, fp16, fp32 or plain fp8. OUT is one safetensors file in ComfyUI's own
format, which the stock loaders read as well as this pack's. At no time is more than a few tensors in memory.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent / "support"))  # missing in an embedded Python
import environment

FORMATS = """formats (what computes with them directly; ComfyUI unpacks fp8, mxfp8 and nvfp4 elsewhere):
  fp8           8-bit floats, one scale per matrix. NVIDIA GPUs from the RTX 40 series on.
  mxfp8         8-bit floats, one scale per 32 values. RTX 50 series and data-centre Blackwell.
  int8          8-bit integers, one scale per row; less error than fp8. From the RTX 20 series on. ComfyUI 0.30.0 or newer.
  int8_convrot  int8 with rotated columns, which keeps outliers from costing precision. As int8.
  w4a8          4-bit weights with one scale per 16 values, rotated; inputs in 8 bits. RTX 30 series and newer.
                ComfyUI 0.33.0 or newer.
  w4a4          4-bit weights and inputs, rotated: the smallest, but its error is too large for CFG. RTX 20 series and newer.
                ComfyUI 0.30.0 or newer.
  nvfp4         4-bit floats, one scale per 16 values. RTX 50 series and newer.
  bf16          not quantised: for a single file of a diffusers folder, or to halve an fp32 file.
formats of LoRAs:
  kohya      the names of the official training code, which ComfyUI reads.
  diffusers  a file for diffusers' load_lora_weights and most other programs.
  PEFT       a folder for peft, with adapter_config.json.
See docs/conversion.md for sizes and errors."""
CHOICES = ("fp8", "mxfp8", "int8", "int8_convrot", "w4a8", "w4a4", "nvfp4", "bf16")


LORA_FORMATS = ("kohya", "diffusers", "PEFT")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FORMATS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "input",
        type=Path,
        metavar="IN",
        help="model file or folder. Of a diffusers repository the transformer is taken; "
        "for the language model name the folder text_encoder in it",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="the safetensors file to write")
    parser.add_argument("--format", choices=(*CHOICES, *LORA_FORMATS), default="fp8",
                        help="of the large layers (default: fp8); everything else becomes bf16")
    parser.add_argument("--keep", action="append", default=[], metavar="PATTERN",
                        help="layers to keep in bf16, such as 'double_blocks.0.*'; may be given again")
    parser.add_argument(
        "--modulation",
        nargs="?",
        const="fp8",
        choices=("fp8", "nvfp4"),
        help="also store the modulation layers in fp8 (the default: 3.2 GB less) or nvfp4 (4.7 GB less)",
    )
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="have ComfyUI unpack the weights and compute in full precision: saves memory, but no time (fp8, nvfp4)",
    )
    parser.add_argument(
        "--encoder-only",
        action="store_true",
        help="of a language model leave out the head, and store the vision tower in fp8: 1.3 GB less. It encodes "
        "prompts, but cannot think, reflect or judge",
    )
    parser.add_argument(
        "--version", help="v1.0, v1.1, v1.2-preview, v1.2 or RealRestorer, where neither the tensors nor the names tell"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    return parser.parse_args()


def model_config(checkpoint, weights, version: str | None) -> dict:
    """What the model's shapes do not show, its version foremost. Raises Step1XError for an incomplete model and as `choose_version` does."""
    from step1x_core.checkpoints.detection import (
        CONFIG_KEY,
        choose_version,
        config_tensor,
        detect_config,
        parse_config,
        stored_config,
    )
    from step1x_core.checkpoints.files import check_tensors
    from step1x_core.host.checkpoints.loading import CONFIG_NAMES, model_shapes, shapes

    values = stored_config(weights.stored) | parse_config(weights.metadata.get(CONFIG_KEY, "{}"))
    values |= {name: checkpoint.config[key] for key, name in CONFIG_NAMES.items() if key in checkpoint.config}
    if version is not None or "version" not in values:
        values["version"] = version or choose_version(checkpoint, weights.shapes, weights.prefix)
    config = detect_config(weights.shapes | {CONFIG_KEY: config_tensor(values)})
    check_tensors(checkpoint.path.name, model_shapes(config), shapes(weights.shapes))
    return values


def mllm_config(checkpoint, weights) -> dict:
    """What the language model's shapes do not show. Raises Step1XError for an incomplete one."""
    from step1x_core.checkpoints.detection import CONFIG_KEY, parse_config
    from step1x_core.checkpoints.files import check_tensors
    from step1x_core.checkpoints.language_model import detect_mllm_config, normalize_keys
    from step1x_core.host.checkpoints.loading import mllm_shapes, shapes

    values = checkpoint.config or parse_config(weights.metadata.get(CONFIG_KEY, "{}"))
    tensors = normalize_keys(weights.shapes)
    check_tensors(checkpoint.path.name, mllm_shapes(detect_mllm_config(tensors, values)), shapes(tensors))
    return values


def convert(source: Path, out: Path, form: str, version: str | None = None, **options) -> str:
    """Convert a model or a language model; returns the SHA-256 of the file. options: as for `step1x_core.conversion.convert`.

    Raises Step1XError for what cannot be read, converted or written.
    """
    from step1x_core.checkpoints import conversion
    from step1x_core.checkpoints.detection import CONFIG_KEY, config_tensor
    from step1x_core.checkpoints.files import find_checkpoint
    from step1x_core.errors import Step1XError

    checkpoint = find_checkpoint(source, "transformer")
    weights = conversion.Weights(checkpoint.files)
    metadata = {**weights.metadata, "format": "pt"}
    extra = {}
    try:
        if weights.kind == "model":
            # As a tensor the version reaches the stock loader, too.
            metadata.pop(CONFIG_KEY, None)
            extra[CONFIG_KEY] = config_tensor(model_config(checkpoint, weights, version))
        else:
            metadata[CONFIG_KEY] = json.dumps(mllm_config(checkpoint, weights))
    except KeyError as error:
        raise Step1XError(
            f"{checkpoint.path.name} lacks the tensor {error.args[0]}. The file is incomplete; download it again."
        ) from error
    return conversion.convert(weights, out, form, extra, metadata, **options)


def convert_lora(source: Path, out: Path, form: str, force: bool = False) -> None:
    """Write a LoRA file under the names of LORA_FORMATS. Raises Step1XError for what is not a plain LoRA of this model,
    for an existing OUT without `force`, and for what cannot be read or written."""
    from safetensors import safe_open

    from step1x_core.checkpoints.files import check_file
    from step1x_core.checkpoints.lora_export import export_lora
    from step1x_core.errors import Step1XError

    check_file(source)
    if out.exists() and (out.samefile(source) or not force):
        raise Step1XError(f"{out} exists. Choose another name, or overwrite it with --force.")
    with safe_open(source, framework="pt") as file:
        lora, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    export_lora(lora, out, form, metadata)


def show(done: int, total: int) -> None:
    filled = 40 * done // total
    print(
        f"\r[{'#' * filled}{'.' * (40 - filled)}] {done / 1e9:.1f} of {total / 1e9:.1f} GB",
        end="" if done < total else "\n",
        file=sys.stderr,
        flush=True,
    )


def main() -> int:
    options = arguments()
    environment.use_host_in_process()
    from comfy.quant_ops import QUANT_ALGOS

    from step1x_core.checkpoints.formats import FORMATS
    from step1x_core.errors import Step1XError

    if options.format in LORA_FORMATS:
        try:
            convert_lora(options.input, options.output, options.format, options.force)
        except (Step1XError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
        print(options.output)
        return 0
    if FORMATS[options.format] and FORMATS[options.format].host not in QUANT_ALGOS:
        print(f"Note: this ComfyUI cannot load {options.format} files; a newer one can.", file=sys.stderr)
    try:
        digest = convert(
            options.input,
            options.output,
            options.format,
            options.version,
            keep=options.keep,
            modulation=options.modulation,
            weights_only=options.weights_only,
            encoder_only=options.encoder_only,
            force=options.force,
            progress=show,
        )
    except (Step1XError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(f"{options.output}  {options.output.stat().st_size / 1e9:.2f} GB  sha256 {digest}")
    return 0


if __name__ == "__main__":
    with environment.cancellable():
        environment.reexecute_in_host(__file__)
        sys.exit(main())
