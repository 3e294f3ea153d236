"""Find the folder of a model or tokenizer: the user's folder, a shipped model, or a repository of the Hugging Face hub.

It knows where files can be, not what they contain. Packages register the models that they ship (`gpt_config.shipped`).
`huggingface_hub` is imported only to look up a hub name.
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

# The owners of the published models on the hub. The model may be named with or without its owner.
_OWNERS = {"gpt2": "openai-community", "distilgpt2": "distilbert"}
# OpenAI's names for its four models.
_SIZES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}

# Timeout of the check that the hub answers. Without a network the hub client itself retries for half a minute.
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
    """The short name of a published model: gpt2, gpt2-medium, gpt2-large, gpt2-xl or distilgpt2. None for other names."""
    short = _SIZES.get(name, name.rpartition("/")[2])
    return short if short in PRESETS and name in (*_names_of(short), *_SIZES) else None


def _download(repository: str, **options: Any) -> str:
    """The folder of a repository in the hub's cache. The repository is downloaded unless `local_files_only` is true."""
    from huggingface_hub import snapshot_download

    folder: str = snapshot_download(repository, **options)
    return folder


def _answers() -> bool:
    """Whether the hub answers an HTTP request within the timeout, which also covers a DNS look-up that hangs."""
    import urllib.error  # here, because its import takes longer than that of all of gpt_config
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
        except urllib.error.HTTPError:  # an error page is also an answer
            answers.put(True)
        except (OSError, ValueError):
            answers.put(False)

    threading.Thread(target=probe, daemon=True).start()
    try:
        return answers.get(timeout=_PROBE_SECONDS)
    except queue.Empty:
        return False


class Hub(NamedTuple):
    """Access to the hub: `download` as `huggingface_hub.snapshot_download`, and `answers`: whether the hub is reachable."""

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
    """The folder of a model or tokenizer.

    The name is looked up in this order: folders, shipped models, the hub's cache, the hub. A cached repository is used only
    if it is `complete`. The same holds for a folder with the name of a shipped or published model.

    `files` are sets of file patterns. Each set is downloaded only if the folder is not `complete` after the previous ones.

    Raises ModelNotFoundError, which says what to do, and InputTypeError if the name is not a str or path.
    """
    if not isinstance(name_or_folder, (str, os.PathLike)):
        raise InputTypeError(f"the name of a model must be a str or path, not {type(name_or_folder).__name__}")
    name = str(name_or_folder)
    if not name:
        raise ModelNotFoundError("the name of the model is empty: name a folder, a shipped model, or a hub repository")
    try:
        folder = Path(name_or_folder).expanduser()
    except RuntimeError:
        raise ModelNotFoundError(f"{name!r} is in the home folder of an unknown user: check the path") from None
    is_folder = _is(folder.is_dir)
    if is_folder and _is(lambda: complete(folder)):
        return folder
    shipped = shipped_models().get(name)
    # An incomplete folder named gpt2, such as this package's own source, does not hide the published model.
    if is_folder and shipped is None and published_name(name) is None:
        return folder
    if shipped is not None:
        return shipped
    if _is(folder.is_file):
        raise ModelNotFoundError(f"{name} is a file: name the folder that contains config.json and the weights")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ModelNotFoundError(f"there is no folder {name!r}, and it is not a hub name: check the path")
    return _locate_on_hub(name, files, complete, hub)


def _is(test: Callable[[], bool]) -> bool:
    """The result of `test`, or False if it raises OSError: the path is too long, or the folder cannot be read."""
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
        except Exception:  # not cached, or a damaged cache: the client documents no exceptions for these
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
        raise ModelNotFoundError(f"{wanted}, and its download failed ({reason}): check the name and the network") from None
    raise ModelNotFoundError(f"the hub's repository {names[-1]!r} lacks required files: name another repository")


def _listed_models() -> str:
    """The names of the shipped models, for a message."""
    return ", ".join(shipped_models()) or "none is installed"
