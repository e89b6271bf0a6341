"""What pyproject.toml tells the registry: paths exist, placeholders are the same everywhere, extras and platforms are those of the code and the docs."""

import re
import subprocess
from urllib.parse import urlsplit

import environment
import pytest
import yaml
from conftest import PACK
from PIL import Image

tomllib = pytest.importorskip("tomllib", reason="this Python has no tomllib (3.11 and newer have it)")

PYPROJECT = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
REPOSITORY = PROJECT["urls"]["Repository"]
OWNER, NAME = urlsplit(REPOSITORY).path.strip("/").split("/")
TEXT = {".py", ".md", ".toml", ".json", ".yml", ".js", ".mjs", ".txt"}
ADDRESS = re.compile(r"(?:github\.com|raw\.githubusercontent\.com)[/:]([\w.-]+)/(" + re.escape(NAME) + r")\b", re.IGNORECASE)
PIP = re.compile(r"pip install ([a-z][\w-]+)")
LARGE = 250_000
LARGE_FOLDERS = ("miniature/weights/", "tests/parity/goldens/")


def git(*arguments: str) -> list[str]:
    """Paths that git prints; skips outside a clone, as in the registry's archive."""
    if not (PACK / ".git").exists():
        pytest.skip("not a git clone: which files are tracked cannot be told")
    output = subprocess.run(["git", "-C", str(PACK), *arguments, "-z"], capture_output=True, text=True, encoding="utf-8", check=True).stdout
    return [path for path in output.split("\0") if path]


def shipped_files() -> list[str]:
    """What `comfy node pack` takes: tracked files without those that .comfyignore names, in git's own pattern language."""
    ignore = PACK / ".comfyignore"
    ignored = git("ls-files", "--cached", "--ignored", f"--exclude-from={ignore}") if ignore.is_file() else []
    return sorted(set(git("ls-files")) - set(ignored))


def texts() -> dict[str, str]:
    """The pack's text files, by path."""
    roots = ("nodes", "step1x_core", "scripts", "docs", "web", "locales", "workflows", "subgraphs", "benchmarks", "miniature", "workers")
    files = [path for path in PACK.iterdir() if path.is_file()] + [path for root in roots for path in (PACK / root).rglob("*")]
    return {path.relative_to(PACK).as_posix(): path.read_text(encoding="utf-8") for path in files if path.suffix in TEXT}


def test_named_paths_exist():
    ruff = PYPROJECT["tool"]["ruff"]
    paths = [
        PROJECT["license"]["file"],
        PROJECT["readme"],
        *COMFY["includes"],
        *ruff["extend-exclude"],
        *ruff["lint"]["isort"]["known-first-party"],
    ]
    assert [path for path in paths if not (PACK / path).exists()] == []


def test_the_required_comfyui_is_the_oldest_tested():
    assert COMFY["requires-comfyui"] == f">={environment.OLDEST.comfyui}"


def test_the_newest_changes_are_of_this_version():
    newest = re.search(r"^## (\S+)", (PACK / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == PROJECT["version"] and re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])


@pytest.mark.parametrize("field, limit", [("Icon", 60_000), ("Banner", 300_000)])
def test_icon_and_banner(field, limit):
    """The registry asks for a square icon of at most 400 x 400 pixels and a banner of 21:9."""
    address = urlsplit(COMFY[field])
    owner, name, _, path = address.path.strip("/").split("/", 3)
    file = PACK / path
    assert address.hostname == "raw.githubusercontent.com" and (owner, name) == (OWNER, NAME)
    assert file.parent == PACK / "assets" and file.stat().st_size <= limit
    width, height = Image.open(file).size
    assert (width == height <= 400) if field == "Icon" else (width * 9 == height * 21)


def test_placeholders_are_named_in_one_comment():
    """The comment on top of pyproject.toml names every placeholder that is still in the pack; once it is deleted, none may be left."""
    comment = (PACK / "pyproject.toml").read_text(encoding="utf-8").split("[project]")[0]
    left = {f'"{OWNER}/{NAME}"'} if OWNER == NAME else set()
    left |= {"PublisherId"} if COMFY["PublisherId"] == PROJECT["name"] else set()
    left |= {
        name
        for path, text in texts().items()
        if path.endswith(".md")
        for name in re.findall(r"\b[A-Z]+(?:_[A-Z]+)*_REPOSITORY\b", text)
    }
    assert [name for name in left if name not in comment] == []
    assert comment.startswith("# Placeholders") == bool(left)


def test_every_address_of_this_repository_is_the_one_in_pyproject():
    found = {
        (path, match[0])
        for path, text in texts().items()
        for match in ADDRESS.finditer(text)
        if (match[1], match[2]) != (OWNER, NAME)
    }
    assert found == set()
    assert all(address.startswith(REPOSITORY) for address in PROJECT["urls"].values())
    # The search sees pyproject.toml's own, so a wrong one elsewhere would be seen, too.
    assert len(ADDRESS.findall(texts()["pyproject.toml"])) >= 5


def test_extras_are_the_packages_that_the_code_asks_for():
    extras = {re.match(r"[\w-]+", line)[0] for lines in PROJECT["optional-dependencies"].values() for line in lines}
    asked = {name for path, text in texts().items() if path.startswith(("nodes/", "step1x_core/")) for name in PIP.findall(text)}
    documented = {name for path, text in texts().items() if path.startswith(("README", "docs/", "web/")) for name in PIP.findall(text)}
    assert extras == asked
    assert documented - {"comfy-cli"} <= extras


def test_requirements_are_the_dependencies():
    lines = (PACK / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("#")] == PROJECT["dependencies"]


def test_untested_platforms_are_not_classified():
    """A vendor in a sentence of the README or docs that says 'untested' or 'not tried' is no classifier."""
    classified = " ".join(PROJECT["classifiers"])
    pages = " ".join(text for path, text in texts().items() if path == "README.md" or path.startswith("docs/"))
    sentences = [sentence for sentence in re.split(r"(?<=[.;:])\s(?=[A-Z])", pages) if re.search("untested|not tried", sentence)]
    untested = {vendor for vendor in ("AMD", "Apple", "Intel", "Huawei") if any(vendor in sentence for sentence in sentences)}
    assert {"AMD", "Apple", "Intel"} <= untested
    assert [vendor for vendor in untested if vendor in classified] == []


def test_the_archive_holds_every_tracked_file():
    """A pattern such as `training/` once also left out step1x_core/training. The README's commands, the tests and the pages need the rest."""
    assert sorted(set(git("ls-files")) - set(shipped_files())) == []


def test_large_files_are_weights_and_recorded_values():
    large = [path for path in shipped_files() if (PACK / path).is_file() and (PACK / path).stat().st_size > LARGE]
    assert large and [path for path in large if not path.startswith(LARGE_FOLDERS)] == []


def test_ci_validates_packs_and_runs_the_archive():
    job = yaml.safe_load((PACK / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]["registry"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert any("comfy-cli" in run for run in runs) and ".ci/registry" in runs
    script = (PACK / ".ci" / "registry").read_text(encoding="utf-8")
    assert all(command in script for command in ("node validate", "node pack", "scripts/demo.py", "scripts/test.py"))
