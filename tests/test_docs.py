"""The documentation keeps up with the code: generated pages and pictures, links, quoted errors and worked examples. Its
commands are in test_commands.py, the site in test_site.py."""

import ast
import doctest
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MARKDOWN = sorted(
    p
    for p in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("patches/*.md"),
        *ROOT.glob("recipes/*.md"),
    ]
    if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
)
TEXT_FILES = (".md", ".py", ".toml", ".txt", ".yaml", ".yml", ".sh", ".svg", ".cfg", "")


def _names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


def _load(path: Path):
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _anchors(markdown: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", markdown, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_configuration_is_up_to_date() -> None:
    generator = _load(ROOT / "docs" / "generate_configuration.py")
    assert generator.TARGET.read_text() == generator.render(), "run `make docs`"


def test_pictures_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawer = _load(ROOT / "docs" / "draw_images.py")
    committed = drawer.IMAGES
    monkeypatch.setattr(drawer, "IMAGES", tmp_path)
    drawer.main()
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in committed.glob("*.svg")) and "window.svg" in drawn
    for name in drawn:
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes(), f"{name}: run `make docs`"


def test_every_knob_is_documented() -> None:
    from verl_pte import PTEConfig

    text = (ROOT / "docs" / "configuration.md").read_text()
    names = [name for name, _, _ in PTEConfig.knobs()]
    assert {"rank", "window", "evict_fraction", "update_strength", "reference_cache"} < set(names)
    assert [name for name in names if f"| `{name}` |" not in text] == []


def test_examples_of_concepts_are_right() -> None:
    results = doctest.testfile(str(ROOT / "docs" / "concepts.md"), module_relative=False)
    assert results.attempted >= 6 and results.failed == 0


def _quoted_messages(markdown: str, head: str = "message") -> list[str]:
    """Code in the first column of the tables whose first column has this head."""
    tables = re.findall(rf"^\| {head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", markdown, flags=re.M)
    return [code for row in "".join(tables).splitlines() for code in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def _strings(path: Path) -> list[str]:
    """String constants of a Python file; those side by side are one, an f-string's are what lies between its braces."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_errors_that_troubleshooting_quotes_are_the_codes() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = _quoted_messages(page)
    assert len(messages) > 30
    files = [*(ROOT / "verl_pte").rglob("*.py"), *(ROOT / "patches").glob("*.py")]
    strings = [text for file in files for text in _strings(file)]
    assert [message for message in messages if not any(message in text for text in strings)] == []
    import verl

    (of_verl,) = _quoted_messages(page, "message of verl")
    resources = Path(verl.__file__).parent / "single_controller" / "ray" / "base.py"
    assert any(of_verl in text for text in _strings(resources))


@pytest.mark.parametrize("path", MARKDOWN, ids=_names(MARKDOWN))
def test_links_resolve(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)|<img[^>]+src=\"([^\"]+)\"", path.read_text()):
        link = next(filter(None, target))
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        goal = (path.parent / file) if file else path
        if not goal.exists() or (anchor and anchor not in _anchors(goal.read_text())):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", MARKDOWN, ids=_names(MARKDOWN))
def test_recipes_named_exist(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(r"--config-name[ =]([\w.\-]+)", text):
        assert (ROOT / "recipes" / f"{name}.yaml").is_file(), name
    for name in re.findall(r"recipes/([\w.\-]+\.yaml)", text):
        assert (ROOT / "recipes" / name).is_file(), name


@pytest.mark.parametrize("path", MARKDOWN, ids=_names(MARKDOWN))
def test_pte_settings_named_exist(path: Path) -> None:
    from verl_pte import PTEConfig

    known = {name for name, _, _ in PTEConfig.knobs()}
    assert set(re.findall(r"actor_rollout_ref\.model\.pte\.(\w+)", path.read_text())) <= known


@pytest.mark.parametrize("path", MARKDOWN, ids=_names(MARKDOWN))
def test_make_targets_named_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"`make ([\w-]+)", path.read_text())) <= targets


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in place of the reader's."""
    from tiny import tiny_model

    tiny_model().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block.replace("path/to/model", "model"), "README.md", "exec"), names)
    assert [len(output.token_ids) for output in names["outputs"]] == [64] * 4
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in names["model"].parameters())


def test_baselines_of_the_readme_are_settings() -> None:
    """Those that have a recipe are what the recipe sets."""
    from verl_pte import PTEConfig

    section = (
        (ROOT / "README.md").read_text().partition("Baselines are settings")[2].partition("\n\nOn the command line")[0]
    )
    recipes = []
    for run, said in re.findall(r"^\| (.+?) \| (.+?) \|$", section, flags=re.M):
        settings = {key: yaml.safe_load(value) for key, value in re.findall(r"`(\w+): (\w+)`", said)}
        PTEConfig(**settings)
        for recipe in re.findall(r"`(\w+)`", run):
            content = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
            assert content["actor_rollout_ref"]["model"]["pte"] == settings, recipe
            recipes.append(recipe)
    assert recipes == ["lora_full", "lora_window", "global_only"]


def test_recipes_are_valid_yaml_with_known_settings() -> None:
    from verl_pte import PTEConfig

    known, have_some = {name for name, _, _ in PTEConfig.knobs()}, set()
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        pte = (yaml.safe_load(recipe.read_text()) or {}).get("actor_rollout_ref", {}).get("model", {}).get("pte", {})
        assert set(pte) <= known, recipe.name
        have_some |= {recipe.stem} if pte else set()
        if recipe.name == "pte_grpo.yaml":  # hydra overrides on the command line only what a recipe lists
            assert set(pte) == known
    assert have_some >= {"pte_grpo", "tiny_cpu", "lora_full"}


def test_packages_of_pyproject_are_complete() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "verl_pte").rglob("__init__.py")}
    assert listed == found | {"verl_pte.patches"}


def test_no_machine_paths_or_registry_hosts() -> None:
    """Nothing that only means something on one machine, and no package index: pip is configured by its user."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.fail(f"not a git checkout: {listed.stderr}")
    places = ["/ho" + "me/", "/ro" + "ot/", "/wo" + "rk/", "/Us" + "ers/", "/opt/py" + "pi", "index" + "-url = "]
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "--index" + "-url", "mirror" + "s."]
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in TEXT_FILES and path.is_file():
            text = path.read_text(errors="ignore")
            found += [f"{name}: {word}" for word in places + hosts if word in text]
    assert found == []


def test_import_of_the_version_needs_nothing() -> None:
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    code = "import verl_pte; print(verl_pte.__version__)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert shown == declared
