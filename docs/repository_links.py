"""A hook of mkdocs (mkdocs.yml): turns the repository's files and the links between them into pages of the site.

Markdown here is written to be read in the repository, so pages link to files outside docs/. On the site

- the README is the home page, and docs/X is X;
- any other file that a page links to is a page under repository/, with its path: Markdown as it is, other text as a
  code block, a folder as its README or, without one, as a list of its files.

Links are rewritten in the parsed document, where code is no link. What points nowhere stays as it is written, and
mkdocs warns of it. The source of a page is never changed.
"""

import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".toml": "toml", ".json": "json"}


def site_path(path: str, root: Path) -> str:
    """The page's source on the site for a file or folder of the repository, say
    ``recipes/a.yaml`` -> ``repository/recipes/a.yaml.md``. Images and data under docs/ are files of the site as is."""
    if path == "README.md":
        return "index.md"
    if (root / path / "README.md").is_file():
        return site_path(f"{path}/README.md", root)
    if (root / path).is_dir():
        return f"repository/{path}.md"
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def linked(target: str, page: str, root: Path) -> str | None:
    """The file or folder of the repository that a link on ``page`` leads to, as a path from ``root``; None if there is
    none: an address, an anchor of the same page, a path that does not exist or leaves the repository."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), parts.path))
    return path if path != "." and not path.startswith("..") and (root / path).exists() else None


def _text(path: str, root: Path) -> str:
    """Markdown of a repository file's page."""
    file = root / path
    if file.is_dir():
        names = sorted(p.name for p in file.iterdir() if p.is_file() and not p.name.startswith("."))
        return f"# {path}\n\n" + "\n".join(f"- [{name}]({file.name}/{name})" for name in names)
    if path.endswith(".md"):
        return file.read_text()
    return f"# {path}\n\n~~~~~~~~ {_LANGUAGES.get(file.suffix, 'text')}\n{file.read_text().rstrip()}\n~~~~~~~~\n"


class _Rewrite(Treeprocessor):
    """Links of the page that is rendered, from the repository's paths to the site's."""

    def __init__(self, md: Markdown, links: "_RepositoryLinks") -> None:
        super().__init__(md)
        self.links = links

    def run(self, root) -> None:  # an ElementTree's element
        links = self.links
        for element in root.iter():
            for name in {"a": ["href"], "img": ["src"]}.get(element.tag, []):
                target = element.get(name, "")
                path = linked(target, links.page, links.root)
                if path is not None:
                    start = posixpath.dirname(site_path(links.page, links.root))
                    fragment = urlsplit(target).fragment
                    goal = posixpath.relpath(site_path(path, links.root), start or ".")
                    element.set(name, goal + (f"#{fragment}" if fragment else ""))


class _RepositoryLinks(Extension):
    """Runs after links are parsed and before mkdocs resolves them (its own processor has priority 0)."""

    root = Path()
    page = ""  # path in the repository of the page that is rendered; pages are rendered one after another

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(_Rewrite(md, self), "repository_links", 5)


_links = _RepositoryLinks()
_sources: dict[str, str] = {}  # a page's source on the site -> its path in the repository


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    _links.root = Path(config.config_file_path).resolve().parent
    config.markdown_extensions.append(_links)  # type: ignore[arg-type]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README and, from page to page, every file that is linked to."""
    root = _links.root
    _sources.clear()
    _sources["index.md"] = "README.md"
    for file in files.documentation_pages():
        _sources[file.src_uri] = f"docs/{file.src_uri}"
    waiting = list(_sources.values())
    texts = {path: _text(path, root) for path in waiting}
    while waiting:
        page = waiting.pop()
        if not page.endswith(".md") and not (root / page).is_dir():
            continue  # code does not link
        for target in _LINK.findall(texts[page]):
            path = linked(target, page, root)
            if path is None or files.get_file_from_path(site_path(path, root)):
                continue
            uri = site_path(path, root)
            if uri not in _sources:
                path = f"{path}/README.md" if (root / path / "README.md").is_file() else path
                _sources[uri], texts[path] = path, _text(path, root)
                waiting.append(path)
    for uri, path in _sources.items():
        if not files.get_file_from_path(uri):
            files.append(File.generated(config, uri, content=texts[path]))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    _links.page = _sources[page.file.src_uri]
    return markdown
