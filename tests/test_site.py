"""The documentation site builds strictly: every page in the navigation, no link or anchor that leads nowhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_LEFT = {"adapters", "main_ppo"}  # folders in which the learning benchmark leaves the model cards of adapters
PAGES = sorted(p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md") if not _LEFT & set(p.parts))


def _build(site: Path, root: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", root / "mkdocs.yml", "-d", site]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of the theme's authors, about a later mkdocs
    return subprocess.run(command, cwd=site.parent, env=env, capture_output=True, text=True)


def _html(site: Path, page: str) -> str:
    return (site / page / "index.html").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site") / "site"
    built = _build(site)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return site


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A small repository that builds: this one's settings and hook, a page, and a file outside docs/."""
    root = tmp_path / "copy"
    (root / "docs").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "repository_links.py", root / "docs")
    settings = (ROOT / "mkdocs.yml").read_text()
    nav = "nav:\n  - index.md\n  - page.md\n\n"
    (root / "mkdocs.yml").write_text(re.sub(r"^nav:\n.*?\n\n(?=\w)", nav, settings, flags=re.M | re.S))
    (root / "README.md").write_text("# Home\n\n[page](docs/page.md#a-heading-of-code_here)\n")
    (root / "docs" / "page.md").write_text("# Page\n\n## A heading: of `code_here`!\n\n[recipe](../recipes/a.yaml)\n")
    (root / "recipes").mkdir()
    (root / "recipes" / "a.yaml").write_text("key: '[no link](../nowhere.md)'\n")
    return root


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert len(PAGES) > 15
    for page in PAGES:
        address = f"{page.with_suffix('')}/"
        assert (site / address / "index.html").is_file(), page
        assert re.search(rf'<a href="{address}" class="md-nav__link"', home), f"{page} is not in nav of mkdocs.yml"


def test_the_readme_is_the_home_page(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert 'src="images/overview.svg"' in home and (site / "images" / "overview.svg").is_file()
    assert 'href="repository/examples/quickstart/"' in home and 'href="repository/recipes/"' in home


def test_files_outside_docs_are_pages(site: Path) -> None:
    assert "Runtime patches" in _html(site, "repository/patches")
    recipe = re.sub(r"<[^>]+>", "", _html(site, "repository/recipes/pte_grpo.yaml"))
    assert "ppo_trainer" in recipe
    assert 'href="../../../verl/#rewards"' in _html(site, "repository/examples/rewards")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        loads = re.findall(r"<(?:script|img|iframe)[^>]+src=\"([^\"]+)\"|<link[^>]+href=\"([^\"]+)\"", file.read_text())
        assert loads and not [a or b for a, b in loads if re.match(r"(https?:)?//", a or b)], file


def test_text_is_searched(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert {"troubleshooting/", "configuration/#knobs"} <= {entry["location"] for entry in index["docs"]}


def test_the_copy_builds(copy: Path, tmp_path: Path) -> None:
    built = _build(tmp_path / "site", copy)
    assert built.returncode == 0, built.stderr
    assert 'href="page/#a-heading-of-code_here"' in (tmp_path / "site" / "index.html").read_text()
    assert 'href="../repository/recipes/a.yaml/"' in _html(tmp_path / "site", "page")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a](nowhere.md)", "nowhere.md"),
        ("[a](../recipes/nowhere.yaml)", "nowhere.yaml"),
        ("[a](../../outside.md)", "outside.md"),
        ("![a](images/nowhere.png)", "nowhere.png"),
        ("[a](#nowhere)", "#nowhere"),
        ("[a](../README.md#nowhere)", "#nowhere"),
        ("[a](/page.md)", "/page.md"),
        ("[a](nowhere)", "nowhere"),
    ],
)
def test_a_link_that_leads_nowhere_fails(copy: Path, tmp_path: Path, text: str, message: str) -> None:
    page = copy / "docs" / "page.md"
    page.write_text(f"{page.read_text()}\n{text}\n")
    built = _build(tmp_path / "site", copy)
    assert built.returncode == 1 and message in built.stderr, built.stderr


def test_a_page_that_is_not_in_the_navigation_fails(copy: Path, tmp_path: Path) -> None:
    (copy / "docs" / "more.md").write_text("# More\n")
    built = _build(tmp_path / "site", copy)
    assert built.returncode == 1 and "more.md" in built.stderr


def test_links_in_code_are_text(copy: Path, tmp_path: Path) -> None:
    page = copy / "docs" / "page.md"
    code = "[a](../recipes/a.yaml)"
    page.write_text(f"{page.read_text()}\nSay `{code}` or\n\n    {code}\n\n```\n{code}\n```\n")
    assert _build(tmp_path / "site", copy).returncode == 0
    assert _html(tmp_path / "site", "page").count(code) == 3


@pytest.mark.parametrize(
    ("path", "page"),
    [
        ("README.md", "index.md"),
        ("docs/verl.md", "verl.md"),
        ("docs/images/overview.svg", "images/overview.svg"),
        ("docs/draw_images.py", "repository/docs/draw_images.py.md"),
        ("docs/results/learning/cells", "repository/docs/results/learning/cells.md"),
        ("CHANGELOG.md", "repository/CHANGELOG.md"),
        ("examples/quickstart", "repository/examples/quickstart/README.md"),
        ("recipes/pte_grpo.yaml", "repository/recipes/pte_grpo.yaml.md"),
    ],
)
def test_place_of_a_file_on_the_site(path: str, page: str) -> None:
    assert _hook().site_path(path, ROOT) == page


@pytest.mark.parametrize(
    ("target", "page", "path"),
    [
        ("../recipes/pte_grpo.yaml", "docs/verl.md", "recipes/pte_grpo.yaml"),
        ("learning/learning.md#x", "docs/results/../results/any.md", "docs/results/learning/learning.md"),
        ("docs/verl.md", "README.md", "docs/verl.md"),
        ("#here", "README.md", None),
        ("https://arxiv.org/abs/2602.16839", "README.md", None),
        ("//arxiv.org/docs", "README.md", None),
        ("/docs/verl.md", "README.md", None),
        ("docs/nowhere.md", "README.md", None),
        ("../README.md", "README.md", None),
    ],
)
def test_file_that_a_link_leads_to(target: str, page: str, path: str | None) -> None:
    assert _hook().linked(target, page, ROOT) == path


def _hook():
    spec = spec_from_file_location("repository_links", ROOT / "docs" / "repository_links.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
