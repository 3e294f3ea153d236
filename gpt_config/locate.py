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
from gpt_config.unfinished import check_finished

# The owners of the published models on the hub. The model may be named with or without its owner.
_OWNERS = {"gpt2": "openai-community", "distilgpt2": "distilbert"}
# OpenAI's names for its four models.
_SIZES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}

# Timeout of the check that the hub can be reached: the DNS look-up and the connection. Without a network the hub client
# itself retries for half a minute. Its own timeout, HF_HUB_ETAG_TIMEOUT, holds for the answer, and for both if it is set.
_CONNECT_SECONDS = 2.0

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
    """Whether the hub answers an HTTP request. Raises TimeoutError if it can be reached and does not answer in time."""
    import urllib.error  # here, because its import takes longer than that of all of gpt_config
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    patience = float(constants.HF_HUB_ETAG_TIMEOUT)
    events: queue.Queue[bool] = queue.Queue()

    def probe() -> None:
        try:
            _connect(constants.ENDPOINT, patience)
            events.put(True)
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=2 * patience).close()  # longer, so that the wait below ends first
            events.put(True)
        except urllib.error.HTTPError:  # an error page is also an answer
            events.put(True)
        except (OSError, ValueError):
            events.put(False)

    threading.Thread(target=probe, daemon=True).start()  # a DNS look-up can hang, and it has no timeout of its own
    try:
        if not events.get(timeout=patience if "HF_HUB_ETAG_TIMEOUT" in os.environ else _CONNECT_SECONDS):
            return False
    except queue.Empty:
        return False
    try:
        return events.get(timeout=patience)
    except queue.Empty:
        raise TimeoutError(f"{constants.ENDPOINT} has not answered in {patience:g} seconds") from None


def _connect(url: str, timeout: float) -> None:
    """Open and close a connection to the server of `url`, or to the proxy for it. Raises OSError or ValueError."""
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    target = urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    socket.create_connection((target.hostname or "", port), timeout).close()


class Hub(NamedTuple):
    """Access to the hub: `download` as `huggingface_hub.snapshot_download`, and `answers`: whether the hub is reachable.

    `answers` may raise TimeoutError, whose message is shown.
    """

    download: Callable[..., str] = _download
    answers: Callable[[], bool] = _answers


HUGGING_FACE = Hub()


def user_path(name: str | os.PathLike[str]) -> Path:
    """The path with a home folder in place of `~` or `~user`. ModelNotFoundError if there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ModelNotFoundError(f"{str(name)!r} is in the home folder of an unknown user: check the path") from None


def locate(
    name_or_folder: str | os.PathLike[str],
    *,
    files: Sequence[Sequence[str]],
    complete: Callable[[Path], bool],
    hub: Hub = HUGGING_FACE,
    revision: str | None = None,
) -> Path:
    """The folder of a model or tokenizer.

    The name is looked up in this order: folders, shipped models, the hub's cache, the hub. A cached repository is used only
    if it is `complete`. The same holds for a folder with the name of a shipped or published model.

    `revision` is a branch, tag or commit of the hub's repository; the name may also be "repository@revision". A path that is
    not there is never asked for on the hub: a name that is no str, or one in a folder that exists here.

    `files` are sets of file patterns. Each set is downloaded only if the folder is not `complete` after the previous ones.

    Raises ModelNotFoundError, which says what to do, InputTypeError if the name is not a str or path, and CheckpointError if
    a folder is not whole.
    """
    if not isinstance(name_or_folder, (str, os.PathLike)):
        raise InputTypeError(f"the name of a model must be a str or path, not {type(name_or_folder).__name__}")
    name = str(name_or_folder)
    if not name:
        raise ModelNotFoundError("the name of the model is empty: name a folder, a shipped model, or a hub repository")
    folder = user_path(name_or_folder)
    is_folder = _is(folder.is_dir)
    if "@" in name and not is_folder and isinstance(name_or_folder, str):
        name, _, stated = name.rpartition("@")
        if revision not in (None, stated):
            raise ModelNotFoundError(f"{name}@{stated} and revision={revision!r} name two revisions: give one")
        if not stated:
            raise ModelNotFoundError(f"{name}@ has no revision after the @: give a branch, a tag or a commit")
        revision, name_or_folder = stated, name
        folder = user_path(name)
        is_folder = _is(folder.is_dir)
    if is_folder:
        check_finished(folder)
    if revision is not None and not isinstance(revision, str):
        raise InputTypeError(f"the revision of a model must be a str, not {type(revision).__name__}")
    if is_folder and revision is None and _is(lambda: complete(folder)):
        return folder
    shipped = shipped_models().get(name)
    if revision is not None and (shipped is not None or (is_folder and published_name(name) is None)):
        kind = "a folder" if shipped is None else "a shipped model"
        raise ModelNotFoundError(f"{name!r} is {kind}, which has no revisions: leave out revision={revision!r}")
    # An incomplete folder named gpt2, such as this package's own source, does not hide the published model.
    if is_folder and shipped is None and published_name(name) is None:
        return folder
    if shipped is not None:
        return shipped
    if _is(folder.is_file):
        raise ModelNotFoundError(f"{name} is a file: name the folder that contains config.json and the weights")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ModelNotFoundError(f"there is no folder {name!r}, and it is not a hub name: check the path")
    is_path = not isinstance(name_or_folder, str) or ("/" in name and _is(Path(name).parent.is_dir))
    return _locate_on_hub(name, files, complete, hub, {} if revision is None else {"revision": revision}, is_path)


def _is(test: Callable[[], bool]) -> bool:
    """The result of `test`, or False if it raises OSError: the path is too long, or the folder cannot be read."""
    try:
        return test()
    except OSError:
        return False


def _names_of(short: str) -> list[str]:
    return [short, f"{_OWNERS.get(short, _OWNERS['gpt2'])}/{short}"]


def _locate_on_hub(
    name: str,
    files: Sequence[Sequence[str]],
    complete: Callable[[Path], bool],
    hub: Hub,
    revision: dict[str, str],
    is_path: bool,
) -> Path:
    short = published_name(name)
    names = _names_of(short) if short else [name]
    for repository in names:
        try:
            folder = Path(hub.download(repository, local_files_only=True, **revision))
        except Exception:  # not cached, or a damaged cache: the client documents no exceptions for these
            continue
        if complete(folder):
            return folder
    full_name = "@".join([name, *revision.values()])
    wanted = f"{full_name!r} is neither a folder, nor a shipped model ({_listed_models()}), nor in the hub's cache"
    if is_path and short is None:
        raise ModelNotFoundError(f"{wanted}; it is a path, so the hub is not asked: check the path")
    try:
        is_reachable = hub.answers()
    except TimeoutError as error:
        raise ModelNotFoundError(f"{wanted}, and {error}: set HF_HUB_ETAG_TIMEOUT to more seconds") from None
    if not is_reachable:
        raise ModelNotFoundError(
            f"{wanted}, and the hub cannot be reached: connect to the network, or copy the model's folder here and name it"
            f"{_forbidden()}"
        )
    try:
        for patterns in files:
            folder = Path(hub.download(names[-1], allow_patterns=list(patterns), **revision))
            if complete(folder):
                return folder
    except Exception as error:  # HTTP errors, broken connections, pages that are not the hub's, a full disk
        raise ModelNotFoundError(f"{wanted}, and {_failure(error, names[-1], **revision)}") from None
    raise ModelNotFoundError(f"the hub's repository {names[-1]!r} lacks required files: name another repository")


def _forbidden() -> str:
    """What to unset if an environment variable keeps the hub's client off the network, for a message; otherwise ""."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return ""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    name = next((name for name in names if os.environ.get(name)), names[0])
    return f" ({name}={os.environ.get(name, '1')} keeps the hub's client off the network: unset it)"


def _failure(error: Exception, repository: str, revision: str = "main") -> str:
    """Why a download failed, and the remedy."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    login = "log in with `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"access to it is restricted: accept its terms on {page}, then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub's repository {repository!r} has no revision {revision!r}: see the branches and tags on {page}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no repository {repository!r}, or it is private: check the name, or {login}"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"its download failed ({reason}): check the name and the network"


def _listed_models() -> str:
    """The names of the shipped models, for a message."""
    return ", ".join(shipped_models()) or "none is installed"
