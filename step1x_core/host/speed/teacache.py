"""TeaCache as a model patch."""

import torch
from comfy.patcher_extension import WrappersMP

from ...errors import Step1XError
from ...speed.teacache import TeaCacheState
from ..network.foreign import foreign_parts, refuse_shared, stand_alone
from ..sampling.few_steps import refuse_few_steps

WRAPPER_KEY = "step1x_teacache"
NODE = "Step1X-Edit Speed (TeaCache)"


class TeaCache:
    """Patches for the host's Flux forward: they pass tokens through the blocks of a skipped call and add the stored
    residual after the last.

    Calls are told apart by the conditionings they serve, so cond and uncond may run together or in turn.
    """

    # No token is put to the text here (host/network/transformer.py).
    keeps_text = True

    def __init__(self, threshold: float, single_blocks: int):
        self.threshold = threshold
        self.last_block = single_blocks - 1
        self.states: dict[tuple, TeaCacheState] = {}

    def state(self, transformer_options: dict) -> TeaCacheState:
        key = (*transformer_options.get("cond_or_uncond", ()), *transformer_options.get("uuids", ()))
        return self.states.setdefault(key, TeaCacheState(self.threshold))

    def sample(self, executor, *args, **kwargs):
        """Around a whole sampling run: nothing outlives it, also when it is cancelled.

        Raises Step1XError for a compiled model, one with a few-step LoRA, and one whose forward pass is another pack's.
        """
        if "torch_compile_kwargs" in executor.class_obj.model_options:
            raise Step1XError(
                f"'TorchCompileModel' would keep for all steps what '{NODE}' decides in the first. Remove one of the two."
            )
        refuse_few_steps(executor.class_obj.model_patcher, NODE)  # a LoRA loaded after this patch
        refuse_shared(
            NODE, foreign_parts(executor.class_obj.model_patcher.model.diffusion_model) & {"forward", "_forward"}
        )
        self.states.clear()
        try:
            return executor(*args, **kwargs)
        finally:
            self.states.clear()

    def after_input(self, args: dict) -> dict:
        options = args["transformer_options"]
        sigma, sigmas = options["sigmas"].max(), options["sample_sigmas"]
        forced = bool(sigma >= sigmas[0]) or bool(sigma <= sigmas[-2])
        state = self.state(options)
        # Blocks add to their input in place.
        state.img = args["img"].clone()
        state.begin(state.img, forced)
        return args

    def double_block(self, args: dict, extra: dict) -> dict:
        if "transformer_options" not in args:
            refuse_shared(NODE, {"forward_orig"})  # the host's own passes them
        if self.state(args["transformer_options"]).ran:
            return extra["original_block"](args)
        return {"img": args["img"], "txt": args["txt"]}

    def single_block(self, args: dict, extra: dict) -> dict:
        options = args["transformer_options"]
        state = self.state(options)
        out = extra["original_block"](args) if state.ran else {"img": args["img"]}
        if options["block_index"] == self.last_block:
            text = options["img_slice"][0]
            if state.ran:
                state.residual = out["img"][:, text:] - state.img
            else:
                out["img"] = torch.cat((out["img"][:, :text], state.img + state.residual), dim=1)
            state.img = None
        return out


def apply_teacache(model, threshold: float):
    """A clone of a Step1X-Edit model that skips the blocks while the accumulated estimate stays below `threshold`, in
    place of an earlier TeaCache.

    At 0 nothing is ever skipped. Raises Step1XError for a model with a few-step LoRA.
    """
    refuse_few_steps(model, NODE)
    model = model.clone()
    patches = model.model_options["transformer_options"].setdefault("patches", {})
    patches["post_input"] = [
        p for p in patches.get("post_input", []) if not isinstance(getattr(p, "__self__", None), TeaCache)
    ]
    transformer = model.model.diffusion_model
    cache = TeaCache(threshold, len(transformer.single_blocks))
    model.set_model_post_input_patch(cache.after_input)
    for i in range(len(transformer.double_blocks)):
        model.set_model_patch_replace(cache.double_block, "dit", "double_block", i)
    for i in range(len(transformer.single_blocks)):
        model.set_model_patch_replace(cache.single_block, "dit", "single_block", i)
    model.model_options = stand_alone(model.model_options, NODE)
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, cache.sample)
    return model
