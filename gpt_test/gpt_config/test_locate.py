"""locate: names are found as folders, as shipped models and in the hub's cache; without a network the error is clear."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2.weights.folder import is_model_folder, locate_model
from gpt_config import InputTypeError, ModelNotFoundError
from gpt_config.locate import HUGGING_FACE, Hub, published_name

ROOT = Path(__file__).resolve().parents[2]


def cache_repository(cache: str, name: str, source: Path, *, skip: tuple[str, ...] = ()) -> Path:
    """Copy a model to the folder of the cache to which the hub client would download it."""
    repository = Path(cache) / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns(*skip))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return snapshot


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> str:
    import huggingface_hub.constants

    return huggingface_hub.constants.HF_HUB_CACHE


def test_a_folder_is_found(small_folder: Path) -> None:
    assert locate_model(small_folder) == small_folder
    assert locate_model(str(small_folder)) == small_folder


@pytest.mark.parametrize(
    ("cached_as", "asked_for"),
    [
        ("gpt2", "gpt2"), ("openai-community/gpt2", "gpt2"), ("gpt2", "openai-community/gpt2"), ("gpt2", "124M"),
        ("distilbert/distilgpt2", "distilgpt2"), ("someone/gpt2-stories", "someone/gpt2-stories"),
    ],
)  # fmt: skip
def test_a_cached_model_needs_no_network(cached_as: str, asked_for: str, cache: str, small_folder: Path) -> None:
    snapshot = cache_repository(cache, cached_as, small_folder)
    assert locate_model(asked_for) == snapshot


def test_an_incomplete_download_is_not_used(cache: str, small_folder: Path) -> None:
    cache_repository(cache, "gpt2", small_folder, skip=("*.safetensors",))
    with pytest.raises(ModelNotFoundError):
        locate_model("gpt2")


def test_an_incomplete_set_of_shards_does_not_hide_the_whole_model(cache: str, small_folder: Path, tmp_path: Path) -> None:
    whole = cache_repository(cache, "openai-community/gpt2", small_folder)
    broken = cache_repository(cache, "gpt2", small_folder, skip=("model.safetensors",))
    index = '{"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}'
    (broken / "model.safetensors.index.json").write_text(index)
    assert locate_model("gpt2") == whole


def test_a_damaged_cache_raises_model_not_found(cache: str, small_folder: Path) -> None:
    snapshot = cache_repository(cache, "gpt2", small_folder)
    (snapshot.parents[1] / "refs" / "main").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelNotFoundError):
        locate_model("gpt2")


@pytest.mark.parametrize("error", [RuntimeError("peer closed connection"), ValueError("not JSON"), OSError("disk full")])
def test_the_error_for_a_failed_download_is_one_line(error: Exception) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    with pytest.raises(ModelNotFoundError, match=f"its download failed \\({error}\\)") as caught:
        locate_model("someone/model", hub=Hub(fail, answers=lambda: True))
    assert "\n" not in str(caught.value)


def test_an_incomplete_folder_named_gpt2_does_not_hide_the_model(cache, small_folder, tmp_path, monkeypatch) -> None:
    """There is such a folder when a command runs in this project's root."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    snapshot = cache_repository(cache, "gpt2", small_folder)
    assert locate_model("gpt2") == snapshot
    shutil.copytree(small_folder, tmp_path / "gpt2", dirs_exist_ok=True)
    assert locate_model("gpt2") == Path("gpt2")


def test_without_a_network_the_error_comes_within_3_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a DNS look-up hangs, as with a firewall that drops packets."""
    import socket

    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for answer in (OSError("no network"), None):

        def look_up(*_: object, answer: OSError | None = answer, **__: object) -> list:
            if answer is not None:
                raise answer
            time.sleep(60)
            return []

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        began = time.perf_counter()
        with pytest.raises(ModelNotFoundError, match="the hub cannot be reached: connect to the network, or copy"):
            locate_model("someone/model")
        assert time.perf_counter() - began < 30  # 3 seconds, and a slow machine's; without the limit it is 60


def test_a_reachable_hub_is_asked_for_safetensors_first(cache, small_folder, tmp_path: Path) -> None:
    """The hub's client is replaced by a function that copies from a folder."""
    import fnmatch

    (tmp_path / "hub").mkdir()
    shutil.copy(small_folder / "config.json", tmp_path / "hub")
    (tmp_path / "hub" / "pytorch_model.bin").write_bytes(b"weights")
    asked = []

    def download(name: str, allow_patterns: list[str] | None = None, **options: object) -> str:
        if options.get("local_files_only"):
            return HUGGING_FACE.download(name, **options)
        asked.append((name, allow_patterns))
        target = tmp_path / "got"
        target.mkdir(exist_ok=True)
        for path in (tmp_path / "hub").iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns or []):
                shutil.copy(path, target)
        return str(target)

    folder = locate_model("gpt2", hub=Hub(download, answers=lambda: True))
    assert is_model_folder(folder)
    assert [name for name, _ in asked] == ["openai-community/gpt2"] * 2
    assert "model.safetensors" in asked[0][1] and "pytorch_model.bin" in asked[1][1]


@pytest.mark.parametrize(
    "name", ["../x", "a/b/c", "~no-such-user/x", "", "no such folder", "/no/such/folder", "x" * 5000, "-x", "a/"]
)
def test_invalid_names(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        locate_model(name)


def test_wrong_types() -> None:
    with pytest.raises(InputTypeError, match="not int"):
        locate_model(5)


def test_published_names() -> None:
    assert published_name("1558M") == published_name("openai-community/gpt2-xl") == "gpt2-xl"
    assert published_name("distilbert/distilgpt2") == "distilgpt2"
    assert [published_name(name) for name in ("someone/gpt2", "gpt3", "openai-community/distilgpt2", "")] == [None] * 4


@pytest.fixture
def without_gpt2(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs code in a new process, where gpt2 is not yet imported."""

    def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
        return subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)

    return run


TINY = "from gpt_encoder import load_tokenizer; print(load_tokenizer('gpt2-tiny').vocab_size)"


def test_a_shipped_model_is_found_in_a_checkout_without_importing_its_package(without_gpt2: Callable) -> None:
    not_installed = "import importlib.metadata as metadata; metadata.entry_points = lambda **_: []"  # it may be, by pip
    code = f"{not_installed}; {TINY}; import sys; print(*{{'torch', 'gpt2'}} & sys.modules.keys())"
    assert without_gpt2(code).stdout == "4096\n\n"
    assert without_gpt2(f"import gpt2; {TINY}").stdout == "4096\n"


def test_an_installed_package_registers_the_models_that_it_ships(without_gpt2: Callable, tmp_path: Path) -> None:
    """The test writes the entry points of pyproject.toml into a `.dist-info` folder, as pip does."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    (tmp_path / "some-1.0.dist-info").mkdir()
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in items.items()) for group, items in points.items()
    ]
    (tmp_path / "some-1.0.dist-info" / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "some-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: some\nVersion: 1.0\n")
    result = without_gpt2(TINY, tmp_path)
    assert result.stdout == "4096\n", result.stderr
    result = without_gpt2("import gpt_encoder, sys; gpt_encoder.load_tokenizer(); print('gpt2' in sys.modules)", tmp_path)
    assert result.stdout == "False\n", "gpt2 must not be imported for a name that is not one of its models"
