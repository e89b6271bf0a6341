"""Thinking and reflection with the host's text encoder: one image, one seed (docs/model.md, Calls; Rounds)."""

import hashlib

from torch import Tensor

from ...checks import check_pictures
from ...errors import Step1XError
from ...prompts.image_memory import ImageMemory
from ...prompts.v11 import clean_prompt
from ...reasoning.conversation import LAYOUTS, RULES, Asked, Rules
from ...reasoning.reflection import Reflection, reflect, think
from ...reasoning.report import indent
from ...reasoning.templates import LANGUAGES, load_templates
from .generation import Question, check_can_generate, generate_text, generate_texts
from .templates import template_folder

# The official setting (docs/model.md, Text generation).
TEMPERATURE = 0.7
# Maximum number of characters of a prompt to think about. The language model's work grows with its square, and no
# hand-written prompt is as long.
MAX_INSTRUCTION = 8000
# The calls about an edited image, in order.
JUDGING = [name for name in LAYOUTS if name != "rewrite"]


class Asker:
    """The language model as reflection.py expects it: `ask(system, content, max_tokens) -> reply`.

    Each call has its own seed, made from `task`, `seed` and the number of previous calls: a retry asks the same
    question and must not get the same answer. Calls asked together have their place in LAYOUTS for that number, and a
    retry the number of its try beside it, so that no seed depends on the replies to other calls. exchanges: all texts
    so far as (system, user, reply), without the user's images.
    """

    def __init__(self, clip, task: str, seed: int, temperature: float = TEMPERATURE):
        self.clip, self.task, self.seed, self.temperature = clip, task, seed, temperature
        self.exchanges: list[tuple[str, str, str]] = []
        self.memory = ImageMemory()

    def question(self, system: str, content: list, number: str = "") -> Question:
        """Return the next call, with its seed. number: in place of the number of previous calls."""
        text = f"{self.task} {self.seed} {number or len(self.exchanges)}"
        digest = hashlib.sha256(text.encode()).digest()
        return Question(system, content, int.from_bytes(digest[:8], "big"), self.temperature, self.memory)

    def note(self, question: Question, reply: str) -> None:
        """Record a call; the next one gets another seed."""
        self.exchanges.append(
            (question.system, "\n".join(part for part in question.content if isinstance(part, str)), reply)
        )

    def __call__(self, system: str, content: list, max_tokens: int) -> str:
        question = self.question(system, content)
        reply = generate_text(self.clip, system, question.content, max_tokens, question.seed, question.temperature)
        self.note(question, reply)
        return reply

    def together(self, asked: list[Asked]) -> list[str]:
        """Ask several questions with one budget as one batch; see `conversation.AskTogether`."""
        questions = []
        for each in asked:
            place = JUDGING.index(each.name)
            number = f"{place} {each.attempt}" if each.attempt else f"{place}"
            questions.append(self.question(each.system, each.content, number))
        replies = generate_texts(self.clip, questions, asked[0].budget)
        for question, reply in zip(questions, replies):
            self.note(question, reply)
        return replies


def single_picture(image: Tensor, name: str) -> Tensor:
    """Return the image [H, W, C] of a batch of one. name: the input, for the error. Raises Step1XError for any other
    batch."""
    check_pictures(image, name)
    if image.shape[0] != 1:
        raise Step1XError(
            f"Input '{name}' has {image.shape[0]} images; thinking and reflection need exactly one. Choose one with "
            "'ImageFromBatch'."
        )
    return image[0]


def check_instruction(prompt: str) -> None:
    """Raise Step1XError for a prompt that is too long to think about."""
    if len(prompt) > MAX_INSTRUCTION:
        raise Step1XError(
            f"Input 'prompt' has {len(prompt)} characters; thinking and reflection accept at most {MAX_INSTRUCTION}. "
            "Shorten the prompt."
        )


def rules_version(model) -> str:
    """Return the version whose rules apply to a model: its own if it has rules, else v1.2."""
    version = model.model.diffusion_model.version
    return version if version in RULES else "v1.2"


def check_thinking(clip) -> None:
    """Raise Step1XError for a text encoder that cannot generate text, and for faulty instruction texts of the user."""
    check_can_generate(clip)
    for language in LANGUAGES:
        load_templates(language, template_folder())


def rewrite(clip, image: Tensor, prompt: str, seed: int, temperature: float) -> tuple[str, str]:
    """Rewrite an instruction for an image [1, H, W, C] in 0..1; returns the new instruction, and a report of questions
    and answers.

    Raises Step1XError as `check_thinking`, `check_instruction` and `single_picture` do.
    """
    check_thinking(clip)
    check_instruction(prompt)
    ask = Asker(clip, "think", seed, temperature)
    thought = think(ask, single_picture(image, "image"), prompt, overrides=template_folder())
    (system, user, reply), = ask.exchanges
    lines = [f"Instruction: {thought.prompt}", f"Rewritten: {thought.instruction}"]
    for title, text in (("Asked, system", system), ("Asked, after the image", user), ("Answered", reply)):
        lines.append(f"\n{title}:\n{indent(text)}")
    return thought.instruction, clean_prompt("\n".join(lines))


def judge(clip, source: Tensor, edited: Tensor, prompt: str, seed: int, rules: Rules) -> Reflection:
    """Judge an edited image; both images are [1, H, W, C] in 0..1, of any size.

    Raises Step1XError as `check_thinking`, `check_instruction` and `single_picture` do; a reply that breaks its
    contract is never an error.
    """
    check_thinking(clip)
    check_instruction(prompt)
    pictures = single_picture(source, "source"), single_picture(edited, "edited")
    return reflect(Asker(clip, "reflect", seed), *pictures, prompt, rules, template_folder())
