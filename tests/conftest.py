"""The tests run in a ComfyUI source tree named by STEP1X_COMFYUI, those in pure/ without any; scripts/test.py sets it up and runs both."""

import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

PACK = Path(__file__).absolute().parent.parent
TESTS = PACK / "tests"
# The parts of the suite are its folders, to be run by path or with `-m`. pure/ needs no ComfyUI and runs once, the others in every ComfyUI.
PARTS = ("pure", "host", "parity", "server", "stress")
# A further ComfyUI runs one of so many cases of a test, and of the tests of a file that have one case each: what differs between releases is the
# way in and out of the host, which many tests share.
SAMPLED = {"host": 4}
SAMPLED_TESTS = {"host": 2}

# The fixtures stop what they started when the tests are terminated, too.
signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))
# The servers that tests start are on this machine, whatever proxy a developer has.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"

# Tests may use what another one has: every folder with tests is searched.
sys.path += [str(PACK / folder) for folder in ("scripts/support", "scripts", "scripts/dev", "tests/support")]
sys.path += sorted({str(path.parent) for path in TESTS.rglob("test_*.py")})


def part_of(path: Path) -> str:
    """The part that a file of the suite is in. One that lies in no folder is taken for "host", and test_parts.py tells."""
    folder = path.relative_to(TESTS).parts[0]
    return folder if folder in PARTS else "host"


class Absent:
    """Makes modules unimportable, as on a system that lacks them."""

    def __init__(self, *packages: str):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(
                f"No module named {name!r}: tests/pure runs without ComfyUI and Triton. What needs them belongs to tests/host.",
                name=name,
            )


def is_pure(config) -> bool:
    """Whether nothing but tests of tests/pure is asked for."""
    asked = [Path(config.invocation_params.dir, argument.split("::")[0]).absolute() for argument in config.args]
    return bool(asked) and all(path.is_relative_to(TESTS / "pure") for path in asked)


def pytest_configure(config):
    """Before any test is imported: the host, or the lack of it."""
    if is_pure(config):
        sys.path.append(str(PACK))
        sys.meta_path.insert(0, Absent("comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "execution", "server", "triton"))
        return
    if "STEP1X_COMFYUI" not in os.environ:
        pytest.exit("STEP1X_COMFYUI does not name a ComfyUI folder. Run the tests with: python scripts/test.py", returncode=2)
    import environment

    environment.use_host_in_process()
    import comfy.utils
    import utils.extra_config  # noqa: F401  (as main.py: the host's `nodes` puts a folder with another utils in front)

    comfy.utils.set_progress_bar_enabled(False)


def pytest_addoption(parser):
    parser.addoption(
        "--random-order",
        metavar="SEED",
        type=int,
        help="run the files, and the tests within each, in an order drawn from SEED",
    )
    parser.addoption(
        "--once-elsewhere",
        action="store_true",
        help="another ComfyUI has all tests: leave out those marked `once`, and all but one of n cases of the others in tests/host and of those marked `sampled(n)`",
    )


def in_random_order(items: list, seed: int) -> list:
    """The items with their files, and those of each file, in an order that the seed decides. A file stays together, since its fixtures start servers."""
    draw = random.Random(seed)
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = sorted(files)
    draw.shuffle(order)
    return [item for path in order for item in draw.sample(files[path], len(files[path]))]


def elsewhere(items: list) -> list:
    """Those that another ComfyUI runs: all marked `once`, and of a test with many cases all but one of every n, as `sampled(n)` says or `SAMPLED` for
    its part. Which one changes from n cases to the next, so that each value of every parameter has its turn. `SAMPLED_TESTS` does the same for the
    tests of a file that have one case, unless they are marked `everywhere`."""
    numbers, found = Counter(), []
    for item in items:
        part, sampled = part_of(item.path), item.get_closest_marker("sampled")
        many = hasattr(item, "callspec")
        every = sampled.args[0] if sampled else (SAMPLED if many else SAMPLED_TESTS).get(part, 1)
        if item.get_closest_marker("once"):
            found.append(item)
        elif not item.get_closest_marker("everywhere"):
            family = (item.path, item.originalname if many else None)
            number, numbers[family] = numbers[family], numbers[family] + 1
            found += [item] if (number + number // every) % every else []
    return found


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(part_of(item.path))
    if config.getoption("--once-elsewhere"):
        left_out = elsewhere(items)
        config.hook.pytest_deselected(items=left_out)
        gone = {*map(id, left_out)}
        items[:] = [item for item in items if id(item) not in gone]
    seed = config.getoption("--random-order")
    if seed is not None:
        items[:] = in_random_order(items, seed)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A models folder with tiny checkpoints of v1.0 and v1.1, a language model and a VAE. Not to be changed by tests."""
    import tiny_models

    folder = tmp_path_factory.mktemp("models")
    tiny_models.write_all(folder)
    return folder


@pytest.fixture(scope="session")
def photo():
    """The sample photograph as the host's IMAGE: [1, 400, 600, 3] in 0..1."""
    import numpy as np
    import torch
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(PACK / "assets" / "coffee.jpg"))).float()[None] / 255


@pytest.fixture(scope="session")
def clip(models):
    import tiny_models

    from step1x_core.host.checkpoints.loading import load_text_encoder

    return load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE)


@pytest.fixture(scope="session")
def clip_v12(models):
    import tiny_models

    from step1x_core.host.checkpoints.loading import load_text_encoder

    return load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2")


@pytest.fixture(scope="session")
def vae(models):
    import comfy.sd
    import tiny_models

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(models / "vae" / tiny_models.VAE_FILE)))


@pytest.fixture(scope="session")
def model(models):
    import tiny_models

    from step1x_core.host.checkpoints.loading import load_model

    return load_model(models / "diffusion_models" / tiny_models.V11_FILE)


@pytest.fixture(scope="session")
def float_file(tmp_path_factory):
    """The tiny language model in float32."""
    import tiny_models
    import torch

    path = tmp_path_factory.mktemp("mllm") / "float.safetensors"
    tiny_models.write_mllm(path, dtype=torch.float32)
    return path


@pytest.fixture(scope="session")
def model_weights(models):
    """The tensors of the tiny v1.1 in bfloat16."""
    import tiny_models
    from safetensors.torch import load_file

    return {k: v.bfloat16() for k, v in load_file(models / "diffusion_models" / tiny_models.V11_FILE).items()}


@pytest.fixture(scope="session")
def mllm_weights(float_file):
    """The tensors of the tiny language model in bfloat16."""
    from safetensors.torch import load_file

    return {k: v.bfloat16() for k, v in load_file(float_file).items()}


@pytest.fixture(scope="session")
def transformers_model(float_file):
    """Hugging Face's own Qwen2.5-VL with the same weights, without its head."""
    import tiny_models
    from safetensors.torch import load_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    text = {k: v for k, v in tiny_models.TINY_MLLM.items() if k != "vision_config"}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=tiny_models.TINY_MLLM["vision_config"],
        image_token_id=151655,
        vision_start_token_id=151652,
    )
    model = Qwen2_5_VLModel(config).eval().float()
    weights = {k.replace("model.", "language_model.", 1): v for k, v in load_file(float_file).items() if not k.startswith("lm_head")}
    model.load_state_dict(weights, strict=True)
    return model


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory):
    """A client of a ComfyUI server with the shipped miniature model, one for all files of tests/server."""
    from demo_host import demo_client

    with demo_client(tmp_path_factory.mktemp("demo")) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory):
    """A ComfyUI server with tiny models whose replies end soon, assets/coffee.jpg as an input, and previews; one for all files of tests/server.

    Tests may add models, inputs and outputs under names of their own.
    """
    import tiny_models
    from comfy_server import Client, ComfyServer, install_pack

    base = tmp_path_factory.mktemp("tiny")
    tiny_models.write_all(base / "models", terse=True)
    install_pack(base)
    with ComfyServer(Path(os.environ["STEP1X_COMFYUI"]), base, arguments=("--cpu", "--preview-method", "latent2rgb")) as server:
        Client(server.url).upload_image(PACK / "assets" / "coffee.jpg", "coffee.jpg")
        yield server


@pytest.fixture
def shown(monkeypatch):
    """What the editor is sent, as (node, text)."""
    texts = []
    instance = SimpleNamespace(send_progress_text=lambda text, node_id: texts.append((node_id, text)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    return texts
