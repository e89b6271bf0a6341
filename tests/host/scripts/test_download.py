"""Downloads from a local server that imitates the model hubs."""

import email.utils
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import comfy.sd
import comfy.utils
import download
import filelock
import folder_paths
import hub
import hub_server
import pytest
import tiny_models
from conftest import PACK
from diffusers_layout import diffusers_repository, to_diffusers
from safetensors.torch import load_file

from step1x_core.host.checkpoints.folders import choices
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder, load_vae

pytestmark = pytest.mark.once

OFFICIAL, QWEN, V12 = "stepfun-ai/Step1X-Edit", "Comfy-Org/Qwen-Image_ComfyUI", "stepfun-ai/Step1X-Edit-v1p2"
IN_FP8, COMMUNITY = "meimeilook/Step1X-Edit-FP8", "someone/Community"
LORA = "lora/step1x-edit-lora-hands.safetensors"
FP8 = "Step1X-Edit-FP8.safetensors"
BLOCK = download.RECEIVED_CHUNK
ENDPOINTS = {"huggingface": "HF_ENDPOINT", "modelscope": "MODELSCOPE_DOMAIN"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def repositories(models, tmp_path_factory):
    """What the hubs hold: tiny models under the published names."""
    v11, vae = (models / "diffusion_models" / tiny_models.V11_FILE).read_bytes(), (models / "vae" / tiny_models.VAE_FILE).read_bytes()
    weights = to_diffusers(load_file(models / "diffusion_models" / tiny_models.V12_FILE))
    v12 = diffusers_repository(tmp_path_factory.mktemp("v12") / "repository", weights, "Step1XEditPipelineV1P2")
    for folder, name, content in (
        ("vae", "diffusion_pytorch_model.safetensors", vae),
        (".", "picture.png", b"PNG"),
        ("assets", "big.mp4", b"MP4"),
    ):
        (v12 / folder).mkdir(exist_ok=True)
        (v12 / folder / name).write_bytes(content)
    (v12 / "vae" / "config.json").write_text("{}")
    return {
        OFFICIAL: {tiny_models.V11_FILE: v11, "vae.safetensors": vae, LORA: v11[:2000], "README.md": b"# Step1X-Edit"},
        QWEN: {f"split_files/text_encoders/{tiny_models.MLLM_FILE}": (models / "text_encoders" / tiny_models.MLLM_FILE).read_bytes()},
        V12: files_of(v12),
        IN_FP8: {FP8: v11[:3000]},
        COMMUNITY: {FP8: v11[:4000]},
    }


@pytest.fixture
def server(repositories, monkeypatch):
    fake = hub_server.Hub()
    fake.repositories = repositories
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.01)
    with fake.serve() as url:
        for variable in ENDPOINTS.values():
            monkeypatch.setenv(variable, url)
        fake.url = url
        yield fake


def items(folder, *paths, repository=OFFICIAL, source="huggingface"):
    listed = {file.path: file for file in hub.list_files(source, repository)}
    return [download.Item(listed[path], folder / path) for path in paths]


def install(*arguments, base, check=True):
    """`python install.py` beside the real host with its models folder in `base`."""
    (base / "models").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(PACK / "install.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COMFYUI_FOLDERS_BASE_PATH": str(base)})
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("source", hub.SOURCES)
def test_one_command_brings_files_that_load(server, repositories, tmp_path, source):
    result = install("--download", "v1.1", "mllm", "vae", "vae", "lora", "--source", source, base=tmp_path)
    assert (
        f"Listing the files of {QWEN} on {source}" in result.stdout
        and "MB/s" in result.stdout
        and "All files are in place" in result.stdout
    )
    official, qwen = repositories[OFFICIAL], repositories[QWEN]
    assert files_of(tmp_path / "models") == {
        f"diffusion_models/{tiny_models.V11_FILE}": official[tiny_models.V11_FILE],
        "vae/ae.safetensors": official["vae.safetensors"],
        f"loras/{Path(LORA).name}": official[LORA],
        f"text_encoders/{tiny_models.MLLM_FILE}": qwen[f"split_files/text_encoders/{tiny_models.MLLM_FILE}"],
    }
    assert load_model(tmp_path / "models" / "diffusion_models" / tiny_models.V11_FILE).model.diffusion_model.version == "v1.1"
    load_text_encoder(tmp_path / "models" / "text_encoders" / tiny_models.MLLM_FILE)
    assert comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(tmp_path / "models" / "vae" / "ae.safetensors"))).latent_channels == 16

    server.requests.clear()
    def times():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*.safetensors")}

    before = times()
    install("--download", "v1.1", "mllm", "vae", "lora", "--source", source, base=tmp_path)
    assert not server.requests and times() == before and len(before) == 4


@pytest.mark.parametrize("source", hub.SOURCES)
def test_a_repository_becomes_a_folder_that_loads(server, repositories, tmp_path, source):
    install("--download", "v1.2", "--source", source, "--dir", str(tmp_path / "elsewhere"), base=tmp_path)
    folder = tmp_path / "elsewhere" / "Step1X-Edit-v1p2"
    assert files_of(folder) == {path: content for path, content in repositories[V12].items() if not path.endswith((".png", ".mp4"))}
    assert load_model(folder).model.diffusion_model.version == "v1.2"
    assert load_vae(folder).latent_channels == 16
    assert not files_of(tmp_path / "models")


def test_a_cut_connection_is_resumed_where_it_broke(server, repositories, tmp_path):
    name, content = tiny_models.V11_FILE, repositories[OFFICIAL][tiny_models.V11_FILE]
    server.faults[name] = [hub_server.cut(16 * BLOCK + 1), hub_server.cut(0), hub_server.cut(8 * BLOCK)]
    assert download.download([items(tmp_path, name)]) == []
    assert server.requests == [(name, 0), (name, 16 * BLOCK), (name, 16 * BLOCK), (name, 24 * BLOCK)]
    assert files_of(tmp_path) == {name: content}


def test_a_second_command_goes_on_where_the_first_gave_up(server, repositories, tmp_path):
    name, content = tiny_models.V11_FILE, repositories[OFFICIAL][tiny_models.V11_FILE]
    server.faults[name] = [hub_server.cut(16 * BLOCK), *[hub_server.status(503)] * hub.ATTEMPTS]
    assert "HTTP 503" in download.download([items(tmp_path, name)])[0]
    [(part, kept)] = files_of(tmp_path).items()
    assert part.endswith(".part") and kept == content[:16 * BLOCK]
    server.requests.clear()
    assert download.download([items(tmp_path, name)]) == []
    assert server.requests == [(name, 16 * BLOCK)] and files_of(tmp_path) == {name: content}


def test_a_part_of_another_version_of_the_file_is_not_continued(server, repositories, tmp_path):
    name = tiny_models.V11_FILE
    (tmp_path / f"{name}.00000000.part").write_bytes(b"older")
    assert download.download([items(tmp_path, name)]) == []
    assert server.requests == [(name, 0)] and files_of(tmp_path) == {name: repositories[OFFICIAL][name]}


def test_a_wrong_checksum_leaves_nothing(server, repositories, tmp_path):
    name = tiny_models.V11_FILE
    server.faults[name] = [hub_server.damaged]
    [sentence] = download.download([items(tmp_path, name, "README.md")[:1]])
    assert "has a wrong checksum and was deleted" in sentence and files_of(tmp_path) == {}
    assert download.download([items(tmp_path, name)]) == [] and (tmp_path / name).read_bytes() == repositories[OFFICIAL][name]


def test_a_wrong_resumed_part_is_noticed(server, tmp_path):
    [item] = items(tmp_path, tiny_models.V11_FILE)
    item.part.write_bytes(b"x" * 1000)
    assert "wrong checksum" in download.download([[item]])[0] and files_of(tmp_path) == {}


def test_files_without_lfs_are_checked_as_well(server, tmp_path):
    path = "transformer/config.json"
    server.faults[path] = [hub_server.damaged]
    assert "wrong checksum" in download.download([items(tmp_path, path, repository=V12)])[0] and files_of(tmp_path) == {}


def test_a_server_without_ranges_starts_over(server, repositories, tmp_path):
    name = tiny_models.V11_FILE
    server.faults[name] = [hub_server.cut(1000), hub_server.without_ranges(), hub_server.without_ranges()]
    assert download.download([items(tmp_path, name)]) == []
    assert files_of(tmp_path) == {name: repositories[OFFICIAL][name]}


def test_a_server_without_ranges_that_always_breaks_is_given_up(server, tmp_path):
    name = tiny_models.V11_FILE
    server.faults[name] = [hub_server.without_ranges(1000)] * 100
    assert "keeps failing" in download.download([items(tmp_path, name)])[0]
    assert len(server.requests) <= 2 * hub.ATTEMPTS


def test_a_page_instead_of_the_file_is_refused(server, tmp_path):
    name = tiny_models.V11_FILE
    server.faults[name] = [lambda handler, content, start: hub_server.reply(handler, 200, b"<html>Please log in</html>")]
    assert "proxy or a login page" in download.download([items(tmp_path, name)])[0]
    assert not any(path.endswith(".safetensors") for path in files_of(tmp_path))


class Waits(threading.Event):
    """Records how long it would have waited."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        return False


def test_busy_servers_are_asked_again_after_the_time_they_name(server):
    [item] = items(Path("."), tiny_models.V11_FILE)
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    waits = Waits()
    server.faults[tiny_models.V11_FILE] = [
        hub_server.status(429, Retry_After="7"),
        hub_server.status(503),
        hub_server.status(429, Retry_After=date),
        hub_server.status(500, Retry_After="soon"),
    ]
    with hub.get(item.file.url, waits) as response:
        assert response.status_code == 200
    assert waits.seconds == [7.0, 2 * hub.FIRST_WAIT, hub.LONGEST_WAIT, 8 * hub.FIRST_WAIT]


def test_a_server_that_never_recovers_is_given_up(server, tmp_path):
    name = tiny_models.V11_FILE
    server.faults[name] = [hub_server.status(502)] * 100
    [sentence] = download.download([items(tmp_path, name)])
    assert "HTTP 502" in sentence and "Rerun the command later" in sentence
    assert len(server.requests) == hub.ATTEMPTS and not any(path.endswith(".safetensors") for path in files_of(tmp_path))


def test_an_unreachable_hub_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(hub.HubError, match="http://127.0.0.1:9/api/models/.* cannot be read"):
        hub.list_files("huggingface", OFFICIAL)
    monkeypatch.setenv("HF_ENDPOINT", "not an address")
    with pytest.raises(hub.HubError, match="Check the hub's address"):
        hub.list_files("huggingface", OFFICIAL)


@pytest.mark.parametrize("source", hub.SOURCES)
def test_what_is_not_there_is_said_in_one_sentence(server, tmp_path, source):
    with pytest.raises(hub.NotOnHub, match=f"{source} has no public repository no/where. Name another one with --repo"):
        hub.list_files(source, "no/where")
    found = items(tmp_path, tiny_models.V11_FILE, source=source)
    server.faults[tiny_models.V11_FILE] = [hub_server.status(404)]
    assert "does not exist or is not public (HTTP 404)" in download.download([found])[0]
    result = install("--download", "v1.0", "fp8", "--source", source, "--repo", OFFICIAL, base=tmp_path, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for title in ("Step1X-Edit v1.0", "Step1X-Edit in fp8"):
        [line] = [line for line in result.stderr.splitlines() if f"does not contain the files of {title}; " in line]
        assert tiny_models.V11_FILE in line and "--repo" in line


@pytest.mark.parametrize("repository, options", [(IN_FP8, []), (COMMUNITY, ["--repo", COMMUNITY])], ids=["usual", "named"])
def test_a_community_file_comes_from_the_usual_or_a_named_repository(server, repositories, tmp_path, repository, options):
    install("--download", "fp8", *options, base=tmp_path)
    assert files_of(tmp_path / "models") == {f"diffusion_models/{FP8}": repositories[repository][FP8]}


def test_a_full_disk_is_noticed_before_anything_is_transferred(server, tmp_path):
    server.sizes[tiny_models.V11_FILE] = 10**16
    result = install("--download", "v1.1", "vae", base=tmp_path, check=False)
    assert result.returncode == 1 and "10000000.01 GB to download" in result.stderr and "--dir" in result.stderr
    assert not server.requests and not files_of(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    result = install("--download", "vae", "--dir", str(tmp_path / "file" / "models"), base=tmp_path, check=False)
    assert (
        result.returncode == 1
        and f"The folder {tmp_path / 'file' / 'models'} cannot be created" in result.stderr
        and "--dir" in result.stderr
    )
    assert not server.requests and (tmp_path / "file").read_bytes() == b"mine"


def test_a_host_that_does_not_tell_its_folders_is_named(tmp_path):
    root = tmp_path / "ComfyUI"
    (root / "comfy").mkdir(parents=True)
    (root / "comfy" / "cli_args.py").write_text("args = None")
    (root / "folder_paths.py").write_text("raise ValueError('no\\nfolders')")
    result = subprocess.run([sys.executable, str(PACK / "install.py"), "--download", "vae"], capture_output=True, text=True,
                            env={k: v for k, v in os.environ.items() if k != "COMFYUI_FOLDERS_BASE_PATH"} | {"STEP1X_COMFYUI": str(root)})
    assert result.returncode == 1 and result.stdout == ""
    assert (
        result.stderr
        == "The models folders of ComfyUI cannot be read (no folders). Correct its extra_model_paths.yaml, or name a folder with --dir.\n"
    )


def test_progress_tells_speed_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(download.time, "monotonic", lambda: now[0])
    progress = download.Progress(total=1_000_000_000)
    progress.add(200_000_000)  # was there before
    now[0] += 2
    assert progress.line() == "0.20 GB of 1.00 GB, 0.0 MB/s"
    progress.add(40_000_000, received=True)
    now[0] += 2
    assert progress.line() == "0.24 GB of 1.00 GB, 10.0 MB/s, 1 min 16 s left"
    now[0] += 2 * download.SPEED_WINDOW
    progress.line()
    now[0] += 1
    progress.add(30_000_000, received=True)
    assert progress.line() == "0.27 GB of 1.00 GB, 30.0 MB/s, 0 min 24 s left"


def test_files_arrive_at_the_same_time(server, repositories, tmp_path):
    """Neither answer is sent before the other file has been asked for."""
    together = threading.Barrier(2, timeout=60)

    def action(handler, content, start):
        together.wait()
        hub_server.send(handler, content, start)

    names = (tiny_models.V11_FILE, "vae.safetensors")
    server.faults = {name: [action] for name in names}
    assert download.download([[item] for item in items(tmp_path, *names)]) == []
    assert files_of(tmp_path) == {name: repositories[OFFICIAL][name] for name in names}


def test_one_failure_does_not_cost_the_other_files(server, tmp_path):
    names = (tiny_models.V11_FILE, "vae.safetensors")
    server.faults[names[0]] = [hub_server.damaged]
    assert len(download.download([[item] for item in items(tmp_path, *names)])) == 1
    assert list(files_of(tmp_path)) == ["vae.safetensors"]


def test_a_file_of_the_users_own_is_never_overwritten(server, repositories, tmp_path):
    (tmp_path / "models" / "vae").mkdir(parents=True)
    own = tmp_path / "models" / "vae" / "ae.safetensors"
    for content in (b"mine", bytes(len(repositories[OFFICIAL]["vae.safetensors"]))):
        own.write_bytes(content)
        result = install("--download", "vae", base=tmp_path, check=False)
        assert result.returncode == 1 and f"{own} already exists, but differs from" in result.stderr and own.read_bytes() == content
    assert not server.requests


def test_a_file_in_another_folder_of_the_host_is_not_downloaded_again(server, repositories, tmp_path):
    (tmp_path / "models" / "clip").mkdir(parents=True)
    (tmp_path / "models" / "clip" / tiny_models.MLLM_FILE).write_bytes(
        repositories[QWEN][f"split_files/text_encoders/{tiny_models.MLLM_FILE}"]
    )
    install("--download", "mllm", base=tmp_path)
    assert not server.requests and list(files_of(tmp_path)) == [f"models/clip/{tiny_models.MLLM_FILE}"]


def test_two_downloads_of_one_file_do_not_mix(server, repositories, tmp_path):
    found = items(tmp_path, tiny_models.V11_FILE)
    with filelock.FileLock(str(found[0].beside("lock"))), pytest.raises(hub.HubError, match="is already being downloaded"):
        download.download([found])
    assert not server.requests
    assert download.download([found]) == [] and files_of(tmp_path) == {tiny_models.V11_FILE: repositories[OFFICIAL][tiny_models.V11_FILE]}


@pytest.mark.parametrize(
    "path",
    [
        "../evil.safetensors",
        "/etc/evil.safetensors",
        "a/../../evil.safetensors",
        "a\\..\\evil.safetensors",
        "C:evil.safetensors",
    ],
)
def test_names_that_lead_outside_are_refused(server, monkeypatch, path):
    monkeypatch.setitem(server.repositories, "evil/names", {path: b"x"})
    for source in hub.SOURCES:
        with pytest.raises(hub.HubError, match="a path outside its folder"):
            hub.list_files(source, "evil/names")


def test_a_hub_without_checksums_is_not_trusted(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_server.hashlib, "sha256", lambda content: hub_server.hashlib.new("md5", content))
    assert "provides no checksum" in download.download([items(tmp_path, tiny_models.V11_FILE, source="modelscope")])[0]
    assert not server.requests


@pytest.fixture
def model_folders(tmp_path, monkeypatch):
    """The host looks into folders of this test only."""
    for name in ("diffusion_models", "diffusers", "vae", "text_encoders"):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def offered():
    return {**choices("diffusion_models", "transformer"), **choices("vae", "vae"), **choices("text_encoders", "text_encoder")}


def test_no_loader_sees_a_file_before_it_is_whole(server, model_folders):
    reached, go_on = threading.Event(), threading.Event()
    server.faults[tiny_models.V11_FILE] = [hub_server.pause(1_000_000, reached, go_on)]
    results = []
    found = items(model_folders / "diffusion_models", tiny_models.V11_FILE)
    thread = threading.Thread(target=lambda: results.append(download.download([found])))
    thread.start()
    assert reached.wait(60) and offered() == {}
    assert not any(folder_paths.get_filename_list(name) for name in ("diffusion_models", "vae"))
    go_on.set()
    thread.join(60)
    assert results == [[]] and list(offered()) == [tiny_models.V11_FILE]


def test_no_loader_sees_a_folder_before_all_of_its_files_are_there(server, repositories, model_folders, monkeypatch):
    folder = model_folders / "diffusers" / "Step1X-Edit-v1p2"
    paths = [path for path in repositories[V12] if path.endswith((".json", ".safetensors"))]
    group = items(folder, *paths, repository=V12)
    shard = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
    server.faults[shard] = [hub_server.damaged]
    assert len(download.download([group])) == 1
    left = files_of(folder)
    assert offered() == {} and len(left) == len(paths) - 1 and all(path.endswith(".ready") for path in left)

    server.requests.clear()
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (seen.append(set(offered())), replace(source, target)))
    assert download.download([group]) == []
    assert server.requests == [(shard, 0)]
    # While the names are given nothing is offered that is not whole.
    assert seen[0] == set() and all(
        not names or set(files_of(folder)) >= {path for path in paths if path.endswith(".safetensors")}
        for names in seen
    )
    assert offered() == {"Step1X-Edit-v1p2/": str(folder)} and set(files_of(folder)) == set(paths)


SIGNALS = [signal.SIGTERM, *([] if sys.platform == "win32" else [signal.SIGINT])]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_cancelled_command_can_be_resumed(server, repositories, tmp_path, number):
    reached, go_on = threading.Event(), threading.Event()
    name, content = tiny_models.V11_FILE, repositories[OFFICIAL][tiny_models.V11_FILE]
    server.faults[name] = [hub_server.pause(2_000_000, reached, go_on)]
    # Background jobs of a shell ignore SIGINT.
    code = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.argv = sys.argv[1:]; {code}",
        str(PACK / "install.py"),
        "--download",
        "v1.1",
        "--dir",
        str(tmp_path),
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    [item] = items(tmp_path, name)
    try:
        assert reached.wait(120)
        while not item.part.exists() or not item.part.stat().st_size:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(number)
        go_on.set()
        output, _ = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode != 0 and "Traceback" not in output
    [(part, kept)] = [(path, data) for path, data in files_of(tmp_path).items() if not path.endswith(".lock")]
    assert part == item.part.name and 0 < len(kept) <= len(content) and content.startswith(kept)
    assert download.download([[item]]) == [] and (tmp_path / name).read_bytes() == content
    assert server.requests[1:] in ([(name, len(kept))], []) and files_of(tmp_path) == {name: content}
