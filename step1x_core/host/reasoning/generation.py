"""Asks the language model: texts and images in, text out (docs/model.md, Text generation)."""

from dataclasses import dataclass

from torch import Tensor

from ...prompts.chat import chat
from ...prompts.image_memory import ImageMemory
from ..prompts.encoding import check_text_encoder
from ..prompts.text_encoder import TEXT_ENCODER_NAME


@dataclass(frozen=True)
class Question:
    """One of several questions. The first fields are those of `generate_text`.

    memory: keeps what is made of the images, for further questions about them.
    """

    system: str | None
    content: list[str | Tensor]
    seed: int
    temperature: float
    memory: ImageMemory | None = None


def check_can_generate(clip) -> None:
    """Raise Step1XError for a foreign text encoder and for one without a language-model head."""
    check_text_encoder(clip)
    encoder = clip.cond_stage_model
    getattr(encoder, encoder.clip).check_can_generate()


def generate_text(clip, system: str | None, content: list[str | Tensor], max_tokens: int, seed: int,
                  temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.05) -> str:
    """Return the language model's answer to one user turn, without special tokens and surrounding white space.

    system: text of the system turn, or None for the model's default.
    content: texts and images [H, W, C] in 0..1, in reading order.
    max_tokens: maximum length of the answer. temperature: 0 always takes the most probable token.
    The same seed and input give the same answer; torch's global random state is neither read nor changed.

    Raises Step1XError for a foreign text encoder, one without a language-model head, and images with too large an
    aspect ratio.
    """
    check_text_encoder(clip)
    tokens = clip.tokenizer.tokenize_chat(*chat(system, content))
    reply = clip.generate(
        tokens,
        do_sample=temperature > 0,
        max_length=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    return clip.decode(reply).strip()


def generate_texts(
    clip, questions: list[Question], max_tokens: int, top_p=0.9, top_k=50, repetition_penalty=1.05
) -> list[str]:
    """Return the answers to several questions, generated as one batch; each equals that of `generate_text`, up to
    rounding. Raises what that raises."""
    check_text_encoder(clip)
    sequences = [
        clip.tokenizer.tokenize_chat(*chat(question.system, question.content), question.memory)[TEXT_ENCODER_NAME][0]
        for question in questions
    ]
    replies = clip.generate(
        {TEXT_ENCODER_NAME: sequences},
        max_length=max_tokens,
        temperature=[question.temperature for question in questions],
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=[question.seed for question in questions],
    )
    return [clip.decode(reply).strip() for reply in replies]
