"""Choice of tokens and positions of written text, without ComfyUI."""

import pytest
import torch
import transformers

from step1x_core.prompts.chat import chat, split_at_pictures, untemplated
from step1x_core.prompts.mllm import rope_positions
from step1x_core.reasoning.token_sampling import Sampling, TokenChooser, filter_scores, penalise


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature, top_k, top_p, min_p", [
    (0.7, 50, 0.9, 0.0), (1.0, 0, 0.6, 0.0), (1.8, 5, 1.0, 0.2), (0.2, 0, 1.0, 0.05), (1.3, 100, 0.95, 0.1),
    (1.0, 0, 0.0, 0.0), (1.0, 1000, 1.0, 1.0), (1.0, 0, 1.0, 0.0),
])
def test_filtered_probabilities_equal_transformers(seed, temperature, top_k, top_p, min_p):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(400, generator=generator) * 3
    scores[7] = scores.max()  # a tie at the top
    prompt = torch.randint(400, (60,), generator=generator)
    reply = torch.randint(400, (9,), generator=generator)

    expected, history = scores[None], torch.cat((prompt, reply))[None]
    for used, warper, value in ((True, transformers.RepetitionPenaltyLogitsProcessor, 1.3), (True, transformers.TemperatureLogitsWarper, temperature),
                                (top_k > 0, transformers.TopKLogitsWarper, top_k), (top_p < 1, transformers.TopPLogitsWarper, top_p),
                                (min_p > 0, transformers.MinPLogitsWarper, min_p)):
        if used:
            expected = warper(value)(history, expected)

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=1.3)
    seen = torch.zeros(400, dtype=torch.bool)
    seen[history[0]] = True
    found = filter_scores(penalise(scores, seen, torch.zeros_like(seen), sampling), sampling)
    assert torch.equal(found.softmax(0), expected[0].softmax(0)) and (found > -torch.inf).any()


def test_drawn_tokens_follow_the_probabilities():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    sampling = Sampling(temperature=0.8, top_k=4, seed=3)
    expected = filter_scores(scores, sampling).softmax(0)
    choose = TokenChooser(torch.tensor([0]), 5, sampling)
    counts = torch.bincount(torch.tensor([choose(scores) for _ in range(4000)]), minlength=5) / 4000
    assert counts[3] == 0 and (counts - expected).abs().max() < 0.025


def test_penalties_count_prompt_and_reply_apart():
    choose = TokenChooser(torch.tensor([0]), 4, Sampling(temperature=0, repetition_penalty=2.0, presence_penalty=0.7))
    # 0 stands in the prompt: 2.0 / 2. Then 1 and 2 stand in the reply: 1.9 / 2 - 0.7 and 1.5 / 2 - 0.7.
    scores = torch.tensor([2.0, 1.9, 1.5, -0.1])
    assert [choose(scores) for _ in range(4)] == [1, 2, 0, 0]


def test_pictures_stand_where_the_content_has_them():
    first, second = object(), object()
    texts, pictures = chat("S", ["a", "b", first, second, "c"])
    assert texts == ["<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nab<|vision_start|>", "<|vision_end|><|vision_start|>",
                     "<|vision_end|>c<|im_end|>\n<|im_start|>assistant\n"]
    assert pictures == [first, second]
    assert split_at_pictures([]) == ([""], []) and chat("", [])[0][0].startswith("<|im_start|>system\n<|im_end|>")
    assert untemplated("x<|image_pad|>y", []) == (["x<| image_pad |>y"], [])


def test_rope_positions_go_on_after_the_longer_side_of_a_picture():
    assert rope_positions([2, (2, 3), 1, (1, 1), 1]).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
    ]
