"""Training a LoRA in the host: gradients through frozen weights of any kind, the steps, what is kept of them, and
pictures on the way.

The stock trainer fails on conditionings with reference latents and knows neither the objective nor the layers of this
model. So the steps are ours, while loading, offloading, casting, conditioning and sampling are the host's.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.samplers
import numpy as np
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...errors import Step1XError
from ...images import to_uint8
from ...training.cache import CachedPair, EditDataset
from ...training.objective import Origin, Settings, add_noise, draw, flow_loss, pair_at
from ..network.attention import torch_attention_chosen
from ..sampling.few_steps import version_defaults
from ..sampling.sampler import check_model, model_sigmas, sample, with_norm_limiter
from .adapted import adapted, linear_shapes
from .run import LORA_FILE, STATE_FILE, Run  # noqa: F401 (the names of what a training leaves)

# Bytes for each weight of a LoRA: itself, its gradient and two moments in float32.
TRAINED_BYTES = 16
# The working memory of one block and its gradients, in units of what sampling takes: counted 1.5 at 1024x1024 and 1.8
# at 512x512, without the weights of one layer.
BACKWARD_FACTOR = 2.5

# Layouts of quantised weights through which ComfyUI passes no gradients, and the converter's name for each.
NO_GRADIENTS = {"TensorCoreConvRotW4A4Layout": "w4a4"}


def prepare_model(model):
    """A clone to train on. Where the host would compute in float16, whose range is too small for gradients, it computes
    in float32.

    Raises Step1XError for weights that the host cannot unpack by itself, and for those without gradients.
    """
    model = model.clone()
    for module in model.model.diffusion_model.modules():
        if (
            hasattr(module, "in_features")
            and type(module.weight) is not torch.nn.Parameter
            and not isinstance(module.weight, QuantizedTensor)
        ):
            raise Step1XError("A LoRA cannot be trained on GGUF weights, which only their own loader can unpack. "
                              "Load a safetensors file with 'Load Step1X-Edit Model'; fp8 saves memory.")
        layout = getattr(getattr(module, "weight", None), "_layout_cls", None)
        if layout in NO_GRADIENTS:
            raise Step1XError(f"A LoRA cannot be trained on {NO_GRADIENTS[layout]} weights, whose product has no "
                              "gradients in ComfyUI. Load an fp8 or int8 file, or set 'weight_dtype' to fp8_scaled.")
    model.model.diffusion_model.requires_grad_(False)
    if model.model.get_dtype_inference() == torch.float16:
        model.set_model_compute_dtype(torch.float32)
    return model


def load_for_training(model, dataset: EditDataset, settings: Settings, trained: int, checkpointing: bool) -> None:
    """Load as much of the model as fits beside what the training needs; the host brings the rest in layer by layer.
    trained: number of weights of the LoRA."""
    # Target and reference side by side, in latent pixels.
    height, width = max((item.size for item in dataset.pairs), key=math.prod)
    working = BACKWARD_FACTOR * model.memory_required([settings.batch, model.model.latent_channels, height, 2 * width])
    if not checkpointing:
        transformer = model.model.diffusion_model
        working *= len(transformer.double_blocks) + len(transformer.single_blocks)
    comfy.model_management.load_models_gpu([model], memory_required=TRAINED_BYTES * trained + working)
    # Buffers of an earlier sampling are inference tensors, which cannot be written to outside of it.
    comfy.model_management.reset_cast_buffers()


def differentiable_attention(attention: Callable, *args, **kwargs) -> Tensor:
    """The host's override hook: torch's own attention in place of kernels without gradients (Sage) and of slow ones
    with them."""
    return attention_pytorch(*args, **kwargs)


def predict(model, x: Tensor, s: Tensor, conditioning: tuple[Tensor, dict]) -> Tensor:
    """The model's velocity, float32 [B, C, h, w]. x: noisy latents as the network sees them, float32; s [B] in 0..1;
    conditioning of B rows."""
    cond, extra = conditioning
    entry = {"cross_attn": cond, "model_conds": {}, **extra}
    conds = comfy.samplers.encode_model_conds(model.model.extra_conds, [entry], x, x.device, "training")[0][
        "model_conds"
    ]
    conds = {
        name: value.process_cond(batch_size=len(x), device=x.device, area=None).cond for name, value in conds.items()
    }
    options = {} if torch_attention_chosen() else {"optimized_attention_override": differentiable_attention}
    # Copies, because both are needed afterwards.
    return (x - model.model.apply_model(x.clone(), s.clone(), transformer_options=options, **conds)) / s[
        :, None, None, None
    ]


def join(conditionings: list[tuple[Tensor, dict]]) -> tuple[Tensor, dict]:
    """Conditionings of one row and of equal shapes -> one of many rows."""
    conds, extras = zip(*conditionings)
    joined = {
        name: torch.cat([extra[name] for extra in extras])
        for name, value in extras[0].items()
        if torch.is_tensor(value)
    }
    references = [torch.cat(latents) for latents in zip(*(extra["reference_latents"] for extra in extras))]
    return torch.cat(conds), joined | {"reference_latents": references}


def in_groups(rows: list[tuple]) -> Iterator[list[tuple]]:
    """Rows that begin with a latent and end with a conditioning, together with those of equal shapes, which can be
    computed at once."""
    groups = {}
    for row in rows:
        cond, extra = row[-1]
        shapes = (row[0].shape, cond.shape, *(latent.shape for latent in extra["reference_latents"]))
        groups.setdefault(shapes, []).append(row)
    yield from groups.values()


def batch_losses(
    model, dataset: EditDataset, items: list[CachedPair], positions: list[int], seed: int
) -> Iterator[Tensor]:
    """The losses of these pairs, [n] each time, in groups of equal shapes. positions: in the training, which noise
    depends on."""
    device = model.load_device
    rows = []
    for item, position in zip(items, positions):
        x0 = model.model.process_latent_in(dataset.latents(item)[0])
        s, noise = draw(seed, position, x0.shape)
        rows.append((x0, noise, s, dataset.conditioning(item)))
    for group in in_groups(rows):
        parts = list(zip(*group))
        x0, noise, s = (torch.cat(part).to(device) for part in parts[:3])
        yield flow_loss(predict(model, add_noise(x0, noise, s), s, join(parts[3])), x0, noise)


def train_step(model, dataset: EditDataset, run: Run, lesson=None) -> None:
    """One update. lesson: as for `train`. Raises Step1XError when the loss is NaN or infinite, and the host's exception
    on cancel; the run is then as it was before."""
    settings, total = run.settings, 0.0
    try:
        for part in range(settings.accumulation):
            comfy.model_management.throw_exception_if_processing_interrupted()
            first = run.step * settings.pairs_per_step + part * settings.batch
            positions = range(first, first + settings.batch)
            items = [dataset.pairs[pair_at(settings.seed, position, len(dataset.pairs))] for position in positions]
            taught = (
                batch_losses(model, dataset, items, positions, settings.seed)
                if lesson is None
                else lesson.losses(model, dataset, items, positions, run)
            )
            for losses in taught:
                loss = losses.sum() / settings.pairs_per_step
                loss.backward()
                total += loss.item()
        if not torch.isfinite(torch.tensor(total)):
            raise Step1XError(f"The loss is NaN or infinite in step {run.step + 1}. "
                              "Lower the learning rate, then resume from the last save or start over.")
    except BaseException:
        run.optimiser.zero_grad(set_to_none=True)
        raise
    run.update(total)


def train(
    model,
    dataset: EditDataset,
    settings: Settings,
    folder: Path,
    resume: bool = True,
    checkpointing: bool = True,
    save_every: int = 0,
    validate_every: int = 0,
    validate: Callable | None = None,
    report: Callable | None = None,
    lesson=None,
    also: tuple[str, ...] = (),
) -> Run:
    """Train up to settings.steps. State and LoRA go to the folder every `save_every` steps (0: never), at the end, and
    when the run is cancelled or fails,
    but not before its first step: until then an earlier training stays as it is. Then, where the run does not go on
    from it, it is moved to FOLDER.1.

    model: a Step1X-Edit model, of any weight dtype; it is not changed. validate: called as (model, step) every
    `validate_every` steps (0: never) and at the end, in inference mode and with the LoRA in place. report: called with
    the run after each step. lesson: what is learned in place of the dataset's targets, see `distill.Lesson`. also: as for
    `Run`.

    Raises Step1XError for a model of another kind, with weights that cannot be trained on or of another layout than the
    dataset's, and as `Run.resume` and
    `train_step` do, and the host's exception on cancel.
    """
    check_model(model)
    model = prepare_model(model)
    transformer = model.model.diffusion_model
    origin = Origin(dataset.fingerprint(), transformer.version, "" if lesson is None else lesson.name)
    with torch.inference_mode(False):
        run = Run(
            settings,
            linear_shapes(transformer),
            model.load_device,
            origin,
            None if lesson is None else lesson.metadata,
            also,
        )
        if resume:
            run.resume(folder)
    if lesson is not None:
        lesson.prepare(model, dataset, settings)
    load_for_training(model, dataset, settings, run.trained, checkpointing)
    with adapted(transformer, run.layers, checkpointing):
        try:
            while run.step < settings.steps:
                with torch.inference_mode(False), torch.enable_grad(), training_mode():
                    train_step(model, dataset, run, lesson)
                # Not before there is something to take the place of an earlier training, and before anybody else writes
                # there.
                run.claim(folder)
                if save_every and run.step % save_every == 0:
                    run.save(folder)
                if report is not None:
                    report(run)
                if (
                    validate is not None
                    and validate_every
                    and (run.step % validate_every == 0 or run.step == settings.steps)
                ):
                    with torch.inference_mode():
                        validate(model, run.step)
                    load_for_training(model, dataset, settings, run.trained, checkpointing)
        finally:
            run.save(folder)
    return run


@contextmanager
def training_mode() -> Iterator[None]:
    """The host's kernels without gradients are not used meanwhile."""
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = False


def edit_held_out(model, vae, dataset: EditDataset, steps: int, cfg: float, seed: int) -> list[np.ndarray]:
    """The validation pairs edited: source, result and target side by side, uint8 [H, 3 W, 3] each. steps, cfg: 0 takes
    the version's default."""
    model = with_norm_limiter(model)
    steps, cfg = version_defaults(model, steps, cfg)
    rows = []
    for item in dataset.validation:
        target, source = dataset.latents(item)
        positive, negative = ([list(dataset.conditioning(item, negative))] for negative in (False, True))
        latent = {"samples": source}
        sigmas = model_sigmas(model, steps, source)
        edited = sample(model, positive, negative, latent, sigmas, cfg, seed, callback=lambda *args: None)["samples"]
        rows.append(to_uint8(torch.cat([vae.decode(part.clone())[0] for part in (source, edited, target)], dim=1)))
    return rows
