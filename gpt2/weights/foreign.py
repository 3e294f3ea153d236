"""Recognises the model files of other programs by their content, so that an error can name the command that converts them.

It imports neither torch nor the readers, which are in `gpt2.formats`: each of the names here has one there.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from gpt_config.errors import CheckpointError
from gpt_config.file_reading import open_regular

# What each format is called in messages.
TITLES = {
    "openai": "a TensorFlow checkpoint",
    "nanogpt": "a nanoGPT checkpoint",
    "llmc": "an llm.c model",
    "gguf": "a GGUF file",
}

# Formats that can only be written.
WRITTEN_TITLES = {"onnx": "an ONNX model", "ctranslate2": "a CTranslate2 model"}

# The first bytes of files.
_GGUF, _LLMC, _ZIP = b"GGUF", (20240326).to_bytes(4, "little"), b"PK\x03\x04"

# The last bytes of the index of a TensorFlow checkpoint.
_TABLE = 0xDB4775248B80FB57.to_bytes(8, "little")

# Bytes. The pickle in a zip archive of torch has no numbers of tensors: 100 kB in a checkpoint of GPT-2 XL.
_MAX_PICKLE = 50_000_000


def foreign_format(path: Path) -> str | None:
    """Return the format of a file or folder of another program, a key of TITLES, or None for everything else."""
    try:
        if tensorflow_prefix(path) is not None:
            return "openai"
        if path.is_dir():
            return "nanogpt" if _is_nanogpt(path / "ckpt.pt") else None
        return _format_of_file(path) if path.is_file() else None
    except (OSError, ValueError):
        return None


def written_format(path: Path) -> str | None:
    """Return the format of a folder that can only be written, a key of WRITTEN_TITLES, or None for everything else."""
    try:
        if any((path / "onnx").glob("model*.onnx")):
            return "onnx"
        return "ctranslate2" if (path / "model.bin").is_file() and any(path.glob("*vocabulary.json")) else None
    except (OSError, ValueError):
        return None


def tensorflow_prefix(path: Path) -> Path | None:
    """Return the checkpoint that `path` names, without the end `.index`, or None if there is none.

    `path` is a folder, one of the checkpoint's files, or what they all begin with. A folder's file `checkpoint` names the
    newest of its checkpoints.
    """
    if path.is_dir():
        return _newest(path)
    if path.name == "checkpoint" and path.is_file():
        return _newest(path.parent)
    prefix = path.with_name(re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})\Z", "", path.name)) if path.name else path
    return prefix if _is_index(prefix.with_name(f"{prefix.name}.index")) else None


def _newest(folder: Path) -> Path | None:
    state = folder / "checkpoint"
    if state.is_file():
        with open_regular(state) as file:
            named = re.search(rb'^model_checkpoint_path: "([^"\n]{1,200})"', file.read(100_000), re.MULTILINE)
        if named:  # a full path names a folder of another machine
            prefix = folder / Path(named[1].decode("utf-8", "ignore")).name
            if _is_index(prefix.with_name(f"{prefix.name}.index")):
                return prefix
    found = [file for file in sorted(folder.glob("*.index")) if _is_index(file)]
    if len(found) > 1:
        raise CheckpointError(f"{folder} contains {len(found)} checkpoints, such as {found[0].name}: name one of them")
    return found[0].with_suffix("") if found else None


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with open_regular(path) as file:
        file.seek(max(file.seek(0, 2) - len(_TABLE), 0))
        return file.read() == _TABLE


def _format_of_file(path: Path) -> str | None:
    with open_regular(path) as file:
        head = file.read(4)
    if head == _ZIP:
        return "nanogpt" if _is_nanogpt(path) else None
    return {_GGUF: "gguf", _LLMC: "llmc"}.get(head)


def _is_nanogpt(path: Path) -> bool:
    """Whether torch has saved a dictionary with `model_args` in the file. Its pickle is searched, not loaded."""
    if not path.is_file():
        return False
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            pickles = [member for member in archive.infolist() if member.filename.endswith("/data.pkl")]
            return any(member.file_size < _MAX_PICKLE and b"model_args" in archive.read(member) for member in pickles)
    except Exception:  # zipfile raises many kinds of error for a damaged archive
        return False
