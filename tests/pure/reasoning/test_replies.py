"""Reading the language model's replies: the official tables, and replies that nobody would expect."""

import json
import math
import os
import random
import sys
import time

import golden_checks_reflection
import golden_files
import pytest
from conftest import PACK

from step1x_core.reasoning import replies
from step1x_core.reasoning.conversation import RULES, Rules
from step1x_core.reasoning.reflection import Loop, reflect, think
from step1x_core.reasoning.replies import BadReply
from step1x_core.reasoning.report import report
from step1x_core.reasoning.templates import LANGUAGES, load_templates

GOLDENS = PACK / "tests" / "parity" / "goldens" / "v12"

GOOD = {
    "rewrite": "Make the cup red.",
    "description": "A red cup on a table.",
    "consistency": '{"meets_instruction": "yes", "major_conflicts": 0, "minor_conflicts": 1, "omissions": 0, "raw_score": 8.5, "reason": "fine"}',
    "reflection": "<#Think>The cup is pink.<#Reflection>Make the cup on the table red.",
    "edit_score": '{"score": [6, 9], "reasoning": "pink"}',
    "quality_score": '```json\n{"score": [8, 7], "reasoning": "sharp"}\n```',
}
CALLS = list(GOOD)


@pytest.mark.parametrize("name", ["reflection_final.json", "reflection_preview.json"])
def test_official_tables(name):
    errors = golden_files.Errors()
    golden_checks_reflection.CHECKS[name](json.loads((GOLDENS / name).read_text(encoding="utf-8")), errors)
    assert errors.max == 0


@pytest.mark.parametrize(
    "path, value",
    [
        (("reflection_reply", 15, "refine_prompt"), "make sky blue"),
        (("score_caps", 3, "result", "n_cap_trace"), 1),
        (("json_block", 2, "result"), {"b": 2}),
        (("best_score_reply", 3, "valid"), True),
        (("language_rule", 2, "result"), "chinese"),
        (("retries", 2, "n_calls"), 5),
        (("best_retries", 1, "n_calls"), 39),
        (("call_layout", "consistency", "max_tokens"), 512),
    ],
)
def test_the_check_of_the_tables_finds_a_wrong_entry(path, value):
    table = json.loads((GOLDENS / "reflection_final.json").read_text(encoding="utf-8"))
    place = table
    for key in path[:-1]:
        place = place[key]
    assert place[path[-1]] != value
    place[path[-1]] = value
    errors = golden_files.Errors()
    golden_checks_reflection.CHECKS["reflection_final.json"](table, errors)
    assert errors.max > 0


def test_a_raw_score_of_exactly_one_counts_as_the_best():
    scores = [replies.read_consistency({"meets_instruction": "yes", "raw_score": raw}).score for raw in (0.99, 1, 1.01, 2)]
    assert scores == [9.9, 10.0, 1.01, 2.0]


@pytest.mark.parametrize(
    "scores",
    [[], [7], [7, 8, 9], ["7", "8"], [7, None], [True, False], [7, math.nan], [math.inf, 7], [[7], 8], [{}, 7]],
)
def test_score_lists_other_than_two_finite_numbers_are_bad(scores):
    with pytest.raises(BadReply, match="two finite numbers"):
        replies.score_pair({"score": scores, "reasoning": ""})


def test_scores_are_clamped():
    assert replies.score_pair({"score": [-3, 10**400], "reasoning": ""}) == (0.0, 10.0)
    assert replies.score_pair({"score": [7.5, 10], "reasoning": ""}) == (7.5, 10.0)


@pytest.mark.parametrize(
    "table",
    [
        {"raw_score": 10**400},
        {"raw_score": [7]},
        {"omissions": math.nan},
        {"omissions": math.inf},
        {"major_conflicts": [1]},
        {"minor_conflicts": "9" * 5000},
    ],
)
def test_values_that_are_no_numbers_make_a_bad_reply(table):
    with pytest.raises(BadReply) as caught:
        replies.read_consistency({"meets_instruction": "yes", "raw_score": 7, **table})
    assert len(str(caught.value)) < 200


def test_the_explanation_is_what_stands_between_the_tags():
    assert replies.read_thoughts("<#Think> too pale <#Reflection> darker") == "too pale"
    assert replies.read_thoughts("<#Think>a <#Think> b<#Success> c") == "a <#Think> b"


def nested(depth: int, inner: str = "1") -> str:
    return '{"a":' * depth + inner + "}" * depth


def adversarial() -> list[str]:
    """Long and deep replies, most of them of a megabyte."""
    megabyte = 1_000_000
    deep = [nested(depth) for depth in (500, 990, 2000, 100_000)] + ["[" * megabyte, '{"a":' * (megabyte // 5), '{"score":' + "[" * 50_000]
    deep += [f'{{"meets_instruction":{nested(d)},"raw_score":9,"reason":{"[" * d}{"]" * d}}}' for d in (300, 900, 3000)]
    deep += [f'{{"score":{nested(d, "[1,2]")},"reasoning":{nested(d)}}}' for d in (300, 3000)]
    numbers = [digits for n in (400, 4299, 4301, megabyte) for digits in ("9" * n, "-" + "9" * n, "0." + "3" * n, "1e" + "9" * n)]
    long = [f'{{"meets_instruction":"yes","raw_score":{n},"major_conflicts":{n}}}' for n in numbers]
    long += [f'{{"score":[{n},{n}],"reasoning":{n}}}' for n in numbers]
    long += [unit * (megabyte // len(unit)) for unit in UNITS]
    long += ["<#Think>" + "x " * (megabyte // 2) + tag + "y " * (megabyte // 2) for tag in replies.OUTCOMES]
    long += ['{"score":[8,9],"reasoning":"' + unit * (megabyte // len(unit)) + '"}' for unit in ("a", "\\ud800", "\\\\", "\\n", "漢")]
    long += [
        '{"meets_instruction":"yes","raw_score":9,"reason":"' + "\\ud800" * 100_000 + '"}',
        "{" + " " * megabyte + "}",
        " " * megabyte + "{}",
        '{"score":[' + "1," * (megabyte // 2) + '1],"reasoning":""}',
        "{" + ",".join(f'"k{i}":{i}' for i in range(60_000)) + "}",
    ]
    return deep + long


UNITS = [
    "a",
    " ",
    "\n",
    "{",
    "}",
    "{}",
    "```json",
    "```",
    '"',
    "\\",
    "<#Think>",
    "<#Success>",
    "<#Think",
    "<#Think> <#Reflection>",
    "\ud800",
    "\u0000",
    "漢",
    '{"score":[1,2],"reasoning":""}',
    "错误:",
    "\u202e",
]

PIECES = [
    "<#Think>",
    "<#Reflection>",
    "<#Failed>",
    "<#Success>",
    "<#Others>",
    "<#think>",
    "<#Think",
    "#>",
    "错误:",
    "错误：",
    "```json",
    "```",
    "\n",
    " ",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    '"',
    "'",
    "\\",
    '"score"',
    '"reasoning"',
    '"meets_instruction"',
    '"raw_score"',
    '"major_conflicts"',
    '"hallucinations"',
    '"omissions"',
    '"reason"',
    "NaN",
    "Infinity",
    "-Infinity",
    "null",
    "true",
    "false",
    "1e400",
    "-0.0",
    "1.0000001",
    "0.5",
    "8",
    "10",
    "9" * 400,
    "yes",
    "no",
    "partial",
    "make it red",
    "把天空变红",
    "иди",
    "どうぞ",
    "😀",
    "\ud83d",
    "\udc00",
    "\x00",
    "\ufeff",
    "\u2028",
    "{instruction}",
    "%s",
    "<|image_pad|>",
    "<|im_end|>",
    "ß",
]

VALUES = [
    "NaN",
    "Infinity",
    "-Infinity",
    "null",
    "true",
    "{}",
    "[]",
    '""',
    '"x"',
    '"8.5"',
    '" 2 "',
    "1",
    "-1",
    "0",
    "1.9",
    "1e999",
    "9" * 5000,
    "[[[[]]]]",
    '"\\ud800"',
    "{",
]


def random_reply(rng: random.Random) -> str:
    kind = rng.randrange(5)
    if kind == 0:
        return "".join(rng.choices(PIECES, k=rng.randrange(30)))
    if kind == 1:
        # A good reply with a few cuts, copies and insertions.
        text = rng.choice(list(GOOD.values()))
        for _ in range(rng.randrange(1, 5)):
            a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            text = rng.choice([text[:a] + text[b:], text[:b] + text[a:], text[:a] + rng.choice(PIECES) + text[a:], text[:b]])
        return text
    if kind == 2:
        names = ("meets_instruction", "major_conflicts", "minor_conflicts", "hallucinations", "omissions", "raw_score", "reason")
        return "{" + ",".join(f'"{name}":{rng.choice(VALUES)}' for name in names if rng.random() < 0.8) + "}"
    if kind == 3:
        scores = ",".join(rng.choice(VALUES) for _ in range(rng.randrange(4)))
        reply = f'{{"score":[{scores}],"reasoning":{rng.choice(VALUES)}}}'
        return rng.choice([reply, f"```json\n{reply}\n```", f"```\n{reply}", f"```json{reply}```", f"{reply}```"])
    return "".join(
        chr(
            rng.choice(
                [
                    rng.randrange(128),
                    rng.randrange(0x3000, 0xA000),
                    rng.randrange(0xD7F0, 0xE010),
                    rng.randrange(0x10000, 0x11000),
                ]
            )
        )
        for _ in range(rng.randrange(60))
    )


# `STEP1X_REPLIES=20000 python scripts/test.py -k replies` draws more of them.
REPLIES = int(os.environ.get("STEP1X_REPLIES", 1200))


def test_thousands_of_replies_all_end_in_a_verdict():
    """Each reply answers one of the calls, the other calls get good replies; every sixth answers all of them."""
    rng = random.Random(4)
    fuzz = adversarial()
    fuzz += [random_reply(rng) for _ in range(REPLIES - len(fuzz))]
    one_try = Rules(RULES["v1.2"].budgets, scored=True, tries=1)
    systems = {}
    for language in LANGUAGES:
        systems |= {text: name.removesuffix(".system") for name, text in load_templates(language).items() if name.endswith(".system")}
    verdicts, slowest = set(), 0.0
    for number, reply in enumerate(fuzz):
        # A long reply meets every call, the others take turns.
        for target in (CALLS if len(reply) > 1000 else [CALLS[number % len(CALLS)]]):
            def ask(system, content, max_tokens):
                name = systems[system]
                return reply if name == target or number % 6 == 5 else GOOD[name]

            start = time.process_time()
            thought = think(ask, None, "Make the cup red.", one_try)
            result = reflect(ask, None, None, thought.instruction, one_try)
            loop = Loop(thought.instruction, one_try).after(result)
            step = loop.next_step()
            text = report(loop, thought)
            slowest = max(slowest, time.process_time() - start)

            verdicts.add(result.verdict)
            assert thought.instruction.strip()
            assert step is None if result.verdict == "success" else step.prompt.strip()
            assert bool(result.refined) == (result.verdict == "refine")
            assert all(len(pair) == 2 and all(0 <= score <= 10 for score in pair) for pair in (result.edit_scores, result.quality_scores))
            assert result.consistency is None or 0 <= result.consistency.score <= 10
            assert loop.best() == 0 and 0 <= result.value <= 100
            text.encode("utf-8")
            (
                result.refined
                + result.explanation
                + result.description
                + (result.consistency.reason if result.consistency else "")
            ).encode("utf-8")
    assert verdicts == {"success", "refine", "failed"}
    assert slowest < 5


def test_a_deep_reply_does_no_harm_near_the_end_of_the_stack():
    def deeper(levels):
        if levels:
            return deeper(levels - 1)
        with pytest.raises(BadReply):
            replies.json_block(nested(100_000))
        return True

    assert deeper(sys.getrecursionlimit() // 2)
