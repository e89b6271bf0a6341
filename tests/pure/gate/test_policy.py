"""The content gate's policy: labels, words and notices, without ComfyUI."""

import pytest
import torch

from step1x_core.errors import Step1XError
from step1x_core.gate.policy import find_labels, forbidden_words, read_answer, unsafe_scores


def test_scores_of_labels_that_exclude_each_other_are_added_and_others_are_not():
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, -9.0, -9.0]])
    assert unsafe_scores(logits, [1, 2, 1], False).tolist() == pytest.approx([2 / 3, 0], abs=1e-4)
    assert unsafe_scores(logits, [1, 2], True).tolist() == pytest.approx([0.5, 0], abs=2e-4)
    # Of independent labels the most probable unsafe one counts, however improbable the other is.
    assert unsafe_scores(torch.tensor([[0.0, 9.0, -9.0]]), [1, 2], True).tolist() == pytest.approx([1], abs=2e-4)
    with pytest.raises(Step1XError, match="NaN or Inf scores"):
        unsafe_scores(torch.tensor([[0.0, float("nan")]]), [1], False)
    assert find_labels({0: "a", 1: "B"}, ["b", "A"], "x") == [1, 0]


@pytest.mark.parametrize(
    "prompt, words, found",
    [
        ("make the Nude figure blue", ["nude"], ["nude"]),
        ("a denuded hill", ["nude"], []),
        ("NUDE", ["nude", "blood"], ["nude"]),
        ("nu\u200bde", ["nude"], ["nude"]),
        ("ｎｕｄｅ", ["nude"], ["nude"]),
        ("take   off\nher clothes", ["take off her clothes"], ["take off her clothes"]),
        ("nude.", ["nude"], ["nude"]),
        ("nudes", ["nude"], []),
        ("让她裸体", ["裸体"], ["裸体"]),
        ("把nude改掉", ["nude"], ["nude"]),
        ("nudenude nude", ["nude"], ["nude"]),
        ("Straße", ["STRASSE"], ["STRASSE"]),
        ("x", ["\u200b"], []),
        ("c++ code", ["c++"], ["c++"]),
        ("", ["nude"], []),
    ],
)
def test_words_are_found_as_words_whatever_their_looks(prompt, words, found):
    assert forbidden_words(prompt, words) == found


@pytest.mark.parametrize(
    "reply, answer",
    [
        ("Yes", True),
        ("yes, it does", True),
        ('"No."', False),
        ("no\n", False),
        ("是的", True),
        ("不是", False),
        ("否", False),
        ("", None),
        ("maybe", None),
        ("nothing", None),
        ("yesterday", None),
        ("I cannot say", None),
    ],
)
def test_only_a_clear_answer_counts(reply, answer):
    assert read_answer(reply) is answer
