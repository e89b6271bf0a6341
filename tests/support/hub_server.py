"""A local server with the endpoints of Hugging Face and ModelScope that downloads use, files behind a redirect to another host name, and faults on demand."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from web_server import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """repositories: name -> path -> content. faults: path of a file -> actions, one for each request of its content: functions of (handler, content, start).

    requests: (repository path of a file, first byte asked for), in their order. listings: number of lists that were asked for.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.faults: dict[str, list] = {}
        self.requests: list[tuple[str, int]] = []
        self.listings = 0
        # What is listed instead of the truth: path -> size.
        self.sizes: dict[str, int] = {}

    def huggingface(self, files: dict[str, bytes]) -> dict:
        siblings = []
        for path, content in files.items():
            entry = {
                "rfilename": path,
                "size": self.sizes.get(path, len(content)),
                "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            }
            if path.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": entry["size"], "pointerSize": 134}
            siblings.append(entry)
        return {"sha": COMMIT, "siblings": siblings}

    def modelscope(self, files: dict[str, bytes]) -> dict:
        folders = sorted({path.rpartition("/")[0] for path in files} - {""})
        return {"Code": 200, "Data": {"Files": [
            *({"Path": folder, "Type": "tree", "Size": 0, "Sha256": ""} for folder in folders),
            *({"Path": path, "Type": "blob", "Size": self.sizes.get(path, len(content)), "Sha256": hashlib.sha256(content).hexdigest()}
              for path, content in files.items())]}}

    def answer(self, handler) -> None:
        url = urlsplit(handler.path)
        path, query = unquote(url.path), {name: values[0] for name, values in parse_qs(url.query).items()}
        for name, files in self.repositories.items():
            if path == f"/api/models/{name}/revision/main" and query == {"blobs": "true"}:
                return self.listing(handler, self.huggingface(files))
            if path == f"/api/v1/models/{name}/repo/files" and query == {"Revision": "master", "Recursive": "true"}:
                return self.listing(handler, self.modelscope(files))
            file = query.get("FilePath") if path == f"/api/v1/models/{name}/repo" else path.removeprefix(f"/{name}/resolve/{COMMIT}/")
            if file in files:
                port = handler.server.server_address[1]
                return reply(handler, 302, b"", {"Location": f"http://localhost:{port}/cdn/{name}/{file}?signature=x"})
            if path == f"/cdn/{name}/{file.removeprefix(f'/cdn/{name}/')}" and handler.headers["Host"].startswith("localhost"):
                return self.content(handler, file.removeprefix(f"/cdn/{name}/"), files)
        return reply(handler, 404, b"Entry not found")

    def listing(self, handler, content: dict) -> None:
        self.listings += 1
        reply(handler, 200, json.dumps(content).encode())

    def content(self, handler, path: str, files: dict[str, bytes]) -> None:
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.requests.append((path, start))
        actions = self.faults.get(path, [])
        (actions.pop(0) if actions else send)(handler, files[path], start)

    @contextmanager
    def serve(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def log_message(self, *args):
                pass

        with serving(Handler, "localhost") as port:
            yield f"http://127.0.0.1:{port}"


def reply(handler, status: int, content: bytes, headers: dict | None = None, length: int | None = None) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content) if length is None else length), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def send(handler, content: bytes, start: int, sent: int | None = None) -> None:
    """The whole answer; with `sent` a cut connection after so many bytes."""
    headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
    rest = content[start:]
    reply(handler, 206 if start else 200, rest if sent is None else rest[:sent], headers, len(rest))


def cut(sent: int):
    return lambda handler, content, start: send(handler, content, start, sent)


def status(code: int, **headers):
    return lambda handler, content, start: reply(handler, code, b"busy", {name.replace("_", "-"): value for name, value in headers.items()})


def without_ranges(sent: int | None = None):
    return lambda handler, content, start: send(handler, content, 0, sent)


def damaged(handler, content: bytes, start: int) -> None:
    send(handler, content[:-1] + bytes([content[-1] ^ 1]), start)


def pause(before: int, reached: threading.Event, go_on: threading.Event):
    """Sends so many bytes, tells so, and waits before it sends the rest."""
    def action(handler, content, start):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:before])
        handler.wfile.flush()
        reached.set()
        go_on.wait(60)
        handler.wfile.write(content[before:])
    return action
