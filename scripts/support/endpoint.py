"""A judge behind an OpenAI-compatible web interface. Nothing but scripts/gedit.py asks one, and only when it is given an address."""

import base64
import http.client
import io
import json
import random
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from step1x_core.errors import Step1XError
from step1x_core.prompts.v11 import plain_text
from step1x_core.reasoning.conversation import Ask
from step1x_core.reasoning.judge import RETRY_TEMPERATURE
from step1x_core.reasoning.replies import BadReply

# An endpoint's answer that is longer is not one.
MAX_ANSWER_BYTES = 1 << 20
MAX_PAUSE = 60.0
# Statuses after which the same request may succeed; any other says that the request is wrong.
PASSING = (408, 409, 425, 429)


class Unavailable(Exception):
    """The judge could not be asked; asking later may help. The text says why."""


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
    return (
        {"type": "text", "text": plain_text(part)}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
    )


class Endpoint:
    """A language model behind an OpenAI-compatible web interface, `url`/chat/completions. May be used by several threads.

    key: sent as the bearer token where there is one. timeout: seconds for one answer as a whole. tries: how often a request is made that
    times out, is turned away (429, 5xx) or is answered with something else than the interface's. pause: seconds before the second try,
    doubled for each further one, unless the server says how long.
    """

    def __init__(self, url: str, model: str, key: str = "", timeout: float = 120, tries: int = 4, pause: float = 2.0):
        if urlsplit(url).scheme not in ("http", "https"):
            raise Step1XError(
                f"The endpoint {url!r} is no web address. Give its beginning, like http://localhost:8000/v1."
            )
        self.url, self.model, self.key = url.rstrip("/") + "/chat/completions", model, key
        self.timeout, self.tries, self.pause = timeout, tries, pause
        self.opener = urllib.request.build_opener(NoRedirect)

    def judge(self, seed: int) -> Ask:
        """The `ask` for one edit."""
        asked = []

        def ask(system, content, max_tokens):
            repeated = asked.count(system)
            asked.append(system)
            sampling = (
                {"temperature": RETRY_TEMPERATURE, "seed": (seed + repeated) % 2**31}
                if repeated
                else {"temperature": 0}
            )
            return self.answer(
                {
                    "model": self.model,
                    "max_tokens": max_tokens,
                    **sampling,
                    "messages": [
                        {"role": "system", "content": plain_text(system)},
                        {"role": "user", "content": [message_part(part) for part in content]},
                    ],
                }
            )

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
                        raise Step1XError(
                            f"The endpoint {self.url} refuses the request with status {problem.code} ({detail}). "
                            "Check its address, the model's name and the key."
                        ) from problem
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
