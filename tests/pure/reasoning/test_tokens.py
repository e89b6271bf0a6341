"""Choice of tokens and positions of written text, without ComfyUI."""

import pytest
import torch
import transformers

from step1x_core.errors import Step1XError
from step1x_core.prompts.chat import chat, split_at_pictures, untemplated
from step1x_core.prompts.mllm import rope_positions
from step1x_core.reasoning.token_sampling import Sampling, Settings, TokenSampler, best_first, candidates, draws, penalise


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
    for used, warper, value in (
        (True, transformers.RepetitionPenaltyLogitsProcessor, 1.3),
        (True, transformers.TemperatureLogitsWarper, temperature),
        (top_k > 0, transformers.TopKLogitsWarper, top_k),
        (top_p < 1, transformers.TopPLogitsWarper, top_p),
        (min_p > 0, transformers.MinPLogitsWarper, min_p),
    ):
        if used:
            expected = warper(value)(history, expected)

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=1.3)
    seen = torch.zeros(1, 400, dtype=torch.bool)
    seen[0, history[0]] = True
    settings = Settings([sampling], "cpu")
    chances, tokens = candidates(penalise(scores[None], seen, torch.zeros_like(seen), settings), settings)
    found = torch.zeros(1, 400).scatter(1, tokens, chances)
    expected = expected.softmax(-1)
    assert torch.equal(found > 0, expected > 0) and torch.allclose(found, expected, rtol=1e-5, atol=0)


def sampler(samplings, vocabulary=5, tokens=4000):
    return TokenSampler([torch.tensor([0])] * len(samplings), vocabulary, samplings, tokens)


def test_drawn_tokens_follow_the_probabilities():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])
    sampling = Sampling(temperature=0.8, top_k=4, seed=3)
    chances, tokens = candidates(scores, Settings([sampling], "cpu"))
    expected = torch.zeros(1, 5).scatter(1, tokens, chances)[0]
    drawn = sampler([sampling])
    for _ in range(4000):
        drawn.choose(scores)
    counts = torch.bincount(drawn.replies[0], minlength=5) / 4000
    assert counts[3] == 0 and (counts - expected).abs().max() < 0.025


ROWS = [Sampling(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.2, seed=5), Sampling(temperature=0),
        Sampling(temperature=1.4, top_k=3, min_p=0.2, presence_penalty=0.5, seed=2**64 - 1), Sampling(temperature=0.7, top_p=0.8, seed=-1)]


@pytest.mark.parametrize("row", range(4))
def test_a_row_is_drawn_as_if_alone(row):
    steps = torch.randn(30, 4, 400, generator=torch.Generator().manual_seed(1)).bfloat16() * 2
    together, alone = sampler(ROWS, 400, 30), sampler(ROWS[row:row + 1], 400, 30)
    for place, scores in enumerate(steps):
        if place == 20:
            together.keep([row])
        together.choose(scores if place < 20 else scores[row:row + 1])
        alone.choose(scores[row:row + 1])
    assert torch.equal(together.replies[0], alone.replies[0])
    assert len(alone.replies[0].unique()) > 10


def test_a_draw_depends_on_seed_and_place_alone():
    assert torch.equal(draws(7, 500)[:3], draws(7, 3)) and torch.equal(draws(7, 500)[:100], draws(7, 100))
    assert not torch.equal(draws(7, 3), draws(8, 3)) and 0 <= draws(7, 500).min() and draws(7, 500).max() < 1


def test_equal_scores_are_in_the_order_of_their_tokens():
    scores = torch.tensor([[1.0, -2.0, 1.0, 0.0, -0.5, -2.0, torch.inf, -torch.inf, 1.0]])
    values, tokens = best_first(scores, 9)
    assert tokens.tolist() == [[6, 0, 2, 8, 3, 4, 1, 5, 7]] and torch.equal(values, scores[:, tokens[0]])
    assert best_first(scores, 4)[1].tolist() == [[6, 0, 2, 8]]


def test_a_nan_score_is_an_error_when_it_is_looked_for():
    damaged = sampler([Sampling()])
    damaged.choose(torch.tensor([[0.0, 1.0, torch.nan, 0.0, 0.0]]))
    with pytest.raises(Step1XError, match="NaN"):
        damaged.check()


def test_penalties_count_prompt_and_reply_apart():
    chosen = sampler([Sampling(temperature=0, repetition_penalty=2.0, presence_penalty=0.7)], 4)
    # 0 stands in the prompt: 2.0 / 2. Then 1 and 2 stand in the reply: 1.9 / 2 - 0.7 and 1.5 / 2 - 0.7.
    scores = torch.tensor([[2.0, 1.9, 1.5, -0.1]])
    assert [int(chosen.choose(scores)) for _ in range(4)] == [1, 2, 0, 0]


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
