"""Loads checkpoints as the host's MODEL, CLIP and VAE objects."""

import functools
import logging
from contextlib import contextmanager
from pathlib import Path

import comfy.diffusers_convert
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders.hunyuan_video import llama_detect

from ...checkpoints.detection import (
    CONFIG_KEY,
    CONNECTOR_KEY,
    PIPELINE_LAYOUTS,
    choose_version,
    config_tensor,
    detect_config,
    parse_config,
    pipeline_layout,
    stored_config,
)
from ...checkpoints.files import Checkpoint, check_file, check_tensors, check_types, find_checkpoint, is_model_folder
from ...checkpoints.formats import is_packed
from ...checkpoints.gguf_files import is_gguf, read_gguf, read_language_model
from ...checkpoints.keys import diffusers_to_original, is_diffusers_layout
from ...checkpoints.language_model import TEXT_KEY, VISION_KEY, MLLMConfig, detect_mllm_config, normalize_keys
from ...checkpoints.markers import FILE_MARKER, lift_marker, marked_layers, merge_metadata, shorten_metadata
from ...checkpoints.prefixes import COMPILED, transformer_names, transformer_prefix
from ...checkpoints.quantised import check_foreign, check_leftovers, multiply_out, unknown_tensors
from ...errors import Step1XError
from ...versions import LAYOUT_V11, LAYOUTS
from ..network.blocks import PAIRED
from ..network.model import register
from ..network.transformer import Step1XTransformer
from ..prompts.qwen import Qwen25VL
from ..prompts.text_encoder import Step1XTEModel, Step1XTokenizer
from ..sampling.sampler import with_norm_limiter
from .folders import miniature_file
from .quantising import quantised

log = logging.getLogger(__name__)

# Values in a diffusers config.json that shapes do not show, and our names for them.
CONFIG_NAMES = {"axes_dims_rope": "axes_dim", "connector_heads_num": "connector_heads"}

# The tensor by which the host recognises diffusers names in a VAE.
DIFFUSERS_VAE_KEY = "decoder.up_blocks.0.resnets.0.norm1.weight"

# Tensors that identify FLUX, in the original and in the diffusers layout.
FLUX_KEYS = (
    ("double_blocks.0.img_attn.qkv.weight",),
    ("x_embedder.weight", "single_transformer_blocks.0.proj_mlp.weight"),
)


@contextmanager
def naming(name: str):
    """Turn errors raised while a file is read or passed to the host into one that names the file and keeps the cause.

    It does not blame the file: it may be damaged, or the host or this pack may not support its content.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, Step1XError) or comfy.model_management.is_oom(error):
            raise
        detail = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise Step1XError(
            f"{name} could not be loaded ({detail}). The file may be damaged or of another kind, or this version of "
            "ComfyUI or of this node pack may not support its format. Try another file; if a known good file also "
            "fails, update both and report the error."
        ) from error


def read_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict]:
    """Read all tensors of a checkpoint (memory-mapped if the host does so) and the metadata of its files.

    Raises Step1XError for a damaged file, and the host's InterruptProcessingException if the user cancels, after any
    file.
    """
    state_dict, metadata = {}, {}
    for path in checkpoint.files:
        if is_gguf(path):
            state_dict.update(read_gguf(path, comfy.model_management.throw_exception_if_processing_interrupted)[0])
            continue
        check_file(path)
        tensors, file_metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        comfy.model_management.throw_exception_if_processing_interrupted()
        state_dict.update(tensors)
        metadata = merge_metadata(path.name, metadata, file_metadata or {})
    return state_dict, metadata


def strip_prefix(name: str, state_dict):
    """Return the transformer's tensors without prefix; markers of the whole file are kept. Raises Step1XError as
    `transformer_names` does."""
    renamed = transformer_names(name, state_dict) or transformer_names(
        name, state_dict, [key for keys in FLUX_KEYS for key in keys[:1]]
    )
    marks = {key: state_dict[key] for key in (FILE_MARKER, CONFIG_KEY) if key in state_dict}
    return marks | {short: state_dict[key] for key, short in renamed.items()} if renamed else state_dict


def check_weights(name: str, expected: dict[str, tuple[int, ...]], state_dict: dict[str, torch.Tensor]) -> None:
    """Raise Step1XError for tensors that are missing, of the wrong shape, or not a weight dtype."""
    check_tensors(name, expected, shapes(state_dict))
    check_types(name, state_dict, [key for key in state_dict if key in expected])


def without_scales(checkpoint: Checkpoint, state_dict, marked: set[str]) -> None:
    """Apply the scales that ComfyUI would ignore, in place. Raises Step1XError for scales that cannot be read."""
    name, check = checkpoint.path.name, comfy.model_management.throw_exception_if_processing_interrupted
    count = multiply_out(name, state_dict, marked, checkpoint.config, check)
    if count:
        log.info(
            "%s: applied the scales of %d weights without ComfyUI's marker; these weights are bfloat16 now",
            name, count,
        )


def check_extra(name: str, expected: dict[str, tuple[int, ...]], state_dict, marked: set[str]) -> None:
    """Raise Step1XError for integer weights without a scale and for orphaned scales; log tensors that no layer uses."""
    check_leftovers(name, state_dict, marked)
    unknown = unknown_tensors(state_dict, expected, marked)
    if unknown:
        first = ", ".join(unknown[:3]) + (", ..." if unknown[3:] else "")
        log.warning(
            "%s contains %d tensors that the model does not have; they are ignored: %s",
            name, len(unknown), first,
        )


def shapes(state_dict) -> dict[str, tuple[int, ...]]:
    """Return tensor shapes by name. Packed 4-bit weights, which the host unpacks, are given with their unpacked
    shape."""
    out = {}
    for key, tensor in state_dict.items():
        packed = is_packed(key, tensor, state_dict)
        out[key.replace("_norm.scale", "_norm.weight")] = (
            (*tensor.shape[:-1], tensor.shape[-1] * 2) if packed else tuple(tensor.shape)
        )
    return out


def model_shapes(config) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the transformer's tensors, from the model class on the meta device."""
    # Built from plain torch layers: with dynamic VRAM, the host's own have no weights before they are loaded.
    model = Step1XTransformer(operations=torch.nn, device="meta", dtype=torch.bfloat16, **config.transformer_params())
    return shapes(model.state_dict())


def mllm_shapes(config: MLLMConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the language model's tensors."""
    return shapes(Qwen25VL(config.__dict__, torch.bfloat16, "meta", torch.nn).state_dict())


def model_state_dict(checkpoint: Checkpoint, version: str | None = None) -> tuple[dict, dict]:
    """Return transformer weights in the original layout, ready for the host's loader, and the file metadata.

    Raises Step1XError for files that are damaged, incomplete, of another model, in another tool's format, quantised in
    the diffusers layout or of an unknown version, and for contradicting version markers.
    """
    pipeline_layout(checkpoint)
    state_dict, metadata = read_checkpoint(checkpoint)
    name = checkpoint.path.name
    check_foreign(name, state_dict, checkpoint.config)
    lift_marker(state_dict)
    prefix = transformer_prefix(name, state_dict)
    state_dict = strip_prefix(name, state_dict)
    metadata = shorten_metadata(
        name, metadata, state_dict, lambda names: {key.replace(COMPILED, ""): value for key, value in names.items()}
    )
    # The connector has the same names in both layouts, so a foreign file is refused before the conversion copies it.
    if CONNECTOR_KEY not in state_dict:
        if any(all(key in state_dict for key in keys) for keys in FLUX_KEYS):
            raise Step1XError(
                f"{name} is a FLUX model: it has no Step1X-Edit connector. Load it with 'Load Diffusion Model', or "
                "choose a Step1X-Edit file here."
            )
        raise Step1XError(
            f"{name} is not a Step1X-Edit model: {CONNECTOR_KEY} is missing. Choose a file such as "
            "step1x-edit-v1p1-official.safetensors."
        )
    marked = marked_layers(name, state_dict, metadata)
    without_scales(checkpoint, state_dict, marked)
    if is_diffusers_layout(state_dict):
        with naming(name):
            state_dict = diffusers_to_original(state_dict)

    overrides = stored_config(state_dict) | parse_config(metadata.get(CONFIG_KEY, "{}"))
    overrides |= {name: checkpoint.config[key] for key, name in CONFIG_NAMES.items() if key in checkpoint.config}
    if version is not None or "version" not in overrides:
        overrides["version"] = version or choose_version(checkpoint, state_dict, prefix)
    state_dict[CONFIG_KEY] = config_tensor(overrides)
    with naming(name):
        try:
            config = detect_config(state_dict)
        except KeyError as error:
            raise Step1XError(
                f"{name} lacks the tensor {error.args[0]}. The file may be incomplete; download it again."
            ) from error
        expected = model_shapes(config)
    check_weights(name, expected, state_dict)
    if is_diffusers_layout(state_dict):
        # Left over from the conversion: scales of matrices that it fused.
        raise Step1XError(
            f"{name} is quantised in the diffusers layout, which is not supported. Choose a scaled file in the "
            "original layout, or the unquantised file with an fp8 weight_dtype."
        )
    check_extra(name, expected, state_dict, marked)
    log.info("Loaded Step1X-Edit %s from %s", config.version, checkpoint.path)
    return state_dict, metadata


def load_model(
    path,
    version: str | None = None,
    model_options={},
    disable_dynamic=False,
    quantise: str | None = None,
    paired: bool = False,
):
    """Load a Step1X-Edit transformer as a ModelPatcher with norm-limited guidance enabled.

    path: single file (original or diffusers layout, any dtype, or GGUF), model folder, or diffusers repository.
    version: a name in VERSIONS, or None to detect it.
    model_options, disable_dynamic: as for `comfy.sd.load_diffusion_model`.
    quantise: what to convert the large matrices to while loading, a name in quantising.CHOICES: "fp8" is e4m3 with
    scales, for fp8 tensor cores if the GPU has them. None leaves them as they are.
    paired: whether both prompts' inputs of fp8 layers are rounded as pairs (network/pair_kernels.py), where the GPU has
    fp8 tensor cores and Triton.

    Raises Step1XError as `model_state_dict` and `quantised` do, for an unknown version, and for weights that the host
    cannot load.
    """
    register()
    checkpoint = find_checkpoint(path, "transformer")
    state_dict, metadata = model_state_dict(checkpoint, version)
    if quantise:
        state_dict = quantised(state_dict, quantise)
    with naming(checkpoint.path.name):
        patcher = comfy.sd.load_diffusion_model_state_dict(
            state_dict, model_options=model_options, metadata=metadata, disable_dynamic=disable_dynamic
        )
    if patcher is None:
        raise Step1XError(
            f"ComfyUI does not recognise {checkpoint.path.name} as a Step1X-Edit model. Restart ComfyUI; if that does "
            "not help, report it with the version of ComfyUI and the name of the file."
        )
    patcher.cached_patcher_init = (functools.partial(load_model, quantise=quantise, paired=paired), (path, version, model_options))
    if paired:
        patcher.model_options.setdefault("transformer_options", {})[PAIRED] = True
    return with_norm_limiter(patcher)


def mllm_state_dict(checkpoint: Checkpoint) -> tuple[dict, MLLMConfig]:
    """Return language-model weights with `model.*` and `visual.*` names, and their configuration.

    Raises Step1XError for files that are damaged, of another model, or incomplete.
    """
    name = checkpoint.path.name
    if is_gguf(checkpoint.path):
        check, metadata = comfy.model_management.throw_exception_if_processing_interrupted, {}
        state_dict, checkpoint.config = read_language_model(checkpoint.path, check)
    else:
        state_dict, metadata = read_checkpoint(checkpoint)
    check_foreign(name, state_dict, checkpoint.config)
    state_dict = normalize_keys(state_dict)
    lift_marker(state_dict)
    metadata = shorten_metadata(name, metadata, state_dict, normalize_keys)
    state_dict, metadata = comfy.utils.convert_old_quants(state_dict, model_prefix="", metadata=metadata)
    if TEXT_KEY not in state_dict:
        raise Step1XError(
            f"{name} is not a Qwen2.5-VL model: {TEXT_KEY} is missing. Choose a file such as "
            "qwen_2.5_vl_7b.safetensors."
        )
    if VISION_KEY not in state_dict:
        raise Step1XError(
            f"{name} has no vision tower ({VISION_KEY} is missing), which Step1X-Edit needs to read the image. Choose "
            "the full Qwen2.5-VL-7B-Instruct."
        )
    marked = marked_layers(name, state_dict, {})
    without_scales(checkpoint, state_dict, marked)
    with naming(name):
        try:
            config = detect_mllm_config(state_dict, checkpoint.config or parse_config(metadata.get(CONFIG_KEY, "{}")))
        except KeyError as error:
            raise Step1XError(
                f"{name} lacks the tensor {error.args[0]}. It may be incomplete or another model; choose the full "
                "Qwen2.5-VL-7B-Instruct."
            ) from error
        expected = mllm_shapes(config)
    check_weights(name, expected, state_dict)
    check_extra(name, expected, state_dict, marked)
    log.info("Loaded the Step1X-Edit text encoder from %s", checkpoint.path)
    return state_dict, config


def load_text_encoder(path, layout: str | None = None, model_options={}, disable_dynamic=False) -> comfy.sd.CLIP:
    """Load Qwen2.5-VL as a CLIP object that tokenises and lays out prompts as in Step1X-Edit's training.

    path: the single file that Qwen-Image uses (bf16 or scaled fp8), a GGUF file with its mmproj file beside it, a
    Hugging Face folder, or a diffusers repository.
    layout: "v1.1" (also for v1.0), "v1.2", or None for the layout of the repository's version, else v1.1. Repositories
    of other models contain the same Qwen2.5-VL.

    Raises Step1XError as `mllm_state_dict` does, and for weights that the host cannot load.
    """
    checkpoint = find_checkpoint(path, "text_encoder")
    layout = LAYOUTS[layout] if layout else PIPELINE_LAYOUTS.get(checkpoint.pipeline, LAYOUT_V11)
    state_dict, config = mllm_state_dict(checkpoint)
    tokenizer = functools.partial(Step1XTokenizer, layout=layout)
    with naming(checkpoint.path.name):
        target = ClipTarget(tokenizer, functools.partial(Step1XTEModel, config=config, **llama_detect(state_dict)))
        parameters = comfy.utils.calculate_parameters(state_dict)
        clip = comfy.sd.CLIP(
            target,
            parameters=parameters,
            state_dict=[state_dict],
            model_options=model_options,
            disable_dynamic=disable_dynamic,
        )
    clip.patcher.cached_patcher_init = (load_text_encoder_patcher, (path, layout.name, model_options))
    return clip


def load_text_encoder_patcher(
    path, layout=None, model_options={}, disable_dynamic=False
) -> comfy.model_patcher.ModelPatcher:
    return load_text_encoder(path, layout, model_options, disable_dynamic).patcher


def load_vae(path) -> comfy.sd.VAE:
    """Load the VAE of a diffusers repository, a model folder or a file with the host's own VAE class.

    Raises Step1XError for files that are damaged, incomplete, without a VAE, or in another tool's format.
    """
    checkpoint = find_checkpoint(path, "vae")
    state_dict, metadata = read_checkpoint(checkpoint)
    check_foreign(checkpoint.path.name, state_dict, checkpoint.config)
    marked = marked_layers(checkpoint.path.name, state_dict, metadata)
    without_scales(checkpoint, state_dict, marked)
    if DIFFUSERS_VAE_KEY in state_dict:
        state_dict = comfy.diffusers_convert.convert_vae_state_dict(state_dict)
    with naming(checkpoint.path.name):
        vae = comfy.sd.VAE(sd=state_dict, metadata=metadata)
        if vae.first_stage_model is None:
            raise Step1XError(
                f"{checkpoint.path.name} does not contain a VAE that ComfyUI recognises. Download the repository's vae "
                "folder again, or delete it and connect the stock 'Load VAE' with ae.safetensors."
            )
        # The host would use uninitialised memory in place of a missing tensor.
        check_weights(checkpoint.path.name, shapes(vae.first_stage_model.state_dict()), state_dict)
    if marked:
        raise Step1XError(
            f"{checkpoint.path.name} is a quantised VAE. ComfyUI does not support it and would ignore the scales. Use "
            "a bf16 or fp32 VAE, such as ae.safetensors."
        )
    check_leftovers(checkpoint.path.name, state_dict, set())
    return vae


def load_own_vae(path) -> comfy.sd.VAE | None:
    """The VAE in the vae folder of a diffusers repository, and that of the miniature. None for other single files and
    for a folder without one.

    Raises Step1XError as `load_vae` does.
    """
    if Path(path) == miniature_file("diffusion_models"):
        return load_vae(miniature_file("vae"))
    folder = Path(path, "vae")
    return load_vae(folder) if folder.is_dir() and is_model_folder(folder) else None
