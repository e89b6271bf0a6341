"""Region-aware denoising as a model patch."""

import logging
import math

import torch
from comfy.patcher_extension import WrappersMP, get_wrappers_with_key
from torch import Tensor

from ...errors import Step1XError
from ...sampling.schedule import latent_tokens
from ...speed.region import RegionRun, RegionSettings, step_at, token_rows
from ..network.attention import cudnn_first, cudnn_is_fastest
from ..network.foreign import check_alone, refuse_shared, stand_alone

log = logging.getLogger(__name__)

WRAPPER_KEY = "step1x_region"
NODE = "Step1X-Edit Speed (region)"


class TransformerCall:
    """The hooks of one call of the transformer. The cache holds keys and values [B, H, S, D], positions applied, by
    conditioning and block.

    rows: int64 [B, n], the picture and reference tokens to compute out of `tokens`; None for all of them, whose keys
    and values are then put into the cache.
    """

    # No token is put to the text here (host/network/transformer.py).
    keeps_text = True

    def __init__(self, cache: dict, x: Tensor, options: dict, rows: Tensor | None, tokens: int):
        self.cache = cache
        self.conds = options["uuids"]
        self.inner = options.get("optimized_attention_override") or (
            cudnn_first if cudnn_is_fastest(x.device) else None
        )
        self.rows = rows
        self.tokens = tokens

    def options(self, options: dict, last_block: int) -> dict:
        """transformer_options with this call's hooks beside those of others."""
        out = options | {"optimized_attention_override": self.attention}
        if self.rows is not None:
            patches, replacements = options.get("patches", {}), options.get("patches_replace", {})
            out["patches"] = patches | {"post_input": [*patches.get("post_input", []), self.after_input]}
            out["patches_replace"] = replacements | {"dit": {("single_block", last_block): self.last_block}}
        return out

    def after_input(self, args: dict) -> dict:
        rows = self.rows.repeat(len(self.conds), 1)[..., None]
        return args | {name: args[name].take_along_dim(rows, dim=1) for name in ("img", "img_ids")}

    def last_block(self, args: dict, extra: dict) -> dict:
        """The rows that were computed at their places among all tokens; the others are 0 and not looked at."""
        x = extra["original_block"](args)["img"]
        text = x.shape[1] - self.rows.shape[1]
        out = x.new_zeros((x.shape[0], text + self.tokens, x.shape[2]))
        out.scatter_(
            1, (text + self.rows).repeat(len(self.conds), 1)[..., None].expand(-1, -1, x.shape[2]), x[:, text:]
        )
        return {"img": out}

    def attention(self, attention, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
        """The host's override hook around the attention that would run without this patch."""
        def attend(q, k, v):
            return (
                self.inner(attention, q, k, v, heads, *args, **kwargs)
                if self.inner
                else attention(q, k, v, heads, *args, **kwargs)
            )

        options = kwargs["transformer_options"]
        if "block_type" not in options:
            return attend(q, k, v)  # the connector
        block = (options["block_type"], options["block_index"])
        parts = list(zip(self.conds, *(t.chunk(len(self.conds)) for t in (q, k, v)), strict=True))
        if self.rows is None:
            for cond, _, keys, values in parts:
                # Copies, where `contiguous` may give the tensors themselves: an attention function may use their
                # memory.
                self.cache[cond, block] = tuple(x.clone(memory_format=torch.contiguous_format) for x in (keys, values))
            return attend(q, k, v)
        text = k.shape[2] - self.rows.shape[1]
        places = torch.cat((torch.arange(text, device=k.device).expand(len(self.rows), -1), text + self.rows), dim=1)[
            :, None, :, None
        ].expand_as(parts[0][2])
        out = []
        for cond, queries, keys, values in parts:
            all_keys, all_values = self.cache[cond, block]
            out.append(attend(queries, all_keys.scatter_(2, places, keys), all_values.scatter_(2, places, values)))
        return torch.cat(out)


def check_other_patches(model_options: dict) -> None:
    """Raise Step1XError where another node skips or replaces parts of the model's calls, or compiles them once for all
    steps."""
    options = model_options["transformer_options"]
    found = []
    if options.get("patches_replace", {}).get("dit"):
        found.append("a node that replaces the transformer's blocks, such as TeaCache")
    found += [
        f"'{name}'"
        for name in ("EasyCache", "LazyCache")
        if get_wrappers_with_key(WrappersMP.OUTER_SAMPLE, name.lower(), options)
    ]
    if "torch_compile_kwargs" in model_options:
        found.append("'TorchCompileModel'")
    if found:
        raise Step1XError(
            f"'{NODE}' cannot work together with {' and '.join(found)}: both decide what a step computes. Remove one of the two."
        )


class RegionDenoiser:
    """The wrappers of a patched model. share: the part of all picture and reference tokens that the last run
    computed."""

    def __init__(self, settings: RegionSettings, double_blocks: int, single_blocks: int, hidden_size: int):
        self.settings = settings
        self.blocks, self.hidden_size = double_blocks + single_blocks, hidden_size
        self.last_block = single_blocks - 1
        self.share = 1.0
        self.reset()

    def reset(self) -> None:
        self.run: RegionRun | None = None
        self.mode = "full"
        self.cache: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.reference: Tensor | None = None
        self.call_shares: list[float] = []
        self.applied = False

    def sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        """Around a whole sampling run: nothing outlives it, also when it is cancelled. Raises Step1XError for patches
        that this one cannot work with."""
        check_other_patches(executor.class_obj.model_options)
        self.run = RegionRun(self.settings, len(sigmas) - 1, denoise_mask)
        self.step_shares: list[float] = []
        try:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        finally:
            self.reset()
            self.share = sum(self.step_shares) / max(len(self.step_shares), 1)
            log.info("Region denoising computed %.0f %% of the picture's tokens.", 100 * self.share)

    def prepare(self, executor, model, noise_shape, conds, **kwargs):
        """Around the host's estimate of memory: to it the cache looks like further pictures of the batch."""
        size = self.cache_bytes(noise_shape, conds, model.model.get_dtype_inference().itemsize)
        pictures = math.ceil(size / max(1, model.model.memory_required([1, *noise_shape[1:]])))
        return executor(model, [noise_shape[0] + pictures, *noise_shape[1:]], conds, **kwargs)

    def cache_bytes(self, noise_shape, conds: dict, itemsize: int) -> int:
        """Size of the keys and values of a full step. conds: the host's, by name; noise_shape [B, C, h, w]."""
        tokens = 0
        for cond in (cond for group in conds.values() for cond in group if "cross_attn" in cond):
            latents = (noise_shape, *(latent.shape for latent in cond.get("reference_latents") or ()))
            tokens += cond["cross_attn"].shape[1] + sum(latent_tokens(*shape[-2:]) for shape in latents)
        return noise_shape[0] * tokens * self.blocks * 2 * self.hidden_size * itemsize

    def predict(self, executor, x, timestep, model_options={}, seed=None):
        """Around the guided prediction: x [B, C, h, w] -> denoised latents."""
        def denoise(mode):
            self.mode, self.call_shares, self.applied = mode, [], False
            out = executor(x, timestep, model_options, seed)
            if self.applied and not self.call_shares:
                refuse_shared(NODE, {"forward"})  # in whose place was that which calls `forward` below
            # A step in which no conditioning is in force calls nothing.
            self.step_shares.append(sum(self.call_shares) / max(len(self.call_shares), 1))
            return out

        run, sigma = self.run, timestep.max()
        step = step_at(sigma, model_options["transformer_options"]["sample_sigmas"])
        if run.is_full(step):
            self.cache.clear()
            self.reference = None
            if run.precedes_region(step):
                denoised = denoise("record")
                run.select(denoised, self.reference)
            else:
                denoised = denoise("full")
            run.remember(sigma, x, denoised)
            return denoised
        reused = run.reusable(sigma)
        if reused.all():
            self.step_shares.append(0.0)
            return run.predicted(sigma)
        return run.merge(sigma, x, denoise("region"), reused)

    def apply(self, executor, *args, **kwargs):
        """Around one call of the model, whoever calls it."""
        self.applied = True
        return executor(*args, **kwargs)

    def forward(self, executor, x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs):
        """Around one call of the transformer, which may serve several conditionings: x [conditionings * B, C, h, w] ->
        velocity."""
        check_alone(executor.class_obj, transformer_options)
        conds, rows = transformer_options["uuids"], None
        references = sum(latent_tokens(*latent.shape[-2:]) for latent in ref_latents or ())
        tokens = latent_tokens(*x.shape[-2:]) + references
        foreign = transformer_options.get("patches_replace", {}).get("dit")
        if self.mode == "record" and ref_latents and ref_latents[0].shape == x.shape:
            self.reference = ref_latents[0].chunk(len(conds))[0].to(torch.float32, copy=True)
        # A conditioning that begins in the middle of the run has nothing in the cache yet.
        if self.mode == "region" and not foreign and all((cond, ("double", 0)) in self.cache for cond in conds):
            rows = token_rows(self.run.edited, references).to(x.device)
        if not foreign and (self.mode == "record" or rows is not None):
            transformer_options = TransformerCall(self.cache, x, transformer_options, rows, tokens).options(
                transformer_options, self.last_block
            )
        self.call_shares.append(1.0 if rows is None else rows.shape[1] / tokens)
        return executor(x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs)


def apply_region(model, settings: RegionSettings):
    """A clone of a Step1X-Edit model with region-aware denoising, in place of an earlier one."""
    model = model.clone()
    transformer = model.model.diffusion_model
    denoiser = RegionDenoiser(
        settings, len(transformer.double_blocks), len(transformer.single_blocks), transformer.hidden_size
    )
    wrappers = {
        WrappersMP.OUTER_SAMPLE: denoiser.sample,
        WrappersMP.PREPARE_SAMPLING: denoiser.prepare,
        WrappersMP.PREDICT_NOISE: denoiser.predict,
        WrappersMP.APPLY_MODEL: denoiser.apply,
        WrappersMP.DIFFUSION_MODEL: denoiser.forward,
    }
    for kind, wrapper in wrappers.items():
        model.remove_wrappers_with_key(kind, WRAPPER_KEY)
        model.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)
    model.model_options = stand_alone(model.model_options, NODE)
    return model


def region_denoiser(model) -> RegionDenoiser:
    """The patch of a model that has one."""
    return model.get_wrappers(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY)[0].__self__
