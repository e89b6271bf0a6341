"""The thinking and reflection nodes: control flow of the loop in the host's executor with scripted replies, and the unscripted model."""

import sys

import comfy.model_management
import folder_paths
import loop_host
import pytest
import tiny_models
import torch
from loop_host import GOOD, InProcessHost, Script
from safetensors.torch import load_file, save_file

from step1x_core.errors import Step1XError
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.prompts.text_encoder import Step1XTextModel
from step1x_core.host.reasoning import thinking
from step1x_core.host.reasoning.rounds import Failure, Rounds
from step1x_core.host.sampling.few_steps import attach
from step1x_core.reasoning.reflection import Loop
from step1x_core.sampling.few_steps import FewSteps

REFINE = "<#Think>Not yet.<#Reflection> Make it darker."
FAILED = "<#Think>No.<#Failed>"
EDIT = ["encode", "sampler", "decode"]


def edits(number):
    return [f"round_{number}_{node}" for node in EDIT]


def scores(value):
    return f'{{"score": [{value}, 10], "reasoning": ""}}'


@pytest.fixture(scope="module")
def pack():
    return loop_host.load_pack()


@pytest.fixture(scope="module")
def classes(pack):
    return loop_host.node_classes(pack)


@pytest.fixture(scope="module")
def things(models, vae, photo):
    return {"model": load_model(models / "diffusion_models" / tiny_models.V12_FILE), "vae": vae, "image": photo[:, 100:148, 200:264],
            "clip": load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2")}


@pytest.fixture(autouse=True)
def user_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    return tmp_path


@pytest.fixture
def host(monkeypatch, classes, things):
    return InProcessHost(monkeypatch, classes, dict(things))


@pytest.fixture
def script(monkeypatch):
    """Replaces the language model's answers: call it with the replies."""
    def use(**replies):
        model = Script(**replies)
        monkeypatch.setattr(thinking, "generate_text", model)
        monkeypatch.setattr(thinking, "generate_texts", model.together)
        return model

    return use


def edit(classes, things, image, prompt, seed):
    """One edit by the public nodes."""
    positive, negative, latent = classes["Step1XEditEncode"].execute(things["clip"], things["vae"], image, prompt, "", 64).result
    latent, = classes["Step1XEditSampler"].execute(things["model"], positive, negative, latent, seed, 1, 2.0, "euler", 1.0).result
    return classes["Step1XEditDecode"].execute(latent, things["vae"], things["image"]).result[0]


def test_a_success_ends_the_loop_and_only_its_nodes_run(host, script):
    model = script()
    result = host.run()
    assert result.executed[-1] == "sink" and set(result.executed) - {
        f"loop.0.0.{node}" for node in result.rounds()
    } == {"model", "clip", "vae", "image", "loop", "sink"}
    assert sorted(result.rounds()) == sorted(["think", *edits(1), "start", "round_1_judge", "result"])
    assert result.image.shape == (1, 48, 64, 3) and torch.equal(result.image, result.candidates)
    assert (
        result.prompt == "Make the cup red."
        and "Instruction: red cup pls\nRewritten: Make the cup red." in result.report
        and "Best: round 1" in result.report
    )
    assert [name for name, *_ in model.asked] == ["rewrite", "description", "edit_score", "quality_score", "consistency", "reflection"]


def test_refine_and_failed_edit_what_they_should_with_the_next_seed(host, script, classes, things):
    model = script(reflection=[REFINE, FAILED, GOOD["reflection"]])
    result = host.run()
    first = edit(classes, things, things["image"], "Make the cup red.", 5)
    second = edit(classes, things, first, "Make it darker.", 6)
    third = edit(classes, things, things["image"], "Make the cup red.", 7)
    assert torch.equal(result.candidates, torch.cat([first, second, third]))
    # Equal scores: the round with the success wins.
    assert torch.equal(result.image, third)
    judged = model.contents("reflection")
    assert all(torch.equal(content[0], things["image"][0]) and "Make the cup red." in content[2] for content in judged)
    assert all(torch.equal(content[1], picture) for content, picture in zip(judged, result.candidates))


def test_the_first_round_is_the_plain_edit(host, script, classes, things):
    model = script()
    result = host.run(think=False, reflect=False)
    assert torch.equal(result.image, edit(classes, things, things["image"], "red cup pls", 5)) and torch.equal(
        result.image, result.candidates
    )
    assert result.rounds() == edits(1) and not model.asked
    assert result.report == "Instruction: red cup pls" and result.prompt == "red cup pls"


def test_a_few_step_model_has_only_instructions_encoded(monkeypatch, classes, things, script):
    """Also in the later rounds, whose nodes are the guarded twins."""
    forward, prompts = Step1XTextModel.forward, []
    monkeypatch.setattr(Step1XTextModel, "forward", lambda self, tokens: prompts.append(1) or forward(self, tokens))
    fast = things["model"].clone()
    attach(fast, FewSteps(2))
    host = InProcessHost(monkeypatch, classes, {**things, "model": fast})
    script(reflection=[REFINE, GOOD["reflection"]])
    result = host.run(steps=0, cfg=0.0)
    assert len(result.candidates) == 2 and len(prompts) == 2
    prompts.clear()
    script(reflection=[REFINE, GOOD["reflection"]])
    result = host.run(steps=1, cfg=2.0, seed=6)  # guidance by hand
    assert len(result.candidates) == 2 and len(prompts) == 4


def test_thinking_without_reflection_and_reflection_without_thinking(host, script):
    model = script(reflection=REFINE)
    result = host.run(reflect=False)
    assert (
        result.rounds() == ["think", *edits(1)]
        and [name for name, *_ in model.asked] == ["rewrite"]
        and result.prompt == "Make the cup red."
    )
    assert "Asked, system:" in result.report and "Rewritten: Make the cup red." in result.report
    result = host.run(think=False, rounds=2)
    assert "think" not in result.rounds() and result.prompt == "red cup pls" and len(result.candidates) == 2
    assert all("red cup pls" in content[2] for content in model.contents("reflection"))


@pytest.mark.parametrize("version, best", [("v1.2", 1), ("v1.1", 1), ("v1.2-preview", 2)])
def test_the_best_picture_follows_the_rules_of_the_version(classes, script, things, models, model, clip, monkeypatch, version, best):
    asked = script(reflection=FAILED, edit_score=[scores(4), scores(6), scores(5)])
    if version == "v1.1":
        things = {**things, "model": model, "clip": clip}
    else:
        things = {**things, "model": load_model(models / "diffusion_models" / tiny_models.V12_FILE, version)}
    result = InProcessHost(monkeypatch, classes, things).run(think=False)
    assert (
        len(result.candidates) == 3
        and torch.equal(result.image[0], result.candidates[best])
        and f"Best: round {best + 1}" in result.report
    )
    assert len(asked.contents("quality_score")) == (0 if version == "v1.2-preview" else 3)


def test_every_call_and_every_try_has_its_own_seed_and_all_follow_from_one(host, script):
    seeds = {}
    for seed in (5, 5, 6):
        model = script(reflection=["<#Think>", REFINE, "<#Think>", FAILED])
        host.executor.reset()
        result = host.run(seed=seed, rounds=2)
        used = [(name, text_seed) for name, _, _, text_seed, _ in model.asked]
        assert len({text_seed for _, text_seed in used}) == len(used) == 13
        seeds.setdefault(seed, []).append((used, result.candidates))
    (first, pictures), (again, same) = seeds[5]
    assert first == again and torch.equal(pictures, same)
    other, others = seeds[6][0]
    assert first[0] != other[0] and not torch.equal(pictures[0], others[0])
    largest = host.run(seed=2**64 - 1, rounds=2)
    assert len(largest.candidates) == 2 and not largest.error


@pytest.mark.parametrize("cache", ["CLASSIC", "LRU", "RAM_PRESSURE"])
def test_nothing_runs_twice(monkeypatch, classes, things, script, cache):
    host = InProcessHost(monkeypatch, classes, dict(things), cache)
    script(reflection=REFINE)
    first = host.run(rounds=2)
    assert len(first.candidates) == 2
    more = host.run(rounds=3)
    assert more.rounds() == ["round_3_step", *edits(3), "round_3_judge", "result"] and torch.equal(more.candidates[:2], first.candidates)
    again = host.run(rounds=3)
    assert not again.executed and not again.error


@pytest.mark.parametrize("cache", ["CLASSIC", "LRU", "RAM_PRESSURE"])
def test_cancel_in_a_later_round_and_go_on(monkeypatch, classes, things, script, cache):
    host = InProcessHost(monkeypatch, classes, dict(things), cache)
    script(reflection=[REFINE, GOOD["reflection"]])
    host.interrupt_at = "loop.0.0.round_2_sampler"
    cancelled = host.run()
    assert cancelled.interrupted and cancelled.values is None and cancelled.executed[-1] == "loop.0.0.round_2_sampler"
    resumed = host.run()
    assert resumed.rounds() == ["round_2_sampler", "round_2_decode", "round_2_judge", "result"] and len(resumed.candidates) == 2


@pytest.mark.parametrize("call", [0, 3])
def test_cancel_while_judging_passes_through(host, script, call):
    name = ("description", "quality_score")[call > 0]
    script(**{name: comfy.model_management.InterruptProcessingException()})
    cancelled = host.run()
    assert cancelled.interrupted and cancelled.values is None and cancelled.executed[-1] == "loop.0.0.round_1_judge"


def test_a_host_that_keeps_no_results_runs_everything_once(monkeypatch, pack, classes, things, script):
    monkeypatch.setattr(sys.modules[f"{loop_host.NAME}.nodes.loop"], "HOST_KEEPS_RESULTS", False)
    host = InProcessHost(monkeypatch, classes, dict(things), "NONE")
    model = script(reflection=[REFINE, GOOD["reflection"]])
    result = host.run()
    assert len(result.executed) == len(set(result.executed)) and len(result.candidates) == 2 and not result.error
    assert len(model.contents("reflection")) == 2


class Broken:
    """A function that raises on its nth call."""

    def __init__(self, function, call, problem):
        self.function, self.left, self.problem = function, call, problem

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.problem
        return self.function(*args, **kwargs)


PLACES = {
    "encode": ("edit", "encode_edit"),
    "sampler": ("sampling", "sample"),
    "decode": ("edit", "decode_edit"),
    "judge": ("loop", "judge"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("problem", [RuntimeError("no more luck"), comfy.model_management.OOM_EXCEPTION("no more memory")])
@pytest.mark.parametrize("node", PLACES)
def test_an_error_in_a_later_round_keeps_the_pictures_and_is_tried_again(host, script, monkeypatch, node, problem):
    script(reflection=[REFINE, GOOD["reflection"]])
    module, function = PLACES[node]
    module = sys.modules[f"{loop_host.NAME}.nodes.{module}"]
    monkeypatch.setattr(module, function, Broken(getattr(module, function), 2, problem))
    unloaded = []
    monkeypatch.setattr(comfy.model_management, "unload_all_models", lambda: unloaded.append(1))
    result = host.run()
    assert not result.error and len(result.candidates) == (2 if node == "judge" else 1)
    # The error is in the report, and round 1 with its scores is the best.
    assert (
        f"Ended early: Round 2 could not be {'judged' if node == 'judge' else 'edited'}." in result.report
        and str(problem) in result.report
    )
    assert torch.equal(result.image[0], result.candidates[0]) and "Best: round 1" in result.report
    assert len(unloaded) == isinstance(problem, comfy.model_management.OOM_EXCEPTION)
    again = host.run()
    assert again.rounds()[0] == f"round_2_{node}" and len(again.candidates) == 2 and "Ended early" not in again.report
    assert not host.run().executed


def test_an_error_in_the_first_judgement_keeps_the_picture(host, script):
    model = script(description=RuntimeError("no more luck"))
    result = host.run()
    assert len(result.image) == 1 and "Ended early: Round 1 could not be judged. RuntimeError: no more luck" in result.report
    assert len(model.asked) == 2 and "round_2_step" not in result.rounds()


def test_an_error_before_the_first_picture_is_the_hosts(host, script, monkeypatch):
    script(rewrite=RuntimeError("no more luck"))
    assert "no more luck" in host.run().error
    module = sys.modules[f"{loop_host.NAME}.nodes.sampling"]
    monkeypatch.setattr(module, "sample", Broken(module.sample, 1, RuntimeError("no more memory")))
    assert "no more memory" in host.run(think=False).error


def headless(path, source):
    weights = load_file(source)
    del weights["lm_head.weight"]
    save_file(weights, path, metadata={"step1x_edit_config": tiny_models.json.dumps(tiny_models.TINY_MLLM)})
    return path


def test_what_cannot_work_is_refused_before_anything_is_asked_or_sampled(host, script, classes, things, models, tmp_path, monkeypatch):
    model = script()
    mute = load_text_encoder(headless(tmp_path / "mute.safetensors", models / "text_encoders" / tiny_models.MLLM_FILE), "v1.2")

    def refused(sentence, **other):
        refusing = InProcessHost(monkeypatch, classes, {**things, **other})
        result = refusing.run()
        assert sentence in result.error and not result.rounds() and not model.asked
        return refusing

    # Without a question it still edits.
    assert not refused("no language-model head", clip=mute).run(think=False, reflect=False).error
    refused("Input 'image' has 2 images", image=things["image"].repeat(2, 1, 1, 1))
    refused("empty image batch", image=things["image"][:0])
    refused("Input 'image' is a list of 2", image=[things["image"]] * 2)
    template = tmp_path / "step1x_edit" / "templates" / "chinese" / "reflection.user.txt"
    template.parent.mkdir(parents=True)
    template.write_text("{score}", encoding="utf-8")
    refused("reflection.user.txt lacks")
    for node in ("Step1XEditThinkPrompt", "Step1XEditReflectOnEdit"):
        with pytest.raises(Step1XError, match="no language-model head"):
            inputs = (
                {"image": things["image"], "temperature": 0.7}
                if node == "Step1XEditThinkPrompt"
                else {"source": things["image"], "edited": things["image"], "version": "v1.2"}
            )
            classes[node].execute(clip=mute, prompt="p", seed=1, **inputs)


def test_think_node(script, classes, things):
    model = script(rewrite="  Change the crust to black.\n")
    prompt, report = classes["Step1XEditThinkPrompt"].execute(things["clip"], things["image"], "bread too long", 7, 0.3).result
    (name, content, tokens, _, temperature), = model.asked
    assert (
        (name, tokens, temperature) == ("rewrite", 512, 0.3)
        and torch.equal(content[0], things["image"][0])
        and "bread too long" in content[1]
    )
    assert prompt == "Change the crust to black."
    assert (
        report.startswith("Instruction: bread too long\nRewritten: Change the crust to black.\n")
        and content[1].splitlines()[0] in report
    )
    with pytest.raises(Step1XError, match="Input 'image' has 2 images"):
        classes["Step1XEditThinkPrompt"].execute(things["clip"], things["image"].repeat(2, 1, 1, 1), "bread", 7, 0.7)


@pytest.mark.parametrize(
    "reply, verdict, refined",
    [
        (GOOD["reflection"], "success", ""),
        (REFINE, "refine", "Make it darker."),
        (FAILED, "failed", ""),
        ("<#Think>", "failed", ""),
    ],
)
def test_reflect_node(script, classes, things, reply, verdict, refined):
    script(reflection=reply, edit_score=scores(4))
    other = torch.zeros(1, 30, 40, 3)
    out = classes["Step1XEditReflectOnEdit"].execute(things["clip"], things["image"], other, "make it red", 7, "v1.2").result
    assert out[:3] == (verdict, refined, 32.0) and f"Verdict: {verdict}" in out[3] and "A red cup." in out[3]
    with pytest.raises(Step1XError, match="Input 'edited' has 2 images"):
        classes["Step1XEditReflectOnEdit"].execute(things["clip"], things["image"], other.repeat(2, 1, 1, 1), "make it red", 7, "v1.2")


def test_reflect_node_without_scores(script, classes, things):
    model = script()
    out = (
        classes["Step1XEditReflectOnEdit"]
        .execute(things["clip"], things["image"], things["image"], "make it red", 7, "v1.2-preview")
        .result
    )
    assert out[:3] == ("success", "", 0.0) and [name for name, *_ in model.asked] == ["description", "consistency", "reflection"]


def test_the_users_own_texts_take_the_place_of_ours_and_a_changed_one_is_asked_anew(host, script, user_directory):
    model = script()
    host.run()
    template = user_directory / "step1x_edit" / "templates" / "english" / "rewrite.user.txt"
    template.parent.mkdir(parents=True)
    template.write_text("My text: {instruction}", encoding="utf-8")
    assert "think" in host.run().rounds() and model.contents("rewrite")[-1][1] == "My text: red cup pls"
    assert not host.run().executed
    template.write_text("Better: {instruction}", encoding="utf-8")
    assert "think" in host.run().rounds() and model.contents("rewrite")[-1][1] == "Better: red cup pls"


def test_a_round_that_was_not_needed_changes_nothing(classes):
    state = Rounds(Loop("p"), error="over")
    assert classes["Step1XEditLoopJudge"].execute(state, None, None, Failure(""), 0).result == (state,)


def test_the_same_seed_gives_the_same_words(things):
    def words(seed):
        ask = thinking.Asker(things["clip"], "think", seed)
        return [ask("system", [things["image"][0], "text"], 4) for _ in range(2)]

    assert words(1) == words(1) and words(1) != words(2) and len(set(words(1))) == 2
