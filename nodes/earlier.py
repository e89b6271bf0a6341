"""Offers to replace this pack's own nodes of 0.1.0, whose ids did not begin with Step1XEdit."""

from dataclasses import dataclass, field

from comfy_api.latest import io


@dataclass(frozen=True)
class Earlier:
    """A node of 0.1.0: the id that takes its place, its sockets and its widgets in their order, and its outputs."""

    new: str
    sockets: str
    # A + is the widget that the editor puts behind a seed.
    widgets: str
    # How many they are, where each has kept its place; otherwise the new place of each, None where there is none any
    # more.
    outputs: int | tuple[int | None, ...]
    # New input by old one, where the name has changed; None where there is none any more.
    renamed: dict[str, str | None] = field(default_factory=dict)
    # What new inputs without a counterpart are set to.
    values: dict = field(default_factory=dict)

    def offer(self, old: str) -> io.NodeReplace:
        names = [*self.sockets.split(), *(name for name in self.widgets.split() if name != "+")]
        pairs = [(self.renamed.get(name, name), name) for name in names]
        # A choice comes before the inputs that it opens.
        inputs = [{"new_id": name, "set_value": value} for name, value in self.values.items()]
        inputs += [{"new_id": new, "old_id": name} for new, name in pairs if new is not None]
        widgets = ["control_after_generate" if name == "+" else name for name in self.widgets.split()]
        places = range(self.outputs) if isinstance(self.outputs, int) else self.outputs
        outputs = [
            {"old_idx": old_idx, "new_idx": new_idx} for old_idx, new_idx in enumerate(places) if new_idx is not None
        ]
        return io.NodeReplace(
            new_node_id=self.new, old_node_id=old, old_widget_ids=widgets, input_mapping=inputs, output_mapping=outputs
        )


# Every step guided.
GUIDED = {"mode.start_percent": 0.0, "mode.end_percent": 1.0}
EARLIER = {
    "Step1XModelLoader": Earlier(
        "Step1XEditLoader", "", "model version weight_dtype", 1, renamed={"model": "unet_name"}
    ),
    "Step1XMLLMLoader": Earlier("Step1XEditMLLM", "", "mllm device version", 1, renamed={"mllm": "clip_name"}),
    # The stock 'Load VAE': it lists no diffusers folders, whose VAE comes from 'Load Step1X-Edit Model'.
    "Step1XVAELoader": Earlier("VAELoader", "", "vae", 1, renamed={"vae": "vae_name"}),
    "Step1XLoraLoader": Earlier("Step1XEditLoadLora", "model", "lora_name strength", 1),
    "Step1XSampler": Earlier(
        "Step1XEditSampler",
        "model positive negative latent",
        "seed + steps cfg sampler_name denoise",
        1,
        renamed={"latent": "latent_image"},
    ),
    "Step1XDecode": Earlier("Step1XEditDecode", "samples vae source", "", 1),
    "Step1XScheduler": Earlier("Step1XEditScheduler", "latent", "steps denoise", 1, renamed={"latent": "latent_image"}),
    "Step1XGuidance": Earlier("Step1XEditGuidance", "model", "truncate power", 1),
    "Step1XGuidanceInterval": Earlier(
        "Step1XEditSpeedPreset",
        "model",
        "start end",
        1,
        {"start": "mode.start_percent", "end": "mode.end_percent"},
        {"mode": "custom: nothing skipped", "mode.attention": "exact"},
    ),
    "Step1XTeaCache": Earlier(
        "Step1XEditSpeedPreset",
        "model",
        "threshold",
        1,
        {"threshold": "mode.threshold"},
        {"mode": "custom: TeaCache", "mode.attention": "exact"} | GUIDED,
    ),
    "Step1XFp8Attention": Earlier(
        "Step1XEditSpeedPreset",
        "model",
        "",
        1,
        values={"mode": "custom: nothing skipped", "mode.attention": "fp8"} | GUIDED,
    ),
    "Step1XRegion": Earlier(
        "Step1XEditSpeedPreset",
        "model",
        "similarity warmup refreshes reuse",
        1,
        {name: f"mode.{name}" for name in ("similarity", "warmup", "refreshes", "reuse")},
        {"mode": "custom: region"} | GUIDED,
    ),
    "Step1XThink": Earlier("Step1XEditThinkPrompt", "clip image", "prompt seed + temperature", 2),
    "Step1XReflect": Earlier("Step1XEditReflectOnEdit", "clip source edited", "prompt seed + version", 4),
    "Step1XReflectionLoop": Earlier(
        "Step1XEditReflectionLoop",
        "model clip vae image",
        "prompt negative_prompt size_level seed + steps cfg rounds think reflect sampler_name",
        4,
    ),
    "Step1XCrop": Earlier("Step1XEditCropToMask", "image mask", "context min_size", 3),
    "Step1XStitch": Earlier("Step1XEditStitchCrop", "image stitch", "feather", 1),
    "Step1XBatch": Earlier(
        "Step1XEditBatchImages",
        "model clip vae images",
        "prompts combine negative_prompt size_level seed + steps cfg sampler_name",
        2,
    ),
    "Step1XEditDataset": Earlier("Step1XEditTrainDataset", "clip vae", "dataset size_level validation", 2),
    "Step1XTrainLora": Earlier(
        "Step1XEditTrainLora",
        "model dataset vae",
        "name steps learning_rate rank alpha batch_size accumulation seed + resume save_every validate_every schedule "
        "warmup ema gradient_checkpointing",
        4,
    ),
    "Step1XGate": Earlier(
        "Step1XEditContentGate",
        "images clip",
        "action classifier unsafe_labels threshold message prompt words question",
        3,
    ),
    "Step1XGEditBench": Earlier(
        "Step1XEditGEditItems", "", "dataset method language task_types limit", (4,), values={"count": 0}
    ),
    "Step1XGEditItems": Earlier("Step1XEditGEditItems", "bench", "count", 4, {"bench": None}),
    "Step1XGEditSave": Earlier("Step1XEditGEditSave", "images items", "", 2),
    "Step1XGEditJudge": Earlier("Step1XEditGEditReport", "bench clip", "judge seed again", (None, 0)),
    "Step1XGEditReport": Earlier("Step1XEditGEditReport", "bench", "judge", 4),
    "Step1XPairPropose": Earlier("Step1XEditPairPropose", "clip image", "kinds count seed +", 6),
    "Step1XPairCompute": Earlier("Step1XEditPairCompute", "images pairs", "kinds count seed + max_side", 2),
    "Step1XPairRecord": Earlier(
        "Step1XEditPairRecord", "source target proposals pairs", "kind english chinese direction maker", 2
    ),
    # It scored and let all pass.
    "Step1XPairJudge": Earlier(
        "Step1XEditPairJudge",
        "clip pairs",
        "seed +",
        (0, 2),
        values={"min_semantics": 0.0, "min_quality": 0.0, "min_change": 0.0, "max_change": 1.0, "unjudged": True},
    ),
    "Step1XPairFilter": Earlier(
        "Step1XEditPairJudge",
        "pairs",
        "min_semantics min_quality min_change max_change unjudged",
        3,
        values={"seed": 42},
    ),
    "Step1XPairSheet": Earlier("Step1XEditPairSave", "pairs", "limit", (1, 2), values={"name": ""}),
    "Step1XPairSave": Earlier("Step1XEditPairSave", "pairs", "name", (0, 2), values={"limit": 24}),
}


def own_replacements() -> list[io.NodeReplace]:
    return [earlier.offer(old) for old, earlier in EARLIER.items()]
