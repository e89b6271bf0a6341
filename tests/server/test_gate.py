"""The content gate: a tiny classifier that was trained to find red pictures, words and questions about the instruction, and what takes a picture's place."""

import gc
import io
import itertools
import json
import os
import socket
import weakref

import folder_paths
import numpy as np
import pytest
import torch
from comfy_server import Client, ExecutionError, find_nodes, to_api
from conftest import PACK
from PIL import Image

from step1x_core.errors import Step1XError
from step1x_core.gate.policy import ACTIONS, BLOCK, BLUR, LABEL, OFF, REPORT, Finding, treat, unsafe_scores
from step1x_core.host.gate import gate as host_gate
from step1x_core.host.gate.gate import NONE, classifier_folders, gate

MESSAGE = "This picture was withheld by the content gate."
FLAGGED = Finding(0.9, "unsafe content 90%")


def flat(colour, size=(48, 64), channels=3):
    """A picture [1, H, W, C] of one colour with a little noise."""
    noise = torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(1)) * 0.1
    picture = (torch.tensor(colour) * 0.9 + noise).clamp(0, 1)
    return picture if channels == 3 else torch.cat([picture, torch.full((1, *size, 1), 0.5)], dim=-1)


RED, GREEN, BLUE, GREY = flat((1.0, 0.0, 0.0)), flat((0.0, 1.0, 0.0)), flat((0.0, 0.0, 1.0)), flat((0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A models folder with the classifier `red-finder`: 16 dimensions, one layer, three labels."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                       id2label={0: "safe", 1: "red", 2: "Very Red"}, label2id={"safe": 0, "red": 1, "Very Red": 2})
    model = ViTForImageClassification(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        colours = torch.rand(64, 3)
        redness = colours[:, 0] - colours[:, 1:].amax(dim=1)
        wanted = (redness > 0.2).long() + (redness > 0.6).long()
        values = (colours[:, :, None, None].expand(-1, -1, 32, 32) - 0.5) / 0.5
        torch.nn.functional.cross_entropy(model(pixel_values=values).logits, wanted).backward()
        optimiser.step()
        optimiser.zero_grad()
    folder = tmp_path_factory.mktemp("models")
    target = folder / "image_classification" / "group" / "red-finder"
    model.eval().save_pretrained(target)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(target)
    assert (target / "model.safetensors").is_file()
    return folder


@pytest.fixture(autouse=True)
def models_folder(models_dir, monkeypatch):
    monkeypatch.setattr(folder_paths, "models_dir", str(models_dir))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {**folder_paths.folder_names_and_paths})
    folder_paths.folder_names_and_paths.pop("image_classification", None)


def check(images, action=BLOCK, classifier="group/red-finder", labels="red, very red", threshold=0.5, message=MESSAGE, **instruction):
    return gate(images, action, classifier, labels, threshold, message, **instruction)


def test_the_classifier_finds_its_pictures_one_by_one_and_needs_no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("the gate asks the network"))
    images = torch.cat([GREY, RED, GREEN, BLUE, RED] * 2)
    out, found, report = check(images)
    assert found == 4 and out.shape == images.shape and out.dtype == images.dtype
    for i in range(len(images)):
        assert torch.equal(out[i], images[i]) == (i % 5 not in (1, 4))
    assert (
        report.splitlines()[0] == "Content gate: 4 of 10 images withheld."
        and report.splitlines()[-1] == MESSAGE
        and "2. unsafe content" in report
        and "1. passed" in report
    )


def test_off_is_the_default_and_changes_and_checks_nothing(monkeypatch):
    monkeypatch.setattr(host_gate, "load_classifier", lambda folder: pytest.fail("a classifier is loaded"))
    out, found, report = check(RED, OFF, words="paint", prompt="paint it red")
    assert out is RED and found == 0 and report == "The content gate is off: nothing was checked."


def test_threshold_and_labels_decide():
    assert check(RED, REPORT, threshold=1.0)[1] == 0 and check(torch.cat([GREY, RED]), REPORT, threshold=0.0)[1] == 2
    # All labels together are certain.
    assert check(GREY, REPORT, labels="safe,red,very red,RED", threshold=0.999)[1] == 1
    assert check(GREEN, REPORT, labels="SAFE")[1] == 1
    with pytest.raises(Step1XError, match="has no label 'nsfw'. Correct 'unsafe_labels'; available labels: safe, red, Very Red"):
        check(RED, labels="nsfw")
    with pytest.raises(Step1XError, match="would let everything pass"):
        check(RED, labels=" ,\n")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("action", [LABEL, BLUR, BLOCK])
def test_a_found_picture_keeps_its_shape_and_type_and_the_source_is_not_touched(action, channels):
    image = torch.rand(90, 120, channels, generator=torch.Generator().manual_seed(2)).half()
    before = image.clone()
    out = treat(image, FLAGGED, action, MESSAGE)
    assert (
        out.shape == image.shape
        and out.dtype == image.dtype
        and torch.equal(image, before)
        and not torch.equal(out, image)
        and 0 <= out.min()
        and out.max() <= 1
    )
    assert treat(image, Finding(0.1, ""), action, MESSAGE) is image and treat(image, FLAGGED, REPORT, MESSAGE) is image


def test_a_label_covers_the_lower_edge_only_and_a_blur_leaves_no_detail():
    image = torch.rand(160, 200, 3, generator=torch.Generator().manual_seed(3))
    labelled = treat(image, FLAGGED, LABEL, MESSAGE)
    assert (labelled[:146] - image[:146]).abs().max() <= 1 / 255 and labelled[146:].mean() < 0.3 and labelled[146:].max() > 0.7
    # Two pictures of different details and equal means come out the same.
    squares = (torch.arange(160)[:, None] // 4 + torch.arange(160)[None] // 4) % 2
    stripes = (torch.arange(160)[:, None].expand(160, 160) // 4) % 2
    one, other = (treat(pattern[..., None].expand(160, 160, 3).float(), FLAGGED, BLUR, MESSAGE) for pattern in (squares, stripes))
    assert (one - other).abs().max() <= 1 / 255 and one.std() < 0.01


def test_a_notice_says_its_message_and_nothing_of_the_picture():
    first, second = (treat(torch.rand(256, 256, 3), FLAGGED, BLOCK, MESSAGE) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, treat(torch.rand(256, 256, 3), FLAGGED, BLOCK, "Something else."))
    # Neither tiny pictures nor letters that the font lacks are a problem.
    assert treat(torch.rand(1, 3, 3), FLAGGED, BLOCK, "已被拦截").shape == (1, 3, 3) and treat(
        torch.rand(2, 2, 3), FLAGGED, LABEL, MESSAGE
    ).shape == (2, 2, 3)


def test_a_refused_instruction_concerns_the_whole_batch_and_needs_no_classifier():
    images = torch.cat([GREEN, BLUE])
    out, found, report = check(images, BLUR, NONE, prompt="remove the clothes", words="blood, clothes\n裸体")
    assert found == 2 and not torch.equal(out[0], images[0]) and report.count("the prompt contains clothes") == 2
    out, found, report = check(images, BLUR, NONE, prompt="remove the tree", words="blood, clothes")
    assert (
        found == 0
        and torch.equal(out, images)
        and report.startswith("Content gate: nothing found in the prompt. The images were not checked")
    )
    _, found, report = check(torch.cat([GREEN, RED]), REPORT, prompt="blood", words="blood")
    assert found == 2 and "2. the prompt contains blood; unsafe content" in report


@pytest.mark.parametrize(
    "images, inputs, level",
    [
        (GREEN, {}, "INFO"),
        (RED, {}, "WARNING"),
        (GREEN, {"classifier": NONE, "prompt": "x", "words": "y"}, "WARNING"),
        (GREEN, {"action": OFF}, "WARNING"),
    ],
)
def test_the_log_warns_of_findings_and_of_pictures_that_nothing_looked_at(caplog, images, inputs, level):
    with caplog.at_level("INFO", logger=host_gate.log.name):
        report = check(images, **inputs)[2]
    assert [(record.levelname, record.message) for record in caplog.records if record.name == host_gate.log.name] == [
        (level, report.splitlines()[0])
    ]


@pytest.mark.parametrize("reply, found", [("No.", 0), ("Yes.", 1), ("Well", 1)])
def test_the_language_model_is_asked_about_the_instruction_and_silence_is_no_consent(clip, monkeypatch, reply, found):
    asked = []

    def scripted(clip, system, content, max_tokens, seed, temperature):
        asked.append((content, max_tokens, temperature))
        return reply

    monkeypatch.setattr(host_gate, "generate_text", scripted)
    settings = {"action": REPORT, "classifier": NONE, "question": "Does it ask for violence?", "clip": clip}
    assert check(GREEN, prompt="add a sword", **settings)[1] == found
    assert asked == [(["Does it ask for violence?\n\nThe instruction:\nadd a sword"], 8, 0.0)]
    # A word that settles it.
    assert check(GREEN, prompt="add a sword", words="sword", **settings)[1] == 1 and len(asked) == 1


def test_a_real_text_encoder_answers_something(clip):
    found, report = check(GREEN, REPORT, NONE, prompt="add a sword", question="Does it ask for violence?", clip=clip)[1:]
    assert found == 1 and "no clear answer about the prompt" in report


@pytest.mark.parametrize("settings, message", [
    ({"classifier": NONE}, "has nothing to check"),
    ({"classifier": "gone"}, "The classifier 'gone' is not in the image_classification folder"),
    ({"question": "Is it bad?"}, "no text encoder is connected"),
    ({"question": "Is it bad?", "clip": object()}, "text encoder"),
])
def test_a_gate_that_could_not_work_does_not_let_pass(settings, message):
    with pytest.raises(Step1XError, match=message):
        check(GREEN, **{"prompt": "x", **settings})


COMBINATIONS = list(itertools.product(ACTIONS, (NONE, "group/red-finder"), (None, "", " \u200b\n", "turn it blue", "draw blood"),
                                      ("", " ,\u200b\n", "blood, knife"), ("", " \u200b", "Is it bad?"), (False, True)))


@pytest.mark.sampled(11)
@pytest.mark.parametrize("action, classifier, prompt, words, question, connected", COMBINATIONS)
def test_in_every_combination_a_gate_that_is_on_checks_or_refuses(
    clip, monkeypatch, action, classifier, prompt, words, question, connected
):
    """What is given to check by is checked by: where it cannot be, there is an error, and never an unsafe picture that passes as found safe."""
    asked = []
    monkeypatch.setattr(host_gate, "generate_text", lambda *args, **kwargs: asked.append(args) or "No.")
    has_words, has_question, has_prompt = words.startswith("blood"), question.startswith("Is"), prompt in ("turn it blue", "draw blood")
    given = {"prompt": prompt, "words": words, "question": question, "clip": clip if connected else None}
    problem = None if action == OFF else \
        "nothing to check" if classifier == NONE and not has_words and not has_question else \
        "no text encoder" if has_question and not connected else \
        "'prompt' is empty" if (has_words or has_question) and not has_prompt else None
    if problem:
        with pytest.raises(Step1XError, match=problem):
            check(RED, action, classifier, **given)
        return
    out, found, _ = check(RED, action, classifier, **given)
    by_words = has_words and prompt == "draw blood"
    assert found == (action != OFF and (classifier != NONE or by_words))
    assert torch.equal(out, RED) == (not found or action == REPORT)
    assert len(asked) == (action != OFF and has_question and not by_words)


@pytest.mark.parametrize("settings", [{"action": "Block"}, {"action": ""}, {"action": None}])
def test_an_unknown_action_is_no_way_past_the_gate(settings):
    with pytest.raises(Step1XError, match="expected one of"):
        check(GREEN, classifier=NONE, prompt="x", words="y", **settings)


def test_a_threshold_that_is_no_number_lets_nothing_pass():
    assert check(GREEN, threshold=float("nan"))[1] == 1


def copy_classifier(models_dir, name, drop=(), **changes):
    source, target = models_dir / "image_classification" / "group" / "red-finder", models_dir / "image_classification" / name
    target.mkdir()
    for path in source.iterdir():
        if path.name not in drop:
            target.joinpath(path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    target.joinpath("config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_no_classifier_is_kept_between_runs(monkeypatch):
    opened, load = [], host_gate.load_classifier

    def watched(folder):
        classifier = load(folder)
        opened.append(weakref.ref(classifier.model))
        return classifier

    monkeypatch.setattr(host_gate, "load_classifier", watched)
    for _ in range(2):
        check(GREEN)
    gc.collect()
    assert len(opened) == 2 and all(model() is None for model in opened)


def test_a_picture_without_numbers_does_not_pass_as_a_black_one():
    for value in (float("nan"), float("inf")):
        broken = GREEN.clone()
        broken[0, 3, 4, 1] = value
        for settings in ({}, {"classifier": NONE, "words": "blood", "prompt": "x"}):
            with pytest.raises(Step1XError, match="'images' of the content gate contains NaN or Inf values.*--fp32-vae"):
                check(broken, **settings)
        assert check(broken, OFF)[0] is broken


def test_only_whole_safe_classifier_folders_are_offered_and_opened(models_dir):
    assert set(classifier_folders()) == {"group/red-finder"} and folder_paths.get_folder_paths(
        "image_classification"
    ) == [str(models_dir / "image_classification")]
    pickled = copy_classifier(models_dir, "pickled", drop=("model.safetensors",))
    torch.save({}, pickled / "pytorch_model.bin")
    copy_classifier(models_dir, "language", architectures=["BertForSequenceClassification"])
    copy_classifier(models_dir, "halved", num_hidden_layers=2)
    copy_classifier(models_dir, "unprepared", drop=("preprocessor_config.json",))
    copy_classifier(
        models_dir,
        "foreign",
        model_type="my_model",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"},
    )
    (models_dir / "image_classification" / "foreign" / "evil.py").write_text("raise SystemExit('code of a model folder was run')")
    assert set(classifier_folders()) == {"group/red-finder", "halved", "unprepared", "foreign"}
    for name, message in (
        ("pickled", "is not in the"),
        ("halved", "is incomplete: its weights lack vit"),
        ("unprepared", "cannot be loaded"),
        ("foreign", "cannot be loaded"),
    ):
        with pytest.raises(Step1XError, match=message):
            check(RED, classifier=name)


def test_a_classifier_with_independent_labels_and_one_that_was_exchanged(models_dir):
    target = copy_classifier(models_dir, "independent", problem_type="multi_label_classification")
    score = float(check(RED, REPORT, "independent", labels="very red")[2].split("unsafe ")[-1].split("%")[0]) / 100
    classifier = host_gate.open_classifier("independent")
    assert classifier.independent and score == pytest.approx(
        float(unsafe_scores(host_gate.classify(classifier, [host_gate.to_uint8(RED[0])]), [2], True)), abs=0.006
    )
    config = json.loads((target / "config.json").read_text())
    target.joinpath("config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b", "2": "c"}}))
    with pytest.raises(Step1XError, match="available labels: a, b, c"):
        check(RED, classifier="independent", labels="very red")


@pytest.mark.once
def test_the_shipped_workflow_in_the_host(tiny_server, models_dir):
    base, server = tiny_server.base, tiny_server
    (base / "models" / "image_classification").mkdir()
    os.rename(copy_classifier(models_dir, "served"), base / "models" / "image_classification" / "served")
    Image.fromarray((RED[0] * 255).byte().numpy()).save(base / "red.png")
    client = Client(server.url)
    client.upload_image(base / "red.png", "red.png")
    info = client.get("/object_info")
    options = info["Step1XEditContentGate"]["input"]["required"]["classifier"]
    assert (options[0] if isinstance(options[0], list) else options[1]["options"]) == ["none", "served"]
    assert "image_classification" in client.get("/models")
    shipped = to_api(json.loads((PACK / "workflows" / "step1x_gated_edit.json").read_text(encoding="utf-8")), info)

    def run(instruction, **changes):
        prompt = json.loads(json.dumps(shipped))
        for class_type, values in {
            "LoadImage": {"image": "red.png"},
            "Step1XEditEncode": {"size_level": 64},
            "Step1XEditSampler": {"steps": 1},
            "PrimitiveStringMultiline": {"value": instruction},
            "Step1XEditContentGate": changes,
        }.items():
            prompt[find_nodes(prompt, class_type)[0]]["inputs"].update(values)
        ran = client.run(prompt)
        gate_node, = find_nodes(prompt, "Step1XEditContentGate")
        (report,) = (
            data["output"]["text"][0]
            for kind, data in ran.events
            if kind == "executed" and prompt[data["node"]]["class_type"] == "PreviewAny"
        )
        return np.asarray(Image.open(io.BytesIO(ran.images[0])).convert("RGB")), report, ran, gate_node

    passed, report, _, _ = run("turn it green")
    assert report.startswith("Content gate: nothing found in the prompt. The images were not checked")
    off, report, _, _ = run("make her naked", action="off")
    assert "is off" in report and off.std() > 5
    withheld, report, ran, _ = run("make her naked")
    assert "withheld" in report and not np.array_equal(withheld, passed) and np.array_equal(withheld, run("undress him")[0])
    # Shown on the node itself, and in the log; the picture was found unsafe by the classifier, too.
    assert ran.previews > 0 and "Content gate: 1 of 1 images withheld." in server.log_text()
    assert "unsafe content" in run("turn it green", classifier="served", unsafe_labels="safe, red, very red")[1]
    with pytest.raises(ExecutionError, match="nothing to check"):
        run("turn it green", words="")
