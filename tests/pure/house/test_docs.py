"""What README and node pages quote, name and link to is there."""

import ast
import re

import pytest
from conftest import PACK

import install

PAGES = [PACK / "README.md", *sorted(PACK.glob("docs/*.md")), *sorted(PACK.glob("web/docs/**/*.md"))]
# A row of README's table or an entry of a node page's list that begins with a sentence, of which "..." and what is named or counted is left open.
QUOTING = re.compile(r'^(?:- \*\*(?P<entry>".*?)\*\*|\| (?P<row>".*?) \|)', re.MULTILINE)
LEFT_OPEN = re.compile(r"\.\.\.|'[^']*'|\d+|\w+_\w+")


def sentences() -> list[str]:
    """All texts of the source, with a NUL in place of what is filled in."""
    found = []
    for path in [PACK / "install.py", *(path for part in ("nodes", "step1x_core", "scripts") for path in sorted((PACK / part).rglob("*.py")))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quotes(text: str) -> list[str]:
    return [quote for match in QUOTING.finditer(text) for quote in re.findall(r'"([^"]+)"', match["entry"] or match["row"])]


def test_quoted_errors_are_those_of_the_code():
    known, missing = sentences(), []
    for page in PAGES:
        for quote in quotes(page.read_text(encoding="utf-8")):
            parts = [re.escape(part.strip(" ,;.")) for part in LEFT_OPEN.split(quote)]
            pattern = re.compile(".*".join(part for part in parts if part), re.DOTALL)
            if not any(map(pattern.search, known)):
                missing.append(f"{page.relative_to(PACK)}: {quote}")
    assert missing == []


def test_the_search_finds_quotes():
    assert quotes('- **"One ... is" or "two"**: x\n| "three" | y |\n"four"') == ["One ... is", "two", "three"]
    assert len(quotes((PACK / "README.md").read_text(encoding="utf-8"))) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PACK).as_posix())
def test_links_lead_somewhere(page):
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def test_readme_names_everything_that_install_downloads():
    readme = (PACK / "README.md").read_text(encoding="utf-8")
    for name, model in install.MODELS.items():
        assert f"`{name}`" in readme and f"`{model.folder}`" in readme and (model.repository in readme or f"`-{name.split('-')[-1]}`" in readme), name
