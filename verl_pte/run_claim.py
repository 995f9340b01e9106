"""Whose a run's folder is: its ``settings.json`` says what the run is, so that another one is not mixed into it.

A command that can be stopped and goes on (warm-start, evaluate) checks its folder before anything heavy is loaded and
claims it before it writes a result. Left out: the results, which are the command's.
"""

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

SETTINGS = "settings.json"
UNFINISHED = ".unfinished"
_KIND = "run"


def check_free(folder: Path, kind: str, own: Collection[str] = ()) -> None:
    """Raise ValueError if `folder` is a file, or holds something else than a run of this kind; files named in `own` may
    be there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: must be a folder, this is a file")
    if folder.is_dir() and not (folder / SETTINGS).is_file():
        foreign = sorted(p.name for p in folder.iterdir() if p.suffix != UNFINISHED and p.name not in own)
        if foreign:
            raise ValueError(f"--output {folder}: holds {foreign[0]} and no {kind}; give a new or an empty folder")
    elif folder.is_dir() and saved_settings(folder, kind) is None:
        raise ValueError(f"--output {folder}: its {SETTINGS} is of another kind of run; give a new or an empty folder")


def check_same(folder: Path, kind: str, settings: dict[str, Any], option: Callable[[str], str]) -> None:
    """Raise ValueError if `folder` holds a run of other settings; `option` spells a setting as the user gives it."""
    saved = saved_settings(folder, kind)
    if saved is None:
        return
    for name in sorted(settings.keys() | saved.keys()):
        if settings.get(name) != saved.get(name):
            raise ValueError(
                f"{option(name)} {settings.get(name)}: --output {folder} holds a run with {saved.get(name)}; "
                "give that to continue it, or another folder"
            )


def saved_settings(folder: Path, kind: str) -> dict[str, Any] | None:
    """What the run of this kind in `folder` is, by option; None if it holds none."""
    path = folder / SETTINGS
    saved = json.loads(path.read_text()) if path.is_file() else {}
    return saved if saved.pop(_KIND, None) == kind else None


def claim(folder: Path, kind: str, settings: dict[str, Any]) -> None:
    """Make the folder this run's."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / SETTINGS, json.dumps({_KIND: kind} | settings, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is the old or the new one at any moment."""
    unfinished = unfinished_name(path)
    unfinished.write_text(text)
    os.replace(unfinished, path)


def unfinished_name(path: Path) -> Path:
    """What `path` is called while it is written."""
    return path.with_name(path.name + UNFINISHED)
