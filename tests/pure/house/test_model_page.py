"""docs/model.md and the code point at each other: every citation names one of its headings, every path in it exists."""

import re

import pytest
from conftest import PACK

PAGE = PACK / "docs" / "model.md"
CITED = "docs/" + PAGE.name
SUFFIXES = {".py", ".md", ".json", ".toml", ".yml", ".mjs", ".txt"}
ROOMS = ("nodes", "step1x_core", "scripts", "tests", "training", "benchmarks", "workers", "docs", "web", "assets")
# In parentheses: the page, a comma, and one or more headings with semicolons between them.
CITATION = re.compile(re.escape(CITED) + r", ([^()]+)\)")
# A path in backticks, from the pack's folder on. One that ends in a slash is a folder.
PATH = re.compile(r"`((?:nodes|step1x_core|scripts|tests|docs|training)/[^`\s*{]*)`")
# Names of pages that only their authors could open.
PRIVATE = re.compile(r"\b(?:spec|specification) (?:v?\d|[a-z_]+\.md)|\b(?:v12?|train_eval|integration)\.md\b", re.IGNORECASE)


def text_files():
    """All texts of the pack with its code, tests and pages, but for this file and golden values."""
    folders = [PACK / room for room in ROOMS if (PACK / room).is_dir()]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]
    return [path for path in [*PACK.glob("*.*"), *files]
            if path.suffix in SUFFIXES and path.name != "test_model_page.py" and "goldens" not in path.parts]


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def headings(text: str) -> list[str]:
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#{2,} (.+)$", outside, re.MULTILINE)


def anchor(heading: str) -> str:
    """The part behind # by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def unwrapped(text: str) -> str:
    """A text in which comments and docstrings that run over several lines are one line."""
    return re.sub(r"\s*\n[\s#]*", " ", text)


def cited(text: str) -> list[str]:
    return [name.strip() for match in CITATION.finditer(unwrapped(text)) for name in match[1].split(";")]


def test_every_citation_names_a_heading():
    known, wrong, found = headings(page()), [], set()
    for path in text_files():
        if path == PAGE:
            continue
        text = path.read_text(encoding="utf-8")
        names = cited(text)
        found.update(names)
        wrong += [f"{path.relative_to(PACK)}: {name}" for name in names if name not in known]
        # One without a section helps nobody; other pages may link to the whole of it.
        if path.suffix != ".md" and unwrapped(text).count(CITED) != len(CITATION.findall(unwrapped(text))):
            wrong.append(f"{path.relative_to(PACK)}: a citation of {CITED} without a section")
    assert wrong == []
    assert len(found) > 20


def test_every_link_to_a_section_leads_to_one():
    known, wrong = [anchor(heading) for heading in headings(page())], []
    for path in text_files():
        if path.suffix == ".md":
            targets = re.findall(r"\]\((?:[^)#\s]*/)?model\.md#([^)\s]+)\)", path.read_text(encoding="utf-8"))
            wrong += [f"{path.relative_to(PACK)}: #{target}" for target in targets if target not in known]
    assert wrong == []


def test_no_text_cites_a_page_that_is_not_here():
    assert [f"{path.relative_to(PACK)}: {match[0]}" for path in text_files()
            for match in PRIVATE.finditer(path.read_text(encoding="utf-8"))] == []


def test_every_path_on_the_page_exists():
    paths = PATH.findall(page())
    assert len(paths) > 80
    assert [path for path in paths if not (PACK / path).exists()] == []


@pytest.mark.parametrize("heading", [heading for heading in headings(page()) if heading != "Open points"])
def test_every_section_ends_with_the_files_that_implement_it(heading):
    section = page().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    last = section.strip().splitlines()[-1]
    assert last.startswith("Code: ") and PATH.search(last), last


def test_headings_are_told_apart():
    names = headings(page())
    assert len(set(map(anchor, names))) == len(names)
    # What separates names in a citation is not part of one.
    assert [name for name in names if re.search(r"[;()]", name)] == []


def test_the_searches_find_what_is_wrong():
    assert cited(f"# Wrapped\n    # over two lines ({CITED}, Connector;\n    # No such section)") == ["Connector", "No such section"]
    assert headings("# Title\n## One\n```\n## not one\n```\n### Two") == ["One", "Two"]
    assert anchor("v1.2 prompt") == "v12-prompt" and anchor("The 217 rule") == "the-217-rule"
    assert (
        PRIVATE.search("see " + "spec v1" + ".md a.2")
        and PRIVATE.search("v12" + ".md e")
        and not PRIVATE.search("spec_from_file_location")
    )
    assert PATH.findall("`step1x_core/images.py` and `step1x_core/data/templates/`, not `results/{method}`") == [
        "step1x_core/images.py",
        "step1x_core/data/templates/",
    ]
