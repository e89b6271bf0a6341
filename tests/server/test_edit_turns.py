"""Edits in turns: a further line or another turn to show costs no edit that was made before."""

import io
from urllib.request import Request, urlopen

import numpy as np
import pytest
from comfy_server import ExecutionError, find_nodes
from demo_host import demo_prompt, edit, load_demo, to_image, to_pixels
from PIL import Image

from miniature.edits import invert
from miniature.scenes import judge, pair_at

NODE = "Step1XEditBatchImages"
PAIR = pair_at(5, 5, "heldout", kind="recolour", language="en")
INVERT, TINT = "invert all colors", "make the background light green"


@pytest.fixture(scope="module")
def client(demo_server, tmp_path_factory):
    path = tmp_path_factory.mktemp("turns") / "turns.png"
    Image.fromarray(PAIR.source).save(path)
    demo_server.upload_image(path, path.name)
    return demo_server


def prompt_of(client, lines, **changes):
    changes = {"prompts": "\n".join(lines), **changes}
    return demo_prompt(client, "step1x_edit_in_turns.json", LoadImage={"image": "turns.png"}, **{NODE: changes})


def picture_of(run):
    image, = run.images
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def sampled(run):
    """The numbers of the turns that were sampled."""
    return [int(node.split("turn_")[1].removesuffix("_sampler")) for node in run.executed if node.endswith("_sampler")]


def report_of(run, prompt):
    node, = find_nodes(prompt, "PreviewAny")
    return next(data["output"]["text"][0] for kind, data in run.events if kind == "executed" and data["node"] == node)


def test_only_the_new_turn_is_sampled_and_going_back_samples_nothing(client):
    """The whole use of the node, as one test, because each run needs the results of the ones before."""
    lines = ["# colours", PAIR.instruction, "", INVERT]
    runs = [client.run(prompt_of(client, lines[:count])) for count in (2, 4)]
    one, two = map(picture_of, runs)
    assert [sampled(run) for run in runs] == [[1], [2]]
    assert judge(PAIR, one).success and np.abs(two.astype(int) - invert(PAIR.target)).mean() < 12

    prompt = prompt_of(client, lines, show_turn=1)
    back = client.run(prompt)
    assert np.array_equal(picture_of(back), one) and not sampled(back)
    assert report_of(back, prompt) == f'''Turn 1 of 2 shown.
1. seed 42, "{PAIR.instruction}"
2. seed 43, "{INVERT}": not shown'''
    # The host kept the turn that was not shown.
    assert not sampled(client.run(prompt_of(client, lines)))
    # Another last line costs its own turn, and of three lines only the shown one is computed.
    assert sampled(client.run(prompt_of(client, [*lines[:3], TINT, INVERT], show_turn=2))) == [2]


@pytest.mark.once
def test_a_turn_is_the_single_edit_of_the_latent_before_with_the_next_seed(client):
    demo, source = load_demo(), to_image(PAIR.source)
    first, latent = edit(demo, source, PAIR.instruction, 7)
    second, _ = edit(demo, first, INVERT, 8, latent)
    run = client.run(prompt_of(client, [PAIR.instruction, INVERT], seed=7))
    # Another process, whose threads may share the sums out otherwise.
    assert np.abs(picture_of(run).astype(int) - to_pixels(second)).max() <= 1


@pytest.mark.once
def test_cancel_keeps_the_finished_turns(client):
    prompt = prompt_of(client, [PAIR.instruction, INVERT], seed=11)

    def cancel_in_the_second(node, value, most):
        if node.endswith("turn_2_sampler") and value == 1:
            urlopen(Request(f"{client.url}/interrupt", method="POST")).close()

    cancelled = client.run(prompt, on_progress=cancel_in_the_second)
    assert cancelled.interrupted and not cancelled.images and sampled(cancelled) == [1, 2]
    resumed = client.run(prompt)
    assert sampled(resumed) == [2] and resumed.images


@pytest.mark.once
def test_a_turn_that_does_not_exist_is_refused(client):
    with pytest.raises(ExecutionError, match="'show_turn' is 3, but 'prompts' has 1 turn"):
        client.run(prompt_of(client, [INVERT, "// " + TINT], show_turn=3))
