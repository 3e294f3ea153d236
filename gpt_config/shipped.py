"""The registry of shipped models: each package registers its own on import. It knows no package by name.

`import gpt2` runs this module and must be fast, so other imports wait until a name is looked up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_folders: list[str] = []
# The group of entry points of the packages that register models on import; see pyproject.toml.
_ENTRY_POINTS = "gpt_config.shipped_models"


def register_shipped_models(folder: str) -> None:
    """Register the models in `folder`. Each subfolder with a config.json is a model, found by the subfolder's name."""
    if folder not in _folders:
        _folders.append(folder)


def shipped_models() -> dict[str, Path]:
    """The folders of the shipped models by name, in alphabetical order.

    If no package has registered a folder, the packages that have an entry point for this are imported and register theirs.
    A source checkout has no entry points; there the `assets` folders of the packages next to this one are used.
    """
    from pathlib import Path

    if not _folders:
        from importlib.metadata import entry_points

        for entry_point in entry_points(group=_ENTRY_POINTS):
            entry_point.load()
    if not _folders:
        for assets in Path(__file__).parents[1].glob("*/assets"):
            register_shipped_models(str(assets))
    found = {path.parent.name: path.parent for folder in _folders for path in Path(folder).glob("*/config.json")}
    return dict(sorted(found.items()))
