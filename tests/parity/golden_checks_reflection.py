"""The golden checks of thinking and reflection
(docs/model.md, Calls; Replies; Rounds): replies, retries, call layout, rounds.

golden_runner.py runs them. Everything is compared exactly.
"""

import itertools
import json
import math
from dataclasses import replace

from step1x_core.reasoning import replies
from step1x_core.reasoning.conversation import LAYOUTS, RULES, Call, Conversation
from step1x_core.reasoning.reflection import Loop, Reflection, judge, rate, reflect, think, unjudged
from step1x_core.reasoning.replies import BadReply
from step1x_core.reasoning.templates import LANGUAGES, load_templates

# The tables' names of the calls and of the versions' files.
CALL_NAMES = {"edit_success_score": "edit_score"}
VERSION_NAMES = {"final": "v1.2", "preview": "v1.2-preview"}

GOOD_CONSISTENCY = json.dumps({"meets_instruction": "yes", "raw_score": 9, "reason": "fine"})


class Exhausted(Exception):
    """A scripted conversation has no more replies."""


def stored(value):
    """A value as the tables store it: floats that JSON has no sign for are objects."""
    if isinstance(value, dict):
        return {k: stored(v) for k, v in value.items()}
    if isinstance(value, list):
        return [stored(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value)}
    return value


def restored(value):
    """The value that the tables store."""
    if isinstance(value, dict):
        return float(value["__float__"]) if "__float__" in value else {k: restored(v) for k, v in value.items()}
    return [restored(v) for v in value] if isinstance(value, list) else value


def result_of(parse, value):
    """What a parser returns, None for a bad reply. No reply at all (null) is an empty one here."""
    try:
        return parse("" if value is None else value)
    except BadReply:
        return None


def outcome_table(text: str) -> dict:
    outcome = replies.read_outcome(text or "")
    return {"success": outcome.success, "refine_prompt": outcome.refine}


def check_replies(table: dict, errors) -> None:
    for row in table["reflection_reply"]:
        kept = result_of(replies.keep_reflection, row["input"])
        errors.equal(kept is not None, row["valid"])
        errors.equal(kept, row["cleaned"])
        errors.equal(outcome_table(row["input"]), row["direct_format_text"])
        if row["valid"] and kept is not None:
            errors.equal(outcome_table(kept), {"success": row["round_success"], "refine_prompt": row["refine_prompt"]})
    errors.equal(result_of(replies.keep_reflection, None) is not None, table["reflection_reply_none_valid"])
    for row in table["json_block"]:
        errors.equal(stored(result_of(replies.json_block, row["input"])), row["result"])
    for row in table["score_caps"]:
        # Anything but an object does not get past `json_block`.
        consistency = result_of(replies.read_consistency, restored(row["input"])) if isinstance(row["input"], dict) else None
        found = None
        if consistency:
            found = {name: stored(getattr(consistency, name)) for name in row["result"] or {} if name != "n_cap_trace"}
            found["n_cap_trace"] = len(consistency.caps)
        errors.equal(found, row["result"])
    for row in table["language_rule"]:
        text = row["input"] if isinstance(row["input"], str) else "".join(map(str, row["input"] or ""))
        errors.equal(replies.language(text), row["result"])
    for row in table.get("best_score_reply", []):
        found = result_of(replies.score_table, row["input"])
        errors.equal(found is not None, row["valid"])
        errors.equal(stored(found), row["parsed"])


def scripted(script, calls: list):
    """A language model that gives the replies of a script, and keeps what it was asked in `calls`."""
    script = iter(script)

    def ask(system, content, max_tokens):
        calls.append((system, content, max_tokens))
        for reply in script:
            if reply == "__RAISE__":
                # The official code tries again after any exception, this pack after a bad reply only.
                raise BadReply("the scripted client raised")
            return reply or ""
        raise Exhausted
    return ask


def check_retries(table: dict, rules, errors) -> None:
    """The scripts of the judgement. Where the official code never stops, the pack is given more tries than the script has replies."""
    templates = load_templates("english")
    for row in table["retries"]:
        unbounded = isinstance(row["outcome"], str)
        calls = []
        conversation = Conversation(scripted(row["script"], calls), replace(rules, tries=len(row["script"]) + 1) if unbounded else rules,
                                    templates, {"source": "source", "edited": "edited"})
        try:
            result = judge(conversation, "instruction")
        except Exhausted:
            errors.equal(True, unbounded)
        else:
            # The reply is read again, because the pack trims a refinement.
            found = {"generation": result.description, "evaluation_score": result.consistency.score if result.consistency else None,
                     "evaluation_raw": result.consistency.raw_score if result.consistency else 0.0,
                     "reflection_tag_outcome": outcome_table(result.reply)}
            errors.equal(found, row["outcome"])
        errors.equal(len(calls), row["n_calls"])


def score_reply(scores: list) -> str:
    return json.dumps({"score": scores, "reasoning": "because"})


def check_score_retries(table: dict, rules, errors) -> None:
    """The tables give the two score pairs and the number of calls; bad replies before the second pair make up the number."""
    templates = load_templates("english")
    for row in table.get("best_retries", []):
        calls = []
        script = itertools.repeat("junk")
        if row["n_calls"] < 2 * rules.tries:
            script = [score_reply(row["score1"]), *["junk"] * (row["n_calls"] - 2), score_reply(row["score2"])]
        conversation = Conversation(scripted(script, calls), rules, templates, {"source": "source", "edited": "edited"})
        errors.equal(list(rate(conversation, "edit_score", instruction="instruction")), row["score1"])
        errors.equal(list(rate(conversation, "quality_score")), row["score2"])
        errors.equal(len(calls), row["n_calls"])


def check_call_layout(table: dict, rules, errors) -> None:
    templates = load_templates("english")
    for name, row in table["call_layout"].items():
        name = CALL_NAMES.get(name, name)
        calls = []
        # Numbers stand for the pictures.
        conversation = Conversation(scripted(["reply"], calls), rules, templates, {"source": 1, "edited": 2})
        conversation.attempt(Call(name), {"instruction": "", "description": "", "score": "", "reason": ""})
        (system, content, max_tokens), = calls
        errors.equal(max_tokens, row["max_tokens"])
        errors.equal([["system", "text"], ["user", ["text" if isinstance(part, str) else "image_url" for part in content]]], row["layout"])
        errors.equal(system, templates[f"{name}.system"])
        errors.equal(
            [part for part in content if not isinstance(part, str)],
            [{"source": 1, "edited": 2}[part] for part in LAYOUTS[name] if part != "text"],
        )


def reflection_checks(version: str):
    def check(table: dict, errors) -> None:
        check_replies(table, errors)
        check_retries(table, RULES[version], errors)
        check_score_retries(table, RULES[version], errors)
        check_call_layout(table, RULES[version], errors)
    return check


class Rounds:
    """A language model whose reflection and score replies are those of one round at a time, and what it was asked in that round."""

    def __init__(self, rewrite: str):
        self.replies = {"rewrite": rewrite or "", "description": "description", "consistency": GOOD_CONSISTENCY}
        self.names = {load_templates(language)[f"{name}.system"]: name for name in LAYOUTS for language in LANGUAGES}
        self.asked = {}

    def __call__(self, system, content, max_tokens):
        name = self.names[system]
        self.asked[name] = content
        return self.replies[name]


def as_official(result: Reflection, reply: str, edit: list, quality: list) -> Reflection:
    """Undo what the pack does otherwise on purpose: replies out of form are tried again, refinements trimmed or refused, scores checked."""
    outcome = replies.read_outcome(reply)
    if outcome.refine is not None:
        return replace(result, verdict="refine", refined=outcome.refine, edit_scores=tuple(edit), quality_scores=tuple(quality))
    verdict = result.verdict if result.reply == reply else "success" if outcome.success else "failed"
    return replace(result, verdict=verdict, reply=reply, edit_scores=tuple(edit), quality_scores=tuple(quality))


def run_case(case: dict, expected: dict, version: str) -> dict:
    """Thinking and all rounds of one case, as the table shows them. expected: the official result."""
    model = Rounds(case["rewrite"])
    found = {"rounds": [], "think_called_with": None}
    prompt = case["prompt"]
    if case["thinking"]:
        thought = think(model, "source", case["prompt"], RULES[version])
        # The official code edits by an empty rewrite; this pack falls back to the person's instruction.
        prompt = thought.instruction if case["rewrite"] else ""
        picture, text = model.asked["rewrite"]
        found["think_called_with"] = [picture, case["prompt"] if case["prompt"] in text else text]

    loop = Loop(prompt, RULES[version], case["max_try_cnt"] if case["reflection"] else 1)
    images, replies_seen = [], []
    while step := loop.next_step():
        entry = {
            "base_image": images[-1] if step.base == "latest" else "source",
            "encoded_prompts": [step.prompt, case.get("negative_prompt") or ""],
        }
        images.append(f"output_{len(images)}")
        found["rounds"].append(entry)
        if not case["reflection"]:
            loop = loop.after(unjudged("reflection is off"))
            continue
        reply, scores = case["rounds"][len(loop.rounds)]
        # The preview asks for no scores, so its tables may have none.
        edit, quality = scores or ([0, 0], [0, 0])
        model.replies.update(reflection=reply or "", edit_score=score_reply(edit), quality_score=score_reply(quality))
        result = reflect(model, "source", images[-1], prompt, RULES[version])
        source, edited, text = model.asked["reflection"]
        entry["reflect"] = {"source": source, "result": edited, "instruction": prompt if prompt in text else text}
        replies_seen.append(reply)
        loop = loop.after(as_official(result, reply or "", edit, quality) if "error" not in expected else result)

    best = loop.best()
    found["result"] = {"images": images, "think_info": replies_seen if case["thinking"] or case["reflection"] else None,
                       "reformat_prompt": prompt if case["thinking"] else None}
    if RULES[version].scored:
        found["result"]["final_images"] = [] if best is None else [images[best]]
    else:
        # The official preview returns all pictures; the last one is its result.
        assert best == (len(images) - 1 if images else None)
    return found


def loop_check(version: str):
    def check(table: dict, errors) -> None:
        for row in table["cases"]:
            found = run_case(row["case"], row["result"], version)
            errors.equal(found["rounds"], row["rounds"])
            errors.equal(found["think_called_with"], row["think_called_with"])
            if "error" in row["result"]:
                # The official code loses all pictures over a faulty score list; this pack must name one.
                errors.equal(len(found["result"]["final_images"]), 1)
            else:
                errors.equal(found["result"], row["result"])
    return check


CHECKS = {f"{kind}_{name}.json": make(version) for kind, make in (("reflection", reflection_checks), ("loop_control", loop_check))
          for name, version in VERSION_NAMES.items()}
