"""How prompts are encoded: the dtype of the arithmetic, and images that several prompts and questions share."""

import copy

import comfy.cli_args
import comfy.model_management
import pytest
import tiny_models
import torch
from comfy.text_encoders import qwen_vl
from safetensors.torch import load_file, save_file

from step1x_core.editing.batches import Item
from step1x_core.exact_resize import resize_exactly
from step1x_core.host.checkpoints.loading import load_model, load_text_encoder
from step1x_core.host.editing.batch import edit_batch
from step1x_core.host.pairs import making
from step1x_core.host.pairs.making import propose_edits
from step1x_core.host.prompts import encoding, text_encoder
from step1x_core.host.prompts.encoding import decode_edit, encode_edit
from step1x_core.host.prompts.vision import image_features
from step1x_core.host.reasoning import pool, thinking
from step1x_core.host.reasoning.generation import Question, generate_texts
from step1x_core.host.sampling.sampler import flow_sigmas, sample
from step1x_core.images import to_working_size
from step1x_core.pairs import propose
from step1x_core.pairs.propose import Idea
from step1x_core.prompts.image_memory import ImageMemory
from step1x_core.reasoning.conversation import RULES
from step1x_core.reasoning.replies import BadReply

NAME = "qwen25_7b"


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def float_clip(float_file):
    return load_text_encoder(float_file)


def inner(clip):
    return clip.cond_stage_model.qwen25_7b.transformer


def picture(width, height, seed=0):
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


class Calls:
    """Counts the runs of a module."""

    def __init__(self, module):
        self.count = 0
        self.handle = module.register_forward_hook(self)

    def __call__(self, module, args, out):
        self.count += 1


@pytest.fixture
def vision(clip):
    calls = Calls(inner(clip).visual)
    yield calls
    calls.handle.remove()


@pytest.fixture
def bfloat16_card(monkeypatch):
    """This machine's processor counts as a card that computes in bfloat16."""
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda device=None, **options: True)


def dtypes(clip, prompt="make it red") -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which the vision tower and the language model ran for a prompt."""
    seen = []
    modules = inner(clip).visual.blocks[0].mlp, inner(clip).model.layers[0].mlp
    hooks = [module.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype)) for module in modules]
    cond = clip.encode_from_tokens(clip.tokenize(prompt, images=[picture(120, 90)]))
    for hook in hooks:
        hook.remove()
    assert cond.dtype == torch.float32
    return tuple(seen)


def test_a_processor_computes_in_float32(clip):
    assert dtypes(clip) == (torch.float32,) * 2


def test_a_card_computes_in_the_dtype_of_the_weights(clip, float_clip, bfloat16_card, monkeypatch):
    assert dtypes(clip) == (torch.bfloat16,) * 2
    assert dtypes(float_clip) == (torch.float32,) * 2
    monkeypatch.setattr(comfy.cli_args.args, "fp32_text_enc", True)
    assert dtypes(clip) == (torch.float32,) * 2


def test_a_card_without_bfloat16_computes_in_float32(clip, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda device=None, **options: False)
    assert dtypes(clip) == (torch.float32,) * 2


def test_scaled_fp8_weights_are_multiplied_in_bfloat16(tmp_path, bfloat16_card):
    path = tmp_path / "scaled.safetensors"
    tiny_models.write_mllm(path, scaled=True)
    assert dtypes(load_text_encoder(path)) == (torch.bfloat16,) * 2


@pytest.mark.parametrize("hide_zeros", [True, False])
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(
    tmp_path, float_file, float_clip, transformers_model, bfloat16_card, hide_zeros
):
    """Both run on weights rounded to bfloat16; the exact states are those of transformers in float32 on the rounded weights."""
    path = tmp_path / "rounded.safetensors"
    rounded = {key: weight.bfloat16() for key, weight in load_file(float_file).items()}
    save_file(rounded, path, metadata={"step1x_edit_config": tiny_models.json.dumps(tiny_models.TINY_MLLM)})
    clip = load_text_encoder(path, "v1.1" if hide_zeros else "v1.2")
    exact_model, rough_model = copy.deepcopy(transformers_model), copy.deepcopy(transformers_model)
    for model, dtype in ((exact_model, torch.float32), (rough_model, torch.bfloat16)):
        for parameter in model.parameters():  # the rotation's frequencies stay in float32, as they do where a file is loaded
            parameter.data = parameter.data.bfloat16().to(dtype)
    ours, theirs = 0.0, 0.0
    for seed in range(4):
        sequence = [token for token, _ in clip.tokenize("make it red, Go", images=[picture(300, 200, seed)])[NAME][0]]
        at = next(i for i, token in enumerate(sequence) if isinstance(token, dict))
        states, _, positions = inner(clip).encode(sequence, "cpu", hide_zeros)
        patches, grid = qwen_vl.process_qwen2vl_images(sequence[at]["data"][None].float() / 255)
        ids = torch.tensor([[*sequence[:at], *[151655] * (len(patches) // 4), *sequence[at + 1:]]])
        exact, rough = (
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=positions[:, None],
                pixel_values=patches.to(next(model.parameters()).dtype),
                image_grid_thw=grid.reshape(1, 3),
            ).last_hidden_state.float()
            for model in (exact_model, rough_model)
        )
        ours += ((states - exact).norm() / exact.norm()).item()
        theirs += ((rough - exact).norm() / exact.norm()).item()
    assert 0 < ours <= theirs < 0.1, (ours, theirs)


@pytest.mark.parametrize("size", [(56, 56), (112, 112), (56, 252), (504, 308), (196, 140)])
def test_windows_at_once_equal_the_hosts_one_after_the_other(float_clip, size):
    visual = inner(float_clip).visual
    pixels = (picture(*size)[0] * 255).to(torch.uint8)
    found = image_features(visual, pixels, "cpu", torch.float32)
    patches, grid = qwen_vl.process_qwen2vl_images(pixels[None].float() / 255)
    grid = grid.reshape(1, 3)
    theirs = qwen_vl.Qwen2VLVisionTransformer.forward(visual, patches, grid)
    # In 0.18 the host returns them in the order of the windows.
    order = torch.argsort(visual.get_window_index(grid)[0])
    assert torch.equal(found, theirs) or torch.equal(found, theirs[order])


def test_patches_are_embedded_by_a_matrix_product_as_by_the_convolution(float_clip):
    visual = inner(float_clip).visual
    patches = torch.randn(16, 1176, generator=torch.Generator().manual_seed(0))
    found, expected = visual.embed_patches(patches), visual.patch_embed(patches)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["v1.1", "v1.2"])
def test_both_prompts_share_what_the_image_is_encoded_to(models, vae, layout):
    clip = load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, layout)
    image = picture(90, 70)
    calls = Calls(inner(clip).visual)
    positive, negative, _ = encode_edit(clip, vae, image, "make it red", "blurry", 64)
    assert calls.count == 1
    shown = image if layout == "v1.2" else to_working_size(image[0], 64)[None]
    for text, ((cond, _),) in (("make it red", positive), ("blurry", negative)):
        ((alone, _),) = clip.encode_from_tokens_scheduled(clip.tokenize(text, images=[shown], size_level=64))
        assert torch.equal(cond, alone)
    assert calls.count == 3
    # What is shared ends with the call.
    encode_edit(clip, vae, image, "make it red", "blurry", 64)
    assert calls.count == 4
    known = {}
    for text in ("make it red", "make it blue", "make it green"):
        encode_edit(clip, vae, image, text, "blurry", 64, known=known)
    assert calls.count == 5
    encode_edit(clip, vae, torch.cat([image, image.flip(2)]), "make it red", "blurry", 64)
    assert calls.count == 7


def test_a_memory_tells_images_apart_by_their_pixels(clip, vision):
    memory, image = ImageMemory(), picture(60, 60)[0]
    changed = image.clone()
    changed[0, 0] = 1 - changed[0, 0].round()
    for other, count in ((image, 1), (image.clone(), 1), (changed, 2), (image, 2)):
        generate_texts(clip, [Question(None, [other, "What?"], 0, 0.0, memory)] * 2, 1)
        assert vision.count == count


def test_questions_with_a_memory_get_the_replies_that_they_get_without_one(clip):
    images = [picture(60, 60, seed)[0] for seed in range(2)]
    for memory in (ImageMemory(), None):
        questions = [Question(None, [*images, text], seed, 0.7, memory) for seed, text in enumerate(("What is it?", "Which one?"))]
        replies = generate_texts(clip, questions, 6)
        if memory is not None:
            expected = replies
    assert replies == expected


def test_a_judgement_encodes_each_image_once(clip, vision, monkeypatch):
    """With a model of random weights all tries of all calls are made: 3 at a time, then 2 and fewer."""
    rules = RULES["v1.2"]
    short = type(rules)(dict.fromkeys(rules.budgets, 2), scored=True, tries=3)
    rounds, ask = [], thinking.generate_texts
    monkeypatch.setattr(
        thinking,
        "generate_texts",
        lambda clip, questions, tokens: rounds.append(len(questions)) or ask(clip, questions, tokens),
    )
    reflection = thinking.judge(clip, picture(60, 40), picture(60, 40, 1), "make it red", 3, short)
    assert vision.count == 2 and rounds[0] == 3 and len(rounds) <= 6
    assert [call.name for call in reflection.calls][-2:] == ["edit_score", "quality_score"] and reflection.calls[-1].tries == 3


@pytest.mark.parametrize("cfg, prompts", [(1.0, 2), (2.0, 3)])
def test_a_batch_encodes_the_negative_prompt_only_where_it_is_read(models, vae, monkeypatch, cfg, prompts):
    """Of one image with two instructions; v1.2, which does not run the negative prompt at CFG 1."""
    clip = load_text_encoder(models / "text_encoders" / tiny_models.MLLM_FILE, "v1.2")
    model = load_model(models / "diffusion_models" / tiny_models.V12_FILE)
    calls, seen = Calls(inner(clip).model), Calls(inner(clip).visual)
    image = picture(64, 64)
    items = [Item(image, 1, "make it red", 1), Item(image, 1, "make it blue", 2)]
    images, _ = edit_batch("test", model, clip, vae, items, "blurry", 64, 1, cfg, "euler")
    assert calls.count == prompts and seen.count == 1
    for item, found in zip(items, images):
        positive, negative, latent = encode_edit(clip, vae, image, item.prompt, "blurry", 64)
        out = sample(model, positive, negative, latent, flow_sigmas(1, latent["samples"]), cfg, item.seed)
        assert torch.equal(found, decode_edit(vae, out, image))


@pytest.mark.once
def test_images_of_a_list_get_the_proposals_that_they_get_one_by_one(clip, monkeypatch):
    """With a model of random weights, of whose replies a part is taken for readable: the images need different numbers of tries."""
    def read(reply):
        if len(reply) % 2:
            raise BadReply("mumbling")
        return [Idea("subject-remove", {"object": (f"a thing {len(reply)}", "某物")})]

    monkeypatch.setattr(propose, "read_ideas", read)
    rounds, ask = [], pool.generate_texts
    monkeypatch.setattr(pool, "generate_texts", lambda clip, questions, tokens: rounds.append(len(questions)) or ask(clip, questions, 3))
    rows = [{"image": picture(60, 60, seed), "kinds": "", "count": 3, "seed": seed} for seed in range(5)]
    alone = [found for row in rows for found in propose_edits(clip, [row])]
    asked, rounds[:] = sum(rounds), []
    monkeypatch.setattr(making, "tasks_at_a_time", lambda clip: 3)
    assert propose_edits(clip, rows) == alone
    assert rounds[0] == 3 and sum(rounds) == asked and len(rounds) < asked and asked > len(rows)


@pytest.mark.once
@pytest.mark.parametrize("version", ["v1.1", "v1.2"])
def test_images_resized_as_on_a_gpu_give_the_same_tokens(float_file, version, monkeypatch):
    """Where the host runs text encoders on a GPU, images are resized there; here the same code runs on the CPU."""
    clip, image, used = load_text_encoder(float_file, version), picture(150, 100), []
    layout = clip.tokenizer.layout

    def images():
        prompt = clip.tokenize("make it red", images=[image], size_level=96)
        chat = clip.tokenizer.tokenize_chat(["", ""], [image[0]])
        shown = [token for sequence in (prompt, chat) for token, *_ in sequence[NAME][0] if isinstance(token, dict)]
        return [*(token["data"] for token in shown), encoding.at_working_size(image, layout, 96)]

    expected = images()
    monkeypatch.setattr(text_encoder, "resizing_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(encoding, "resizing_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("step1x_core.images.resize_exactly",
                        lambda *args, **kwargs: used.append(args) or resize_exactly(*args, **kwargs))
    found = images()
    assert len(found) == 3 and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert len(used) >= 5
