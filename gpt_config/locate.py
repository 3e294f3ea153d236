"""From a name to a folder: a folder of the user's, a model that ships, or a repository of the Hugging Face hub.

It knows where files can be, not what is in them, and not which models ship: packages register theirs. `huggingface_hub` is
imported only when a hub name is asked for.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_config.errors import InputTypeError, ModelNotFoundError
from gpt_config.model_config import PRESETS
from gpt_config.shipped import shipped_models

# The published models' owners on the hub, and OpenAI's names for the sizes: all of them are one model under several names.
_OWNERS = {"gpt2": "openai-community", "distilgpt2": "distilbert"}
_SIZES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}

# Without a network the hub client retries for half a minute; this many seconds are enough to see that nothing answers.
_PROBE_SECONDS = 2.0

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "added_tokens.json",
    "special_tokens_map.json",
    "char_vocab.json",
)


def published_name(name: str) -> str | None:
    """`gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl` or `distilgpt2` if `name` is one of the names of that model."""
    short = _SIZES.get(name, name.rpartition("/")[2])
    return short if short in PRESETS and name in (*_names_of(short), *_SIZES) else None


def _download(repository: str, **options: Any) -> str:
    """The folder of a repository in the hub's cache, downloaded unless `local_files_only`."""
    from huggingface_hub import snapshot_download

    folder: str = snapshot_download(repository, **options)
    return folder


def _answers() -> bool:
    """Whether any HTTP answer comes from the hub in time; a look-up of its address that hangs counts as none."""
    import urllib.error  # here, because it takes longer to import than the rest of this floor together
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: queue.Queue[bool] = queue.Queue()

    def probe() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
            answers.put(True)
        except urllib.error.HTTPError:  # an error page is an answer too
            answers.put(True)
        except (OSError, ValueError):
            answers.put(False)

    threading.Thread(target=probe, daemon=True).start()
    try:
        return answers.get(timeout=_PROBE_SECONDS)
    except queue.Empty:
        return False


class Hub(NamedTuple):
    """How the hub is reached: a download as `huggingface_hub.snapshot_download` does it, and whether the hub answers."""

    download: Callable[..., str] = _download
    answers: Callable[[], bool] = _answers


HUGGING_FACE = Hub()


def locate(
    name_or_folder: str | os.PathLike[str],
    *,
    files: Sequence[Sequence[str]],
    complete: Callable[[Path], bool],
    hub: Hub = HUGGING_FACE,
) -> Path:
    """The folder that holds the model or tokenizer of that name.

    Looked for in this order: a folder, a model that ships with the package, the hub's cache, the hub. `files` are sets of
    patterns to download, the next one only if the folder is not `complete` with those before. A cached repository counts
    only if it is complete, and so does a folder that goes by a published model's name. ModelNotFoundError says what to do.
    """
    if not isinstance(name_or_folder, (str, os.PathLike)):
        raise InputTypeError(f"a model is named by a str or path, not {type(name_or_folder).__name__}")
    name = str(name_or_folder)
    if not name:
        raise ModelNotFoundError("the name of the model is empty: name a folder, a shipped model, or a hub repository")
    try:
        folder = Path(name_or_folder).expanduser()
    except RuntimeError:
        raise ModelNotFoundError(f"{name!r} begins with a user that this machine does not have: check the path") from None
    is_folder = _is(folder.is_dir)
    if is_folder and _is(lambda: complete(folder)):
        return folder
    shipped = shipped_models().get(name)
    # A folder that only happens to be called gpt2, such as this package's own source, does not hide the model.
    if is_folder and shipped is None and published_name(name) is None:
        return folder
    if shipped is not None:
        return shipped
    if _is(folder.is_file):
        raise ModelNotFoundError(f"{name} is a file: name the folder that holds config.json and the weights")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ModelNotFoundError(f"there is no folder {name!r}, and it is not a hub name: check the path")
    return _locate_on_hub(name, files, complete, hub)


def _is(test: Callable[[], bool]) -> bool:
    """False where the test itself fails: a name too long to be a path, a folder that may not be read."""
    try:
        return test()
    except OSError:
        return False


def _names_of(short: str) -> list[str]:
    return [short, f"{_OWNERS.get(short, _OWNERS['gpt2'])}/{short}"]


def _locate_on_hub(name: str, files: Sequence[Sequence[str]], complete: Callable[[Path], bool], hub: Hub) -> Path:
    short = published_name(name)
    names = _names_of(short) if short else [name]
    for repository in names:
        try:
            folder = Path(hub.download(repository, local_files_only=True))
        except Exception:  # not cached, or the cache is damaged: what the client raises for that is no contract of its
            continue
        if complete(folder):
            return folder
    wanted = f"{name!r} is neither a folder, nor a shipped model ({_listed_models()}), nor in the hub's cache"
    if not hub.answers():
        raise ModelNotFoundError(
            f"{wanted}, and the hub cannot be reached: connect to the network, or copy the model's folder here and name it"
        )
    try:
        for patterns in files:
            folder = Path(hub.download(names[-1], allow_patterns=list(patterns)))
            if complete(folder):
                return folder
    except Exception as error:  # HTTP errors, broken connections, pages that are not the hub's, a full disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"{wanted}, and the hub did not give it ({reason}): check the name and the network"
        ) from None
    raise ModelNotFoundError(f"the hub's repository {names[-1]!r} lacks the files that are needed: name another one")


def _listed_models() -> str:
    """The names of the shipped models."""
    return ", ".join(shipped_models()) or "none is installed"
