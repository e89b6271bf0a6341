"""Image classifiers in the transformers folder layout. Nothing is downloaded, and no code from the folder is run."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import Step1XError

# Number of images per classifier call.
CHUNK = 8


@dataclass(frozen=True)
class Classifier:
    """A loaded image classifier. labels: by index. independent: whether several labels can apply to one image."""

    model: torch.nn.Module
    processor: object
    labels: dict[int, str]
    independent: bool


def is_classifier(folder: Path) -> bool:
    """Return whether a folder holds an image classifier with safetensors weights, according to its config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = config["architectures"]
        return any(name.endswith("ForImageClassification") for name in names) and any(folder.glob("*.safetensors"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def load_classifier(folder: Path) -> Classifier:
    """Load a classifier in float32 on the CPU, where it takes no VRAM from the editing models.

    Raises Step1XError if transformers cannot open the folder.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    rules = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), **rules)
        model, info = AutoModelForImageClassification.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, **rules
        )
    # transformers raises errors of many unrelated classes for faulty folders.
    except Exception as problem:
        detail = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        raise Step1XError(
            f"The classifier in {folder} cannot be loaded ({detail}). Choose a complete folder in the transformers "
            "layout: config.json, preprocessor_config.json and safetensors weights."
        ) from problem
    if info["missing_keys"]:
        raise Step1XError(
            f"The classifier in {folder} is incomplete: its weights lack {min(info['missing_keys'])}. Download the "
            "folder again."
        )
    labels = {int(index): str(name) for index, name in model.config.id2label.items()}
    return Classifier(
        model.eval().float(), processor, labels, model.config.problem_type == "multi_label_classification"
    )


@torch.inference_mode()
def classify(classifier: Classifier, pictures: list[np.ndarray]) -> Tensor:
    """Classify images, uint8 [H, W, 3] of any sizes; returns logits [B, L] in float32."""
    scores = []
    for start in range(0, len(pictures), CHUNK):
        values = classifier.processor(images=list(pictures[start:start + CHUNK]), return_tensors="pt")["pixel_values"]
        scores.append(classifier.model(pixel_values=values.float()).logits.float())
    return torch.cat(scores)
