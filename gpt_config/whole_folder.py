"""Write several files of a model folder so that a killed process leaves all old ones, all new ones, or a mark.

All new files are first written to a temporary folder. Then this folder gets the name `unfinished.REMOVING`, which marks the
model folder as not whole; old files are removed, the name becomes `unfinished.MOVING`, new files are moved to their places,
and the empty folder is removed. So old and new files are never side by side, also for programs that do not know the mark,
and the next writer can complete the change from any point. Standard library only.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_config.atomic_write import is_temporary, temporary_folder, write_error
from gpt_config.errors import GPT2Warning, WriteError
from gpt_config.folder_lock import locked
from gpt_config.locate import TOKENIZER_FILES
from gpt_config.unfinished import MOVING, READ_FIRST, REMOVING

_WEIGHTS = r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)(\.index\.json)?"
_TOKENIZER = "|".join(map(re.escape, TOKENIZER_FILES))

# A file whose name matches the first pattern replaces all files that match the second.
_REPLACED = (
    (r"config\.json", r"hparams\.json|generation_config\.json|classifier\.json"),
    (r"adapter_config\.json", r"adapter_model\.(safetensors|bin)|classifier\.json"),
    (_WEIGHTS, _WEIGHTS),
    (_TOKENIZER, _TOKENIZER),
)


@contextmanager
def whole_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files become files of `folder` when the block ends, all of them or none.

    New weights replace all old weights, a new tokenizer all files of the old one; files of other kinds stay. Blocks may be
    nested: one for the temporary folder of another is that folder, so all their files are written when the outer one ends.

    Raises WriteError if another process or thread is writing to `folder`, if the files cannot be written, or if `folder`
    would contain a model and an adapter. After an error in the block, the files of `folder` are unchanged.
    """
    folder = Path(folder)
    if is_temporary(folder):
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as is_locked:
            if not is_locked:
                warnings.warn(f"{folder} cannot be locked: two programs that write there are not noticed", GPT2Warning, 3)
            complete(folder)
            with temporary_folder(folder) as new:
                with _named(new, folder):
                    yield new
                if names := os.listdir(new):
                    _check(folder, names)
                    os.rename(new, folder / REMOVING)
                    complete(folder)
    except WriteError:
        raise
    except BlockingIOError:
        raise WriteError(f"another program is writing to {folder}: wait until it ends, or choose another folder") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "\0" not in str(folder):  # of the block
            raise
        raise write_error(folder, error) from None


def complete(folder: Path) -> None:
    """Complete the change that a writer has begun; it may have been killed. Only for who has locked `folder`.

    Raises WriteError if a file cannot be removed or moved: the folder then stays marked.
    """
    try:
        _complete(folder)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename}"
        raise WriteError(f"cannot replace the files of {folder} ({reason}): remove the cause, then write it again") from None


def _complete(folder: Path) -> None:
    if (folder / REMOVING).is_dir():
        for name in _replaced(folder, os.listdir(folder / REMOVING)):
            (folder / name).unlink(missing_ok=True)
        os.rename(folder / REMOVING, folder / MOVING)
    if (folder / MOVING).is_dir():
        for name in sorted(os.listdir(folder / MOVING), key=_place, reverse=True):
            os.replace(folder / MOVING / name, folder / name)
        (folder / MOVING).rmdir()


def _replaced(folder: Path, new: list[str]) -> list[str]:
    """The files of `folder` that the `new` ones replace, in the order in which they are removed."""
    patterns = [old for kind, old in _REPLACED if any(re.fullmatch(kind, name) for name in new)]
    names = (name for name in os.listdir(folder) if name in new or any(re.fullmatch(old, name) for old in patterns))
    return sorted(names, key=_place)


def _place(name: str) -> int:
    return READ_FIRST.index(name) if name in READ_FIRST else len(READ_FIRST)


def _check(folder: Path, new: list[str]) -> None:
    old = _replaced(folder, new)
    for name in old:
        if (folder / name).is_dir():
            raise WriteError(f"cannot write {folder / name}: a folder has this name; remove it, or choose another path")
    staying = set(os.listdir(folder)) - set(old)
    if _has_model(new) and "adapter_config.json" in staying:
        raise WriteError(f"{folder} contains an adapter: write the model into another folder")
    if "adapter_config.json" in new and _has_model(staying):
        raise WriteError(f"{folder} contains a model: write the adapter into another folder")


def _has_model(names: Iterable[str]) -> bool:
    return "config.json" in names and any(re.fullmatch(_WEIGHTS, name) for name in names)


@contextmanager
def _named(new: Path, folder: Path) -> Iterator[None]:
    """Let errors of the block name `folder` instead of the temporary folder."""
    try:
        yield
    except WriteError as error:
        raise WriteError(str(error).replace(str(new), str(folder))) from None
