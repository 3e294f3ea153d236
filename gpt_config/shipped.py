"""Which models ship, and where: packages register theirs when they are imported. It knows no package.

`import gpt2` runs it and has to be fast, so it imports what it needs when a name is looked up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_folders: list[str] = []
# Entry points of installed packages that register their models when they are imported: see pyproject.toml.
_ENTRY_POINTS = "gpt_config.shipped_models"


def register_shipped_models(folder: str) -> None:
    """Let the models in `folder` be found by name: each is a folder there with a config.json."""
    if folder not in _folders:
        _folders.append(folder)


def shipped_models() -> dict[str, Path]:
    """The folder of each model that ships, by its name, in alphabetical order.

    If no package has registered any, the installed packages that have an entry point for it are imported to do so. In a
    checkout, which has no entry points, they are looked for in the `assets` folders beside this package.
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
