"""The content gate in the host: its models folder, and the text encoder as a judge of prompts."""

import logging
import os
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from ...checks import check_finite, check_pictures
from ...errors import Step1XError
from ...gate.classifier import Classifier, classify, is_classifier, load_classifier
from ...gate.policy import (
    ACTIONS,
    OFF,
    QUESTION_SYSTEM,
    Finding,
    describe,
    entries,
    find_labels,
    forbidden_words,
    plain,
    read_answer,
    treat,
    unsafe_scores,
)
from ...images import to_uint8
from ..reasoning.generation import check_can_generate, generate_text
from ..reasoning.thinking import check_instruction

log = logging.getLogger(__name__)

FOLDER = "image_classification"
NONE = "none"
ANSWER_TOKENS = 8
UNCHECKED = "The content gate is off: nothing was checked."


def classifier_folders() -> dict[str, Path]:
    """Return the classifiers in the host's `image_classification` models folders, by name.

    Registers the folder with the host; extra_model_paths.yaml may add others.
    """
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    found = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for config in sorted(root.glob("**/config.json")):
            if is_classifier(config.parent) and config.parent != root:
                found.setdefault(config.parent.relative_to(root).as_posix(), config.parent)
    return found


def open_classifier(name: str) -> Classifier:
    """Load a classifier for one run. It is not kept, because the host cannot unload memory that it does not manage.

    Raises Step1XError for a name that is not offered, and as `load_classifier` does.
    """
    folders = classifier_folders()
    if name not in folders:
        searched = ", ".join(folder_paths.get_folder_paths(FOLDER))
        raise Step1XError(
            f"The classifier '{name}' is not in the {FOLDER} folder; searched: {searched}. Press R to refresh the node "
            "list, then choose it again."
        )
    return load_classifier(folders[name])


def refusal(prompt: str, words: str, question: str, clip) -> str:
    """Return why a prompt is refused, or "" if it is not. An answer that is neither yes nor no also refuses it.

    Raises Step1XError for words or a question without a prompt to check.
    """
    if (entries(words) or plain(question)) and not plain(prompt):
        # An unconnected input is empty, too, and nothing would ever be found.
        raise Step1XError(
            "The content gate checks 'prompt' by 'words' or 'question', but 'prompt' is empty, so everything would "
            "pass. Connect the encoder's prompt to 'prompt', or clear 'words' and 'question'."
        )
    found = forbidden_words(prompt, entries(words))
    if found:
        return f"the prompt contains {', '.join(found)}"
    if plain(question):
        check_instruction(prompt)
        reply = generate_text(
            clip,
            QUESTION_SYSTEM,
            [f"{question.strip()}\n\nThe instruction:\n{prompt}"],
            ANSWER_TOKENS,
            0,
            temperature=0.0,
        )
        answer = read_answer(reply)
        if answer is None:
            return f"the language model gave no clear answer about the prompt ({reply[:40]!r})"
        if answer:
            return "the language model objects to the prompt"
    return ""


def gate(images: Tensor, action: str, classifier: str, unsafe_labels: str, threshold: float, message: str,
         prompt: str = "", words: str = "", question: str = "", clip=None) -> tuple[Tensor, int, str]:
    """Check images [B, H, W, C] in 0..1 and their prompt; returns the images to pass on, how many were unsafe, and a
    report.

    A refused prompt applies to all images of the batch. words: a list as `entries` reads it.

    Raises Step1XError for an unknown action, if there is nothing to check, for words or a question without a prompt,
    for a missing classifier or label, and for a question without a text encoder that can generate text.
    """
    prompt, words, question = prompt or "", words or "", question or ""
    if action not in ACTIONS:
        raise Step1XError(f"Input 'action' is {action!r}; expected one of {', '.join(ACTIONS)}. Choose one of these.")
    check_pictures(images, "images")
    if action == OFF:
        log.warning("%s", UNCHECKED)
        return images, 0, UNCHECKED
    # NaN is black to the classifier, and may be something else when the image is saved.
    check_finite(
        images,
        "Input 'images' of the content gate contains NaN or Inf values, so it cannot be judged. Check the node that "
        "made the images. If it is a VAE with too little precision, start ComfyUI with --fp32-vae.",
    )
    if classifier == NONE and not entries(words) and not plain(question):
        raise Step1XError(
            "The content gate is on but has nothing to check. Choose a classifier, enter 'words' or a 'question', or "
            "set 'action' to off."
        )
    if plain(question):
        if clip is None:
            raise Step1XError(
                "Input 'question' is set, but no text encoder is connected. Connect 'clip', or clear 'question'."
            )
        check_can_generate(clip)
    refused = refusal(prompt, words, question, clip)
    scores = [None] * len(images)
    if classifier != NONE:
        opened = open_classifier(classifier)
        unsafe = find_labels(opened.labels, entries(unsafe_labels), classifier)
        scores = unsafe_scores(
            classify(opened, [to_uint8(image) for image in images]), unsafe, opened.independent
        ).tolist()
    findings = []
    for score in scores:
        reasons = [refused] if refused else []
        # Written so that a threshold of NaN lets nothing pass.
        if score is not None and not score < threshold:
            reasons.append(f"unsafe content {score:.0%}")
        findings.append(Finding(score, "; ".join(reasons)))
    report = describe(findings, action, threshold, message)
    # A warning is what a person should act on: a finding, or pictures that nothing looked at.
    level = logging.WARNING if classifier == NONE or any(finding.flagged for finding in findings) else logging.INFO
    log.log(level, "%s", report.splitlines()[0])
    out = torch.stack([treat(image, finding, action, message) for image, finding in zip(images, findings)])
    return out, sum(finding.flagged for finding in findings), report
