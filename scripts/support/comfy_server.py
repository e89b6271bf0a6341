"""A headless ComfyUI as a child process, and a small client for its HTTP and websocket interface.

Runs in the host's Python (aiohttp comes with ComfyUI).
"""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import aiohttp

PACK = Path(__file__).absolute().parents[2]
PACK_NAME = "ComfyUI-Step1X-Edit"
PACK_PARTS = ("__init__.py", "nodes", "step1x_core", "workflows", "subgraphs", "web", "locales", "pyproject.toml", "miniature/weights")


class ExecutionError(RuntimeError):
    """A prompt that ComfyUI refused or could not finish; `details` is what the host reported."""

    def __init__(self, message: str, details: dict):
        super().__init__(message)
        self.details = details


class ServerStopped(RuntimeError):
    """ComfyUI ended by itself; the message carries the end of its log where that is known."""

    def __init__(self, when: str = "", log: Path | None = None):
        tail = (
            f" The end of its log:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}"
            if log is not None
            else ""
        )
        super().__init__(f"ComfyUI stopped{when}.{tail}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def install_pack(base: Path) -> None:
    """Put a copy of this pack into the custom_nodes folder of a ComfyUI base directory."""
    target = base / "custom_nodes" / PACK_NAME
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for part in PACK_PARTS:
        source = PACK / part
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / part)


class ComfyServer:
    """Context manager: ComfyUI from `tree` with everything it writes below `base`; the log is `base`/server.log.

    extra_models: a models folder whose contents are offered beside those in `base`. keep_path: whether it gets this
    process's PYTHONPATH, where that is how its packages are found.
    """

    def __init__(
        self, tree: Path, base: Path, extra_models: Path | None = None, arguments: tuple[str, ...] = ("--cpu",),
        keep_path: bool = False,
    ):
        self.keep_path = keep_path
        self.tree = tree
        self.base = base
        self.arguments = [*arguments]
        if extra_models is not None:
            config = base / "extra_models.yaml"
            folders = ("diffusion_models", "unet", "text_encoders", "clip", "vae", "loras", "diffusers")
            # A JSON string is a YAML string, whatever is in it.
            lines = [
                f"    {name}: {json.dumps((extra_models / name).as_posix(), ensure_ascii=False)}"
                for name in folders
                if (extra_models / name).is_dir()
            ]
            config.write_text("\n".join(["step1x:", *lines]) if lines else "", encoding="utf-8")
            self.arguments += ["--extra-model-paths-config", str(config)] if lines else []
        self.log = base / "server.log"

    def __enter__(self) -> "ComfyServer":
        for folder in ("user", "input", "output", "models"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [
            sys.executable,
            "main.py",
            "--port",
            self.url.rsplit(":", 1)[1],
            "--base-directory",
            str(self.base),
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--database-url",
            f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}",
            *self.arguments,
        ]
        env = {k: v for k, v in os.environ.items() if self.keep_path or k != "PYTHONPATH"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=self.tree, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            asyncio.run(self._wait_until_ready())
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    async def _wait_until_ready(self, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise ServerStopped(" while starting", self.log)
                try:
                    async with session.get(f"{self.url}/system_stats") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.2)
        raise TimeoutError(
            f"ComfyUI did not answer within {seconds:.0f} s. The end of its log:\n{self.log_text()[-3000:]}"
        )

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Run:
    """What a finished prompt left behind. events: the websocket messages as (type, data); previews: number of preview pictures."""

    def __init__(self):
        self.events: list[tuple[str, dict]] = []
        self.previews = 0
        self.images: list[bytes] = []
        self.interrupted = False

    def progress(self, node: str) -> list[tuple[int, int]]:
        return [(d["value"], d["max"]) for kind, d in self.events if kind == "progress" and d["node"] == node]

    @property
    def executed(self) -> list[str]:
        """Nodes that really ran, i.e. were not cached."""
        return [d["node"] for kind, d in self.events if kind == "executing" and d["node"] is not None]


class Client:
    """Blocking calls to a ComfyUI at `url`. log: its log file where it is known, for error messages."""

    def __init__(self, url: str, log: Path | None = None):
        self.url = url
        self.log = log

    def get(self, path: str):
        async def call():
            async with aiohttp.ClientSession() as session, session.get(self.url + path) as response:
                response.raise_for_status()
                return await response.json(content_type=None)

        return asyncio.run(call())

    def get_text(self, path: str) -> str:
        async def call():
            async with aiohttp.ClientSession() as session, session.get(self.url + path) as response:
                response.raise_for_status()
                return await response.text()

        return asyncio.run(call())

    def post(self, path: str, content: dict) -> None:
        async def call():
            async with aiohttp.ClientSession() as session, session.post(self.url + path, json=content) as response:
                response.raise_for_status()

        asyncio.run(call())

    def free(self) -> None:
        """Unload all models and forget all results. ComfyUI does so between two prompts, at its leisure; a small prompt makes it certain for the next one."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        self.run(
            {
                "empty": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
                "show": {"class_type": "PreviewImage", "inputs": {"images": ["empty", 0]}},
            }
        )

    def upload_image(self, path: Path, name: str) -> None:
        async def call():
            form = aiohttp.FormData()
            form.add_field("image", path.read_bytes(), filename=name)
            form.add_field("overwrite", "true")
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{self.url}/upload/image", data=form) as response,
            ):
                response.raise_for_status()

        asyncio.run(call())

    def run(self, prompt: dict, on_progress=None, interrupt_at: int | None = None, timeout: float = 600) -> Run:
        """Queue a workflow in API form and wait for its end.

        on_progress: called with (node, value, max). interrupt_at: cancel when a node's progress reaches this value.
        Raises ExecutionError when the host refuses the prompt or a node fails, ServerStopped and TimeoutError.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._run(prompt, on_progress, interrupt_at), timeout))
        except asyncio.TimeoutError:  # noqa: UP041 - another class than TimeoutError in Python 3.10
            raise TimeoutError(f"ComfyUI did not finish within {timeout:.0f} s.") from None
        except aiohttp.ClientConnectionError:
            raise ServerStopped(log=self.log) from None

    async def _run(self, prompt, on_progress, interrupt_at) -> Run:
        run = Run()
        client_id = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client_id}", max_msg_size=0) as socket_,
        ):
            async with session.post(f"{self.url}/prompt", json={"prompt": prompt, "client_id": client_id}) as response:
                answer = await response.json()
                if response.status != 200:
                    raise ExecutionError(json.dumps(answer), answer)
            prompt_id = answer["prompt_id"]
            async for message in socket_:
                if message.type == aiohttp.WSMsgType.BINARY:
                    run.previews += 1
                    continue
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                if data.get("prompt_id", prompt_id) != prompt_id:
                    continue
                run.events.append((kind, data))
                if kind == "progress":
                    if on_progress is not None:
                        on_progress(data["node"], data["value"], data["max"])
                    if interrupt_at is not None and data["value"] >= interrupt_at:
                        interrupt_at = None
                        async with session.post(f"{self.url}/interrupt") as response:
                            response.raise_for_status()
                elif kind == "execution_error":
                    raise ExecutionError(f"{data['node_type']}: {data['exception_message']}", data)
                elif kind == "execution_interrupted":
                    run.interrupted = True
                elif kind == "executing" and data["node"] is None:
                    # The last message of a prompt, sent once its history is written.
                    break
            else:
                raise ServerStopped(log=self.log)
            if run.interrupted:
                return run
            async with session.get(f"{self.url}/history/{prompt_id}") as response:
                outputs = (await response.json())[prompt_id]["outputs"]
            for output in outputs.values():
                for image in output.get("images", []):
                    async with session.get(f"{self.url}/view", params=image) as response:
                        run.images.append(await response.read())
        return run


# Values the frontend keeps behind a seed widget; they are not inputs.
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")


def widget_inputs(definitions: dict, values: list, prefix: str = "") -> dict:
    """A node's widgets by the names of their inputs, those behind a choice as "choice.widget".

    values: as saved, in order; what is used is taken from the list.
    """
    inputs = {}
    for name, definition in definitions.items():
        kind, options = definition[0], definition[1] if len(definition) > 1 else {}
        if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"):
            inputs[prefix + name] = values.pop(0)
        if options.get("control_after_generate") and values and values[0] in AFTER_GENERATE:
            values.pop(0)
        if kind == "COMFY_DYNAMICCOMBO_V3":
            opened = next(option["inputs"] for option in options["options"] if option["key"] == inputs[prefix + name])
            nested = {**opened.get("required", {}), **opened.get("optional", {})}
            inputs |= widget_inputs(nested, values, f"{prefix}{name}.")
    return inputs


def to_api(workflow: dict, object_info: dict) -> dict:
    """A workflow as the editor saves it -> the form that /prompt takes. Notes are left out; muted nodes are not expected."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        info = object_info[node["type"]]
        definitions = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        inputs = widget_inputs(definitions, list(node.get("widgets_values", [])))
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                _, source, output = links[slot["link"]][:3]
                inputs[slot["name"]] = [str(source), output]
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return prompt


def find_nodes(prompt: dict, class_type: str) -> list[str]:
    return [node for node, content in prompt.items() if content["class_type"] == class_type]
