"""The judge of GEdit-Bench: two questions about each edit (VIEScore), to a language model behind `ask` (spec train_eval.md 3).

`ask(system, content, max_tokens) -> reply`; `content` holds texts and pictures, uint8 [H, W, 3], in their order. Each edit is judged by an
`ask` of its own, which answers a question that it has been asked before anew.
"""

import base64
import http.client
import io
import json
import math
import random
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from .config import Step1XError
from .prompt import plain_text
from .reflection import Ask, Asked, Conversation, Rules, answered
from .replies import MAX_SCORE, BadReply, json_block
from .templates import load_templates

# Pixels of the pictures that are judged.
JUDGE_AREA = 512 * 512
QUESTIONS = ("edit_score", "quality_score")
# The official code asks up to 10,000 times.
TRIES = 5
ANSWER_TOKENS = 768
RULES = Rules(dict.fromkeys(QUESTIONS, ANSWER_TOKENS), scored=True, tries=TRIES)
# The judge's first answer is its most probable one; only one that cannot be read is asked for anew, by chance.
RETRY_TEMPERATURE = 0.7

# An endpoint's answer that is longer is not one.
MAX_ANSWER_BYTES = 1 << 20
MAX_PAUSE = 60.0
# Statuses after which the same request may succeed; any other says that the request is wrong.
PASSING = (408, 409, 425, 429)


@dataclass(frozen=True)
class Verdict:
    """semantics: edit success and restraint; quality: naturalness and freedom from artifacts; 0..10 each, None without a usable answer.

    problem: why there is none, "" where there are all scores. replies: the last one to each question.
    """

    semantics: tuple[float, float] | None
    quality: tuple[float, float] | None
    problem: str = ""
    replies: tuple[str, ...] = ()


class Unavailable(Exception):
    """The judge could not be asked; asking later may help. The text says why."""


def judge_size(width: int, height: int) -> tuple[int, int]:
    """Width and height at which a picture is judged: about 512 * 512 pixels in its aspect ratio."""
    ratio = width / height
    exact = math.sqrt(JUDGE_AREA * ratio)
    return max(1, int(exact)), max(1, int(exact / ratio))


def to_judge_size(picture: Image.Image) -> np.ndarray:
    """Picture -> uint8 [h, w, 3]. The facts do not name the filter; this is Lanczos."""
    return np.asarray(picture.convert("RGB").resize(judge_size(*picture.size), Image.Resampling.LANCZOS))


def read_scores(reply: str) -> tuple[float, float]:
    """The two scores of a reply: a JSON object with "score", in whatever text. Raises BadReply for anything but two numbers 0..10."""
    scores = json_block(reply).get("score")
    if not isinstance(scores, list) or len(scores) != 2 or not all(type(score) in (int, float) and 0 <= score <= MAX_SCORE for score in scores):
        raise BadReply(f'"score" is not two numbers from 0 to {MAX_SCORE:g}')
    return float(scores[0]), float(scores[1])


def judging(source: Image.Image, edited: Image.Image, instruction: str) -> Generator[Asked, str, Verdict]:
    """The steps (see `answered`) of judging one edit -> its scores, whatever the replies are."""
    pictures = {"source": to_judge_size(source), "edited": to_judge_size(edited)}
    conversation = Conversation(None, RULES, load_templates("english"), pictures)
    scores, problems = [], []
    for name, values in zip(QUESTIONS, ({"instruction": instruction}, {})):
        try:
            scores.append((yield from conversation.tries(name, read_scores, **values)))
        except BadReply as problem:
            scores.append(None)
            problems.append(str(problem))
    replies = tuple(call.replies[-1] if call.replies else "" for call in conversation.calls)
    return Verdict(*scores, " ".join(problems), replies)


def judge_edit(ask: Ask, source: Image.Image, edited: Image.Image, instruction: str) -> Verdict:
    """The scores of one edit. Whatever the replies are, this returns a verdict; what `ask` raises passes through, other than BadReply."""
    return answered(ask, judging(source, edited, instruction))


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to another server."""

    def redirect_request(self, *args):
        return None


def data_url(pixels: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def message_part(part) -> dict:
    """A text or a picture as the interface takes it. Servers read special tokens in a text as such, so there are none."""
    return {"type": "text", "text": plain_text(part)} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": data_url(part)}}


class Endpoint:
    """A language model behind an OpenAI-compatible web interface, `url`/chat/completions. May be used by several threads.

    key: sent as the bearer token where there is one. timeout: seconds for one answer as a whole. tries: how often a request is made that
    times out, is turned away (429, 5xx) or is answered with something else than the interface's. pause: seconds before the second try,
    doubled for each further one, unless the server says how long.
    """

    def __init__(self, url: str, model: str, key: str = "", timeout: float = 120, tries: int = 4, pause: float = 2.0):
        if urlsplit(url).scheme not in ("http", "https"):
            raise Step1XError(f"The endpoint {url!r} is no web address. Give its beginning, like http://localhost:8000/v1.")
        self.url, self.model, self.key = url.rstrip("/") + "/chat/completions", model, key
        self.timeout, self.tries, self.pause = timeout, tries, pause
        self.opener = urllib.request.build_opener(NoRedirect)

    def judge(self, seed: int) -> Ask:
        """The `ask` for one edit."""
        asked = []

        def ask(system, content, max_tokens):
            repeated = asked.count(system)
            asked.append(system)
            sampling = {"temperature": RETRY_TEMPERATURE, "seed": (seed + repeated) % 2**31} if repeated else {"temperature": 0}
            return self.answer({"model": self.model, "max_tokens": max_tokens, **sampling, "messages": [
                {"role": "system", "content": plain_text(system)}, {"role": "user", "content": [message_part(part) for part in content]}]})

        return ask

    def answer(self, request: dict) -> str:
        """The text of the model's answer. Raises Unavailable when no try got one, Step1XError when the server refuses such requests."""
        body = json.dumps(request).encode()
        for number in range(self.tries):
            try:
                return self.read(self.post(body))
            except urllib.error.HTTPError as problem:
                with problem:
                    if problem.code < 500 and problem.code not in PASSING:
                        detail = problem.read(500).decode(errors="replace").strip()
                        raise Step1XError(f"The endpoint {self.url} refuses the request with status {problem.code} ({detail}). "
                                          "Check its address, the model's name and the key.") from problem
                    last, wait = f"status {problem.code}", problem.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException, Unavailable) as problem:
                last, wait = str(problem) or type(problem).__name__, ""
            if number + 1 < self.tries:
                # Several threads that were turned away together do not come back together.
                pause = float(wait) if wait.isdecimal() else self.pause * 2**number * random.uniform(0.8, 1.2)
                time.sleep(min(pause, MAX_PAUSE))
        raise Unavailable(f"The endpoint {self.url} gave no answer in {self.tries} tries; the last one: {last}")

    def post(self, body: bytes) -> bytes:
        """One request -> the answer's body. Raises OSError for whatever goes wrong on the way, a timeout too."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        end, content = time.monotonic() + self.timeout, b""
        with self.opener.open(urllib.request.Request(self.url, body, headers), timeout=self.timeout) as response:
            # The timeout of a socket starts anew with every byte.
            while chunk := response.read1(65536):
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise Unavailable(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > end:
                    raise TimeoutError("timed out")
        return content

    def read(self, content: bytes) -> str:
        """The text in an answer's body. Raises Unavailable for a body that is not of this interface, BadReply for an answer without text."""
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            start = content[:80].decode(errors="replace")
            raise Unavailable(f"no answer of a chat, but {start!r}") from None
        if not isinstance(text, str):
            raise BadReply("an answer without text")
        return text
