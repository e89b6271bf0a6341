"""The instruction texts: complete, in step with the parsers, and replaceable by the user's own files."""

import os
import re
import subprocess
import sys

import pytest
from conftest import PACK

from step1x_core.errors import Step1XError
from step1x_core.reasoning import replies
from step1x_core.reasoning.conversation import LAYOUTS
from step1x_core.reasoning.templates import FIELDS, LANGUAGES, fill, load_templates

FOLDER = PACK / "step1x_core" / "data" / "templates"


def write(folder, name, data, language="english"):
    path = folder / language / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def test_every_call_has_both_texts_in_both_languages_and_there_are_no_others():
    names = {f"{call}.{role}" for call in LAYOUTS for role in ("system", "user")}
    assert set(FIELDS) == names
    assert {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.*")} == {
        f"{language}/{name}.txt" for language in LANGUAGES for name in names
    }
    for language in LANGUAGES:
        texts = load_templates(language)
        assert len(set(texts.values())) == len(names) and all(texts.values())
        for text in texts.values():
            assert replies.language(text) == language
            # English texts have no other script, so that the model is not drawn to it.
            assert language == "chinese" or text.isascii()


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_replies_that_the_texts_show_are_good_replies(language):
    texts = load_templates(language)
    shown = texts["consistency.user"].splitlines()[-1]
    consistency = replies.read_consistency(replies.json_block(shown))
    assert (
        consistency.meets_instruction,
        consistency.major_conflicts,
        consistency.omissions,
        consistency.raw_score,
    ) == ("partial", 1, 1, 4.5)
    assert set(replies.json_block(shown)) == {"meets_instruction", "major_conflicts", "minor_conflicts", "omissions", "raw_score", "reason"}
    for name in ("edit_score", "quality_score"):
        assert replies.score_pair(replies.score_table(texts[f"{name}.user"].splitlines()[-1]))
    forms = [line for line in texts["reflection.user"].splitlines() if line.startswith(replies.THINK)]
    outcomes = [replies.read_outcome(replies.keep_reflection(form)) for form in forms]
    assert [outcome.success for outcome in outcomes] == [True, False, False]
    assert [outcome.refine is None for outcome in outcomes] == [True, True, False]


def test_the_rewrite_names_its_language_three_times():
    for language, word in (("english", "English"), ("chinese", "中文")):
        texts = load_templates(language)
        assert (texts["rewrite.system"] + texts["rewrite.user"]).count(word) == 3


def test_values_are_inserted_as_they_are():
    template = load_templates("english")["consistency.user"]
    text = fill(template, {"instruction": "{description} {instruction} {0} {{x}} %s \\1", "description": "{reason}"})
    assert "{description} {instruction} {0} {{x}} %s \\1" in text and "{reason}" in text
    assert '{"meets_instruction": "partial"' in text


def test_a_file_of_the_users_takes_the_place_of_one_text(tmp_path):
    # With a byte order mark and line ends of another system.
    write(tmp_path, "rewrite.user", b"\xef\xbb\xbfMake it better:\r\n{instruction}\r\n")
    texts = load_templates("english", tmp_path)
    assert texts["rewrite.user"] == "Make it better:\n{instruction}"
    pack = load_templates("english")
    assert {name for name in FIELDS if texts[name] != pack[name]} == {"rewrite.user"}
    assert load_templates("chinese", tmp_path) == load_templates("chinese")


def test_a_changed_file_is_read_again(tmp_path):
    write(tmp_path, "quality_score.user", "first")
    assert load_templates("english", tmp_path)["quality_score.user"] == "first"
    write(tmp_path, "quality_score.user", "second")
    assert load_templates("english", tmp_path)["quality_score.user"] == "second"


@pytest.mark.parametrize("name, data, message", [
    ("rewrite.user", "Do {instruction} in {style}", r"has the unknown field \{style\}.*must be exactly: \{instruction\}\."),
    ("rewrite.user", "Do {Instruction}", r"lacks \{instruction\}.*must be exactly: \{instruction\}\."),
    ("reflection.user", "{instruction} {score}", r"lacks \{reason\}.*\{instruction\}, \{score\}, \{reason\}\."),
    ("rewrite.system", "About {instruction}", r"has the unknown field \{instruction\}.*no fields at all"),
    ("quality_score.user", "{图}", r"has the unknown field \{图\}"),
    ("rewrite.user", b"\xff\xfe{instruction}", r"cannot be read.*UTF-8"),
    ("rewrite.user", "", r"lacks \{instruction\}"),
])
def test_a_faulty_file_is_named_with_its_allowed_fields(tmp_path, name, data, message):
    path = write(tmp_path, name, data)
    with pytest.raises(Step1XError, match=message) as caught:
        load_templates("english", tmp_path)
    assert str(path) in str(caught.value)


def test_a_folder_in_place_of_a_file_cannot_be_read(tmp_path):
    (tmp_path / "english" / "rewrite.user.txt").mkdir(parents=True)
    with pytest.raises(Step1XError, match="cannot be read"):
        load_templates("english", tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(Step1XError, match=re.escape(str(tmp_path / "typo"))):
        load_templates("english", tmp_path / "typo")


def test_the_texts_can_be_read_under_any_locale():
    code = "from step1x_core.reasoning.templates import load_templates; print(ascii(load_templates('chinese')['rewrite.system'][:2]))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=PACK, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == ascii(load_templates("chinese")["rewrite.system"][:2]), done.stderr
