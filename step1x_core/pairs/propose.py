"""Proposals: the language model lists what is in a picture, and templates make instructions of it, in two languages
(docs/model.md, Training pairs).

`ask(system, content, max_tokens) -> reply`, as in reflection.py; a retry repeats the same words, so `ask` must sample
anew each time.
"""

import random
from collections.abc import Generator
from dataclasses import dataclass

from ..errors import Step1XError
from ..prompts.v11 import clean_prompt
from ..reasoning.conversation import Ask, Asked, answered
from ..reasoning.replies import BadReply, json_block
from .record import instructions, words

TRIES = 3
MAX_TOKENS = 1024
# Of one list in a reply; what is behind is passed over.
MAX_ENTRIES = 8
MAX_LENGTH = 80

SYSTEM = """You look at a picture and list what could be edited in it. Answer with one JSON object and nothing else:
{"objects": [{"en": "a red sofa", "zh": "红色沙发", "place": "on the left", "place_zh": "左边",
  "replacement": "a wooden bench", "replacement_zh": "木制长椅", "colour": "dark green", "colour_zh": "深绿色", "material": "leather", "material_zh": "皮革"}],
 "additions": [{"en": "a sleeping cat", "zh": "一只睡着的猫", "place": "on the carpet", "place_zh": "地毯上"}],
 "backgrounds": [{"en": "a sunny beach", "zh": "阳光沙滩"}],
 "texts": [{"old": "OPEN", "new": "CLOSED"}]}
objects: at most six clearly visible things that could be cut out, each named so that it is told from all others, with what could take its place, a colour and a material
that it does not have. additions: at most three things that would fit in, and where. backgrounds: at most three other backgrounds. texts: words that can be read in the
picture, and words of about the same length in their place. English values are short phrases with their article, Chinese ones are simplified Chinese."""
USER = "List what could be edited in this picture."

# Kinds that a model must see the picture for, and those for which a table has something.
SEEN = ("subject-add", "subject-remove", "subject-replace", "color_alter", "material_alter", "text_change")
TABLED = ("background_change", "style_change", "tone_transfer")
PROPOSED = (*SEEN, *TABLED)


@dataclass(frozen=True)
class Proposal:
    """An edit to make. english, chinese: its instruction.

    thing: what to segment, in English; "" for edits of the whole picture. content: what to paint or print there; ""
    where it is taken away.
    back_kind, back_english, back_chinese: the edit that the pair is when it is read from its end to its beginning; ""
    where that has no words.
    """

    kind: str
    english: str
    chinese: str
    thing: str = ""
    content: str = ""
    back_kind: str = ""
    back_english: str = ""
    back_chinese: str = ""


@dataclass(frozen=True)
class Idea:
    """A kind and what fills its wordings, by the names of their fields; each as English and Chinese."""

    kind: str
    values: dict[str, tuple[str, str]]


def phrase(value, wanted: str) -> str | None:
    """A short text of a reply in the wanted language, on one line; None for anything else."""
    if not isinstance(value, str):
        return None
    text = " ".join(clean_prompt(value).split()).strip(" .。")
    if not 0 < len(text) <= MAX_LENGTH:
        return None
    # One Han character is a word, so the rule for sentences is not enough here.
    has_han = any("\u4e00" <= char <= "\u9fff" for char in text)
    return text if has_han == (wanted == "chinese") else None


def both(entry: dict, english: str, chinese: str) -> tuple[str, str] | None:
    """The same phrase in both languages; None unless both are there."""
    texts = phrase(entry.get(english), "english"), phrase(entry.get(chinese), "chinese")
    return texts if all(texts) else None


def entries(table: dict, name: str) -> list[dict]:
    found = table.get(name)
    return [entry for entry in found[:MAX_ENTRIES] if isinstance(entry, dict)] if isinstance(found, list) else []


def read_ideas(reply: str) -> list[Idea]:
    """What a reply proposes; entries out of form are passed over. Raises BadReply where nothing is left."""
    table = json_block(reply)
    ideas = []
    for entry in entries(table, "objects"):
        name = both(entry, "en", "zh")
        if name is None:
            continue
        place = both(entry, "place", "place_zh")
        ideas.append(Idea("subject-remove", {"object": name, **({"place": place} if place else {})}))
        for kind, field in (
            ("subject-replace", "replacement"),
            ("color_alter", "colour"),
            ("material_alter", "material"),
        ):
            content = both(entry, field, f"{field}_zh")
            if content:
                ideas.append(Idea(kind, {"object": name, "content": content}))
    for entry in entries(table, "additions"):
        name, place = both(entry, "en", "zh"), both(entry, "place", "place_zh")
        if name and place:
            ideas.append(Idea("subject-add", {"content": name, "place": place}))
    for entry in entries(table, "backgrounds"):
        name = both(entry, "en", "zh")
        if name:
            ideas.append(Idea("background_change", {"content": name}))
    for entry in entries(table, "texts"):
        old, new = (
            value.strip()
            if isinstance(value, str) and 0 < len(value.strip()) <= MAX_LENGTH and "\n" not in value.strip()
            else None
            for value in (entry.get("old"), entry.get("new"))
        )
        if old and new and old != new:
            ideas.append(Idea("text_change", {"object": (old, old), "content": (new, new)}))
    if not ideas:
        raise BadReply("no entry with both languages")
    return ideas


def tabled_ideas(kind: str) -> list[Idea]:
    return [Idea(kind, {"content": tuple(names)}) for names in words()["contents"].get(kind, ())]


def definite(name: str) -> str:
    """"a red sofa" -> "the red sofa"."""
    first, _, rest = name.partition(" ")
    return f"the {rest}" if first.lower() in ("a", "an", "the", "some") and rest else f"the {name}"


def word(idea: Idea, rng: random.Random) -> Proposal:
    """The instruction of an idea, and of the way back where that has words."""
    values = idea.values
    wordings = words()["proposals"]

    def texts(kind: str, fields: dict[str, tuple[str, str]]) -> tuple[str, str]:
        known = kind != "text_change" and "object" in fields
        english = {name: definite(text) if known and name == "object" else text for name, (text, _) in fields.items()}
        return instructions(wordings[kind], english, {name: text for name, (_, text) in fields.items()}, rng)

    thing, content = (values.get(name, ("", ""))[0] for name in ("object", "content"))
    back: tuple[str, dict] | None = None
    if idea.kind == "subject-remove" and "place" in values:
        back = "subject-add", {"content": values["object"], "place": values["place"]}
    elif idea.kind == "subject-add":
        back = "subject-remove", {"object": values["content"]}
    elif idea.kind in ("subject-replace", "text_change"):
        back = idea.kind, {"object": values["content"], "content": values["object"]}
    return Proposal(idea.kind, *texts(idea.kind, values), thing, content, *((back[0], *texts(*back)) if back else ()))


def choose(ideas: list[Idea], kinds: list[str], count: int, rng: random.Random) -> list[Idea]:
    """So many ideas of these kinds, or as many as there are: the kinds take turns, in a random order, as do the ideas
    of each."""
    groups = {kind: [idea for idea in ideas if idea.kind == kind] for kind in kinds}
    groups = {kind: rng.sample(group, len(group)) for kind, group in groups.items() if group}
    order = rng.sample(list(groups), len(groups))
    turns = sorted((turn, order.index(kind)) for kind, group in groups.items() for turn in range(len(group)))
    return [groups[order[place]][turn] for turn, place in turns[:count]]


def parse_kinds(text: str, known: tuple[str, ...]) -> list[str]:
    """Names of kinds with commas between them; none: all. Raises Step1XError for another name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise Step1XError(f"{name[:80]!r} is not a kind that can be made here; expected {', '.join(known)}. "
                              "Correct the input 'kinds'.")
    return list(dict.fromkeys(names)) or list(known)


def propose(ask: Ask, picture, kinds: list[str], count: int, seed: int) -> tuple[list[Proposal], str]:
    """Proposals for one image; as `proposing`."""
    return answered(ask, proposing(picture, kinds, count, seed))


def proposing(picture, kinds: list[str], count: int, seed: int) -> Generator[Asked, str, tuple[list[Proposal], str]]:
    """Yield the steps (see `conversation.answered`) to proposals of these kinds, at most `count`, and a report. The
    same replies and seed give the same ones.

    Where the model gives no usable reply in 3 tries, or none of a kind that a table has something for, the table is
    taken.

    Raises Step1XError if nothing can be proposed.
    """
    ideas, problem = [], ""
    if set(kinds) - {"style_change", "tone_transfer"}:
        for attempt in range(TRIES):
            try:
                reply = yield Asked(SYSTEM, [picture, USER], MAX_TOKENS, "propose", attempt)
                ideas = read_ideas(clean_prompt(reply))
                break
            except BadReply as bad:
                problem = f"The language model gave no usable list in {TRIES} tries (last problem: {bad})"
    rng = random.Random(seed)
    found = {idea.kind for idea in ideas}
    ideas += [idea for kind in TABLED if kind not in found for idea in tabled_ideas(kind)]
    chosen = [word(idea, rng) for idea in choose(ideas, kinds, count, rng)]
    if not chosen:
        raise Step1XError(f"{problem or 'The language model found nothing in this image'}, and every one of the kinds "
                          f"{', '.join(kinds)} depends on that. "
                          "Use the full Qwen2.5-VL-7B-Instruct, another seed, or more kinds.")
    head = (
        f"{problem}; these edits do not need one."
        if problem and not found
        else f"The language model found {', '.join(sorted(found))}."
        if found
        else "Not asked."
    )
    return chosen, "\n".join(
        [head, *(f"{proposal.kind}: {proposal.english} / {proposal.chinese}" for proposal in chosen)]
    )
