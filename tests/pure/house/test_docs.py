"""What README and node pages quote, name and link to is there."""

import ast
import re

import pytest
from conftest import PACK

import install

PAGES = [PACK / "README.md", *sorted(PACK.glob("docs/*.md")), *sorted(PACK.glob("web/docs/**/*.md"))]
# A row of a table or an entry of a node page's list that begins with a sentence, of which "..." and what is named or counted is left open.
QUOTING = re.compile(r'^(?:- \*\*(?P<entry>".*?)\*\*|\| (?P<row>".*?) \|)', re.MULTILINE)
LEFT_OPEN = re.compile(r"\.\.\.|'[^']*'|\d+|\w+_\w+")


def sentences() -> list[str]:
    """All texts of the source, with a NUL in place of what is filled in."""
    found = []
    for path in [
        PACK / "install.py",
        *(path for part in ("nodes", "step1x_core", "scripts") for path in sorted((PACK / part).rglob("*.py"))),
    ]:
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
    assert len(quotes((PACK / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PACK).as_posix())
def test_links_lead_somewhere(page):
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PACK).as_posix())
def test_links_to_a_heading_find_it(page):
    wrong = []
    for target, anchor in re.findall(r"\]\(([^)\s#:]*\.md)?#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        text = ((page.parent / target) if target else page).read_text(encoding="utf-8")
        if anchor not in {
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        }:
            wrong.append(f"{target}#{anchor}")
    assert wrong == []


HELP = sorted(PACK.glob("web/docs/**/*.md"))
# What the second column of a help page's table may be: the panel is 285 pixels wide and cuts off what is further right.
EXPLANATIONS = {"What it does", "What it is", "Effects", "Nodes in between", "作用", "说明", "效果", "中间的节点"}


def tables(text: str) -> list[list[list[str]]]:
    """All tables of a page, each as rows of cells; the line below the header is left out."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in block.splitlines()]
        found.append([row for row in rows if not set("".join(row)) <= {"-", ":"}])
    return found


@pytest.mark.parametrize("page", HELP, ids=lambda page: page.relative_to(PACK).as_posix())
def test_tables_of_help_pages_explain_in_the_second_column(page):
    found = tables(page.read_text(encoding="utf-8"))
    assert len(found) >= 2
    for header, *rows in found:
        assert len(header) <= 3 and header[1] in EXPLANATIONS, header
        assert [row for row in rows if len(row) != len(header) or not row[1]] == []


def test_the_search_finds_tables():
    assert tables("a\n| A | B |\n|---|---|\n| x | `y\\|z` |\n\n| C |\n|---|\n") == [[["A", "B"], ["x", "`y\\|z`"]], [["C"]]]


BOOK = [PACK / "README.md", *sorted(PACK.glob("docs/*.md"))]
# A path from the pack's folder on, and a command with its options, up to the end of its code span or line.
PATHS = re.compile(
    r"(?<![\w/.-])(?:tests|scripts|benchmarks|step1x_core|nodes|miniature|workers|docs|web|assets)/[\w./-]*\w\.(?:py|md|json|txt|ini|jpg|png)\b"
)
COMMANDS = re.compile(r"python (\w[\w/]*\.py)([^`#\n]*(?:\n[^`#\n]+)*?)(?=[`#]|\n\n|\npython|\n```)")


@pytest.mark.parametrize("page", BOOK, ids=lambda page: page.relative_to(PACK).as_posix())
def test_paths_and_options_of_commands_are_there(page):
    text = page.read_text(encoding="utf-8")
    wrong = [path for path in PATHS.findall(text) if not (PACK / path).exists()]
    for script, arguments in COMMANDS.findall(text):
        # ComfyUI's and the GGUF pack's own scripts are not ours; scripts/test.py hands its options to pytest.
        if script in ("main.py", "convert.py", "scripts/test.py"):
            continue
        source = (PACK / script).read_text(encoding="utf-8")
        wrong += [f"{script} {option}" for option in re.findall(r"(?<![\w-])--[\w-]+", arguments) if f'"{option}"' not in source]
    assert wrong == []


def test_the_search_finds_paths_and_commands():
    assert PATHS.findall("`tests/a.py`, (docs/b.md) and other/tests/c.py") == ["tests/a.py", "docs/b.md"]
    assert COMMANDS.findall("`python scripts/a.py IN\n--x 1` and\n```\npython b.py --y   # z\n```") == [
        ("scripts/a.py", " IN\n--x 1"),
        ("b.py", " --y   "),
    ]
    assert sum(len(COMMANDS.findall(page.read_text(encoding="utf-8"))) for page in BOOK) > 40


def test_files_that_the_architecture_page_names_are_there():
    """Paths in backticks, from the pack's folder or from step1x_core on; `name` in `file` is a definition of that file."""
    page = (PACK / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {name for name in re.findall(r"`([\w./]+)`", page) if name.endswith((".py", ".json", "/")) and "ROOM" not in name}
    assert len(names) > 60
    assert [name for name in sorted(names) if not any((root / name).exists() for root in (PACK, PACK / "step1x_core"))] == []
    for name, file in [
        *re.findall(r"`(\w+)` in `([\w./]+\.py)`", page),
        *((name, file) for file, name in re.findall(r"`([\w./]+\.py)` \(`(\w+)`\)", page)),
    ]:
        assert re.search(
            rf"^\s*(def |class )?{name}\b", (PACK / "step1x_core" / file).read_text(encoding="utf-8"), re.MULTILINE
        ), f"{file} has no {name}"


def offers() -> dict[str, str]:
    """Old id -> new id, as nodes/earlier.py has them."""
    tree = ast.parse((PACK / "nodes" / "earlier.py").read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "EARLIER")
    return {key.value: offer.args[0].value for key, offer in zip(table.keys, table.values)}


def test_the_table_of_earlier_ids_is_that_of_the_code():
    """Every id of 0.1.0 is in the table once. A row that says "by hand" has no offer: what it became is an input, not a node."""
    page = (PACK / "docs" / "other_packs.md").read_text(encoding="utf-8")
    section = page.split("## Nodes of 0.1.0")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*)\|$", section, re.MULTILINE)
    by_hand = {old for old, _, note in rows if note.startswith("by hand")}
    assert len({old for old, *_ in rows}) == len(rows) == 34 and by_hand == {"Step1XReferences"}
    assert {old for old, *_ in rows} - by_hand == offers().keys() - by_hand
    assert {old: new for old, new, _ in rows if old not in by_hand} == offers()


def test_the_install_page_names_everything_that_install_downloads():
    page = (PACK / "docs" / "install.md").read_text(encoding="utf-8")
    for name, model in install.MODELS.items():
        assert (
            f"`{name}`" in page
            and f"`{model.folder}`" in page
            and (model.repository in page or f"`-{name.split('-')[-1]}`" in page)
        ), name


def test_readme_is_short_and_leads_to_every_page():
    readme = (PACK / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 130
    assert [page.name for page in PACK.glob("docs/*.md") if f"](docs/{page.name})" not in readme] == []


def test_readme_begins_with_the_two_commands_and_three_steps():
    """What it is, an image, the two commands and the first edit come before everything else."""
    first = (PACK / "README.md").read_text(encoding="utf-8").split("\n## ")[:2]
    assert all(command in first[0] for command in ("python scripts/demo.py", "python scripts/test.py", "![source](assets/scene.png)"))
    assert (
        re.findall(r"^\d(?=\. \*\*)", first[1], re.MULTILINE) == ["1", "2", "3"]
        and len(first[0].splitlines()) + len(first[1].splitlines()) < 40
    )
    download = re.search(r"install\.py --download ([\w. ]+)`", first[1])[1].split()
    assert {*download} <= {*install.MODELS}
