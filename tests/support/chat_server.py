"""A judge behind a web interface as OpenAI's, with faults on demand."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from web_server import serving

SCORES = '{"score": [6, 9], "reasoning": "fine"}'


@contextmanager
def chat_server(*actions):
    """A web interface as OpenAI's. actions: one for each request, over and over the last one; each a reply's text, or a function of the handler."""
    requests, left, lock = [], list(actions), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append((self.path, dict(self.headers), body))
                action = left.pop(0) if len(left) > 1 else left[0]
            answer = action if callable(action) else chat(action)
            answer(self)

        def log_message(self, *args):
            pass

    with serving(Handler, "127.0.0.1") as port:
        yield f"http://127.0.0.1:{port}/v1", requests


def send(status, content: bytes, **headers):
    def action(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)
    return action


def chat(text):
    return send(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


# Seconds after which a judge is given up; a good answer has to come within them, on a busy machine, too.
SHORT = 1.5


def stall(handler):
    time.sleep(2 * SHORT)


def dribble(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(int(2 * SHORT / 0.05)):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)
