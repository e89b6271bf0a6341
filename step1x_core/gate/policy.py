"""The policy of the content gate: which images are unsafe, which prompts are refused, and what replaces such an image.

It fails closed: what cannot be judged raises an error or counts as unsafe, and never passes.
"""

import re
import unicodedata
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import Step1XError
from ..images import from_uint8, to_uint8
from ..sheets import wrap

OFF, REPORT, LABEL, BLUR, BLOCK = "off", "report", "label", "blur", "block"
ACTIONS = (OFF, REPORT, LABEL, BLUR, BLOCK)

# Pixels that a blurred image keeps on its longer side.
BLURRED_SIDE = 5
YES, NO = ("yes", "是"), ("no", "否", "不")
QUESTION_SYSTEM = (
    "You check instructions for an image editor before they are carried out. Your whole answer is one word: yes or no."
)


def entries(text: str) -> list[str]:
    """Split a list that is separated by commas or line breaks. Entries of only invisible characters are dropped."""
    return [entry.strip() for entry in re.split(r"[,\n\uff0c]", text) if plain(entry)]


def find_labels(names: dict[int, str], wanted: list[str], classifier: str) -> list[int]:
    """Return the indices of the labels with these names, ignoring case.

    Raises Step1XError if `wanted` is empty or the classifier lacks one of the labels.
    """
    indices = {str(name).casefold(): index for index, name in names.items()}
    offered = ", ".join(str(names[index]) for index in sorted(names))
    if not wanted:
        raise Step1XError(
            f"'unsafe_labels' lists no label, so the gate would let everything pass. List labels of '{classifier}': "
            f"{offered}."
        )
    for name in wanted:
        if name.casefold() not in indices:
            raise Step1XError(
                f"The classifier '{classifier}' has no label {name!r}. Correct 'unsafe_labels'; available labels: "
                f"{offered}."
            )
    return [indices[name.casefold()] for name in wanted]


def unsafe_scores(logits: Tensor, unsafe: list[int], independent: bool) -> Tensor:
    """Convert classifier logits [B, L] to the probability that each image is unsafe, [B] in 0..1.

    independent: whether several labels can apply to one image. The most probable unsafe label then counts, otherwise
    the sum of all unsafe labels.

    Raises Step1XError for NaN or Inf logits.
    """
    if not torch.isfinite(logits).all():
        raise Step1XError(
            "The classifier of the content gate returned NaN or Inf scores, so no image can pass. Choose another "
            "classifier."
        )
    logits = logits.float()
    if independent:
        return logits.sigmoid()[:, unsafe].amax(dim=1)
    return logits.softmax(dim=1)[:, sorted(set(unsafe))].sum(dim=1)


def plain(text: str) -> str:
    """Normalise a text for comparison: case, letter variants, invisible characters and runs of white space."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(char for char in text if unicodedata.category(char) != "Cf").split())


def joins(char: str) -> bool:
    """Return whether a character belongs to a script that puts spaces between words. Chinese, Japanese and Thai do
    not."""
    return char.isalnum() and unicodedata.category(char) != "Lo"


def holds_word(text: str, word: str) -> bool:
    """Return whether a text contains a word as a whole word; both are normalised by `plain`."""
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        before = start > 0 and joins(text[start - 1]) and joins(word[0])
        after = end < len(text) and joins(text[end]) and joins(word[-1])
        if not before and not after:
            return True
        start = text.find(word, start + 1)
    return False


def forbidden_words(prompt: str, words: list[str]) -> list[str]:
    """Return the listed words and phrases that a prompt contains."""
    text = plain(prompt)
    return [word for word in words if plain(word) and holds_word(text, plain(word))]


def read_answer(reply: str) -> bool | None:
    """Return whether a reply says yes, or None if it says neither yes nor no."""
    text = plain(reply).lstrip("\"'*`“ ")
    for words, answer in ((YES, True), (NO, False)):
        if any(
            text.startswith(word) and not (joins(word[-1]) and joins(text[len(word) : len(word) + 1] or " "))
            for word in words
        ):
            return answer
    return None


@dataclass(frozen=True)
class Finding:
    """The result for one image. score: probability that it is unsafe, 0..1, or None without a classifier. reason: why
    it is withheld, "" if it passes."""

    score: float | None
    reason: str

    @property
    def flagged(self) -> bool:
        return bool(self.reason)


def blur(picture: Image.Image) -> Image.Image:
    """Blur an image beyond recognition; nearly all of its content is discarded."""
    width, height = picture.size
    longer = max(width, height)
    small = picture.resize(
        (max(1, round(width * BLURRED_SIDE / longer)), max(1, round(height * BLURRED_SIDE / longer))),
        Image.Resampling.BOX,
    )
    return small.resize(picture.size, Image.Resampling.BICUBIC)


def label(picture: Image.Image, text: str) -> Image.Image:
    """Draw a text on a black strip over the lower edge of an image."""
    width, height = picture.size
    out, strip = picture.copy(), min(height, max(14, height // 16))
    canvas = ImageDraw.Draw(out)
    canvas.rectangle((0, height - strip, width, height), fill="#000000")
    canvas.text((4, height - strip / 2), text, fill="#ff5040", font=ImageFont.load_default(strip * 0.7), anchor="lm")
    return out


def notice(size: tuple[int, int], message: str) -> Image.Image:
    """Draw a grey image of this size with a no-entry sign and the message. Pillow's font has only Latin letters, so the
    sign must speak for itself."""
    width, height = size
    out = Image.new("RGB", size, "#383838")
    canvas = ImageDraw.Draw(out)
    radius = min(width, height) / 6
    x, y = width / 2, height / 2 - radius / 2
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill="#c03028")
    canvas.rectangle((x - radius * 0.6, y - radius * 0.18, x + radius * 0.6, y + radius * 0.18), fill="#ffffff")
    font = ImageFont.load_default(max(8, min(width, height) / 18))
    canvas.multiline_text(
        (x, y + radius * 1.3),
        "\n".join(wrap(canvas, message, font, int(width * 0.9))),
        fill="#ffffff",
        font=font,
        anchor="ma",
        align="center",
    )
    return out


def treat(image: Tensor, finding: Finding, action: str, message: str) -> Tensor:
    """Apply the action to an image [H, W, C] in 0..1; shape and dtype stay. An image that may pass is returned
    unchanged."""
    if not finding.flagged or action in (OFF, REPORT):
        return image
    picture = Image.fromarray(to_uint8(image))
    out = {
        LABEL: lambda: label(picture, finding.reason),
        BLUR: lambda: blur(picture),
        BLOCK: lambda: notice(picture.size, message),
    }[action]()
    pixels = from_uint8(np.asarray(out)).to(image)
    channels = image.shape[-1]
    if channels < 3:
        return pixels.mean(dim=-1, keepdim=True).expand(image.shape)
    return torch.cat([pixels, torch.ones_like(image[..., 3:])], dim=-1)


def describe(findings: list[Finding], action: str, threshold: float, message: str) -> str:
    """Summarise the findings of the gate as text for the user."""
    done = {REPORT: "passed on unchanged", LABEL: "passed on with a label", BLUR: "blurred", BLOCK: "withheld"}[action]
    flagged = sum(finding.flagged for finding in findings)
    if any(finding.score is not None for finding in findings):
        nothing = f"nothing found in {len(findings)} images."
    else:
        nothing = "nothing found in the prompt. The images were not checked because no classifier is set."
    lines = [f"Content gate: {flagged} of {len(findings)} images {done}." if flagged else f"Content gate: {nothing}"]
    for number, finding in enumerate(findings, 1):
        score = "" if finding.score is None else f", unsafe {finding.score:.0%} (threshold {threshold:.0%})"
        lines.append(f"{number}. {finding.reason or 'passed'}{score}")
    if flagged and action == BLOCK:
        lines.append(message)
    return "\n".join(lines)
