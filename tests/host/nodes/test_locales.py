"""Translations and node pages stay complete in every language."""

import json
import re

import pytest
from conftest import PACK

import locales

LANGUAGES = (locales.SOURCE, *locales.TRANSLATIONS)
PAGES = PACK / "web" / "docs"
# Names that are the same in Chinese.
SAME = {"VAE", "CLIP", "LoRA", "CFG", "Latent", "Sigmas"}
# The editor's translator takes these for placeholders, links and plural forms in names and descriptions.
SPECIAL = re.compile(r"[@{}|]")


@pytest.fixture(scope="module")
def expected():
    return locales.definitions()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_is_translated_and_nothing_else(expected, language):
    assert locales.problems(expected, locales.read(language)) == []


def test_english_says_what_the_nodes_say(expected):
    english = locales.paths(locales.read("en"))
    assert not {path: text for path, text in locales.paths(expected).items() if text and english[path] != text}


def test_chinese_is_chinese():
    texts = locales.paths(locales.read("zh"))
    assert not {path: text for path, text in texts.items() if not re.search(r"[\u4e00-\u9fff]", text) and text not in SAME}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_editor_can_read_the_texts(expected, language):
    texts = locales.paths(locales.read(language))
    assert not {path: text for path, text in texts.items() if not path.endswith(".tooltip") and SPECIAL.search(text)}
    # A dot separates levels of the editor's keys.
    assert not [key for node in expected.values() for key in node["inputs"] if "." in key]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_category_has_a_name(language):
    categories = json.loads((locales.FOLDER / language / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
    assert {part for schema in locales.node_schemas() for part in schema.category.split("/")} == set(categories)


def test_examples_in_prompts_are_in_both_languages():
    """The editor has no translations of placeholders."""
    examples = [
        entry.placeholder
        for schema in locales.node_schemas()
        for entry in schema.inputs
        if getattr(entry, "multiline", False) and entry.placeholder
    ]
    assert len(examples) == 4
    assert [text for text in examples if not re.search(r"[a-z]", text) or not re.search(r"[\u4e00-\u9fff]", text)] == []


def test_what_is_missing_and_what_is_stale_is_told():
    expected = {"Node": {"display_name": "A node", "inputs": {"a": {"tooltip": "Text."}}, "outputs": {"0": {"tooltip": None}}}}
    found = {"Node": {"display_name": "", "inputs": {"b": {"tooltip": "Old."}}, "outputs": {"0": {"tooltip": "Kept."}}}}
    assert locales.problems(expected, found) == [
        "missing: Node.display_name",
        "missing: Node.inputs.a.tooltip",
        "stale: Node.inputs.b.tooltip",
    ]
    assert (
        locales.fill(expected, found)["Node"]["outputs"] == {"0": {"tooltip": "Kept."}}
        and locales.fill(expected, found)["Node"]["display_name"] == "A node"
    )
    assert locales.prune(expected, found) == {"Node": {"display_name": "", "inputs": {}, "outputs": {"0": {"tooltip": "Kept."}}}}


def page(node, language):
    path = PAGES / f"{node}.md" if language == locales.SOURCE else PAGES / node / f"{language}.md"
    return path.read_text(encoding="utf-8")


def shape(text) -> dict:
    """What a translation has in common with its original."""
    lines = text.splitlines()
    return {
        "sections": sum(line.startswith("## ") for line in lines),
        "rows": sum(line.startswith("|") for line in lines),
        "points": sum(line.startswith("- ") for line in lines),
        "errors quoted": re.findall(r'"(?:[A-Z]|\.\.\. )[^"]*\.\.\.[^"]*"', text),
    }


def input_table(text) -> list[str]:
    return re.findall(r"^\| `(\w+)`", text.split("\n## ")[1], flags=re.MULTILINE)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_page_that_names_its_inputs(expected, language):
    titles = {node: entry["display_name"] for node, entry in locales.read(language).items()}
    for schema in locales.node_schemas():
        text = page(schema.node_id, language)
        assert text.startswith(f"# {titles[schema.node_id]}\n"), schema.node_id
        assert input_table(text) == [entry.id for entry in schema.inputs], schema.node_id
        assert len(re.findall(r"^\| ", text.split("\n## ")[2], flags=re.MULTILINE)) == len(schema.outputs) + 1, schema.node_id


@pytest.mark.parametrize("language", locales.TRANSLATIONS)
def test_translated_pages_say_as_much_as_the_original(expected, language):
    for node in expected:
        assert shape(page(node, language)) == shape(page(node, locales.SOURCE)), node


def test_there_is_no_page_without_its_node(expected):
    assert {path.stem for path in PAGES.glob("*.md")} == set(expected)
    assert {path.relative_to(PAGES).as_posix() for path in PAGES.glob("*/*")} == {
        f"{node}/{language}.md" for node in expected for language in locales.TRANSLATIONS
    }
