"""Which files of folders are data; hidden files, models, runs and the like are left out and counted. It reads no data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2.data.source import COMPRESSED_SUFFIXES, Source
from gpt_config.errors import DataError
from gpt_config.file_reading import read_json
from gpt_config.locate import TOKENIZER_FILES

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
TOKEN_SUFFIXES = (".bin", ".npy")
_SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES, *TOKEN_SUFFIXES)

_RUN_FILES = ("training.json", "finetuning.json")
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_MODEL_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "char_vocab.json", "encoder.json", "vocab.bpe")
# Files of models, runs and tokenizers that have a suffix of data: left out beside texts, too.
_OWN_FILES = {
    *_RUN_FILES, *_MODEL_FILES, *_MODEL_INDEXES, *_TOKENIZERS, *TOKENIZER_FILES, "vocab.json", "merges.txt",
    "config.json", "generation_config.json", "preprocessor_config.json", "adapter_config.json", "classifier.json",
    "instruction_template.json", "metrics.jsonl", "wandb.json", "dataset_info.json", "dataset_infos.json",
    "state.json", "dataset_dict.json", "trainer_state.json", "training_args.bin", "optimizer.bin", "package.json",
    "package-lock.json", "tsconfig.json",
}  # fmt: skip
_LEFTOVER_ENDS = ("~", ".bak", ".orig", ".swp", ".swo", ".tmp", ".part", ".crdownload", ".download")
_OTHER_FOLDERS = {"__pycache__", "__MACOSX", "node_modules"}

HIDDEN, LEFTOVER, OWN, EMPTY, APART = (
    "hidden",
    "editors' or downloads' leftovers",
    "of models, runs or tokenizers",
    "empty",
    "named as other data",
)


@dataclass(frozen=True)
class Listing:
    """The files that paths stand for, in order, and how many files of folders were left out, by reason."""

    files: tuple[Path, ...]
    left_out: Mapping[str, int]
    has_folder: bool
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The lines to show: "3 files, 2 left out (1 hidden, 1 .png)" if a folder was named."""
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in sorted(self.left_out.items(), key=lambda item: -item[1])
        )
        count = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        left_out = f", {sum(self.left_out.values())} left out ({reasons})" if self.left_out else ""
        return [*([count + left_out] if self.has_folder else []), *self.notes]


def list_files(paths: Sequence[str | os.PathLike[str]], *, apart: Sequence[str | os.PathLike[str]] = ()) -> Listing:
    """Return the files of `paths`: files as they are named, and the data files of folders, sorted by path.

    A folder of Hugging Face datasets' `save_to_disk` stands for its Arrow files. Files of `apart`, such as the validation
    data, are left out of folders. DataError if a path does not exist, or if a folder has no data file.
    """
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    notes: list[str] = []
    has_folder = False
    not_these = {Path(path).resolve() for path in apart}
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise DataError(f"there is no file or folder {path}: check the path")
            files.append(path)
            continue
        has_folder = True
        inside: list[Path] = []
        reasons: Counter[str] = Counter()
        for found, reason in _walk(path, not_these, notes, is_top=True):
            if reason:
                reasons[reason] += 1
            else:
                inside.append(found)
        if not inside:
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            raise DataError(
                f"the folder {path} has no data files ({', '.join(_SUFFIXES)}, also compressed)"
                f"{f'; left out: {why}' if why else ''}: name files, or another folder"
            )
        files += sorted(inside)
        left_out += reasons
    return Listing(tuple(files), dict(left_out), has_folder, tuple(notes))


def _walk(folder: Path, apart: Collection[Path], notes: list[str], *, is_top: bool = False) -> Iterator[tuple[Path, str]]:
    """Yield (file, why it is left out, or "") for the files of a folder and of those in it."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror}): check its permissions") from None
    if (shards := _saved_dataset(folder, names)) is not None:
        yield from ((shard, "") for shard in shards)
        return
    if "dataset_dict.json" in names:
        split = _split_of(folder, names)
        notes.append(f"{folder} is a dataset with several splits: {split.name} is read")
        yield from _walk(split, apart, notes)
        return
    if not is_top and _is_own(set(names)):
        yield from ((file, OWN) for file in _all_files(folder))
        return
    for name in names:
        path = folder / name
        if path.is_dir():
            if reason := _folder_reason(name):
                yield from ((file, reason) for file in _all_files(path))
            elif not path.is_symlink():  # a link may lead back here
                yield from _walk(path, apart, notes)
        else:
            yield path, _reason(path, apart)


def _reason(path: Path, apart: Collection[Path]) -> str:
    name = path.name
    if name.startswith((".", "~$")):
        return HIDDEN
    if name.endswith(_LEFTOVER_ENDS) or (name.startswith("#") and name.endswith("#")):
        return LEFTOVER
    if name in _OWN_FILES:
        return OWN
    if (suffix := Source(name).suffix) not in _SUFFIXES:
        return suffix or ("without a suffix" if path.suffix.lower() not in COMPRESSED_SUFFIXES else path.suffix.lower())
    if not path.is_file():
        return "not regular files"
    if path.resolve() in apart:
        return APART
    return EMPTY if path.stat().st_size == 0 else ""


def _folder_reason(name: str) -> str:
    return HIDDEN if name.startswith(".") else OWN if name in _OTHER_FOLDERS else ""


def _is_own(names: set[str]) -> bool:
    """Whether a folder with these files is a model, a run, its encoded data, or a tokenizer."""
    has_weights = any(name in names for name in (*_MODEL_FILES, *_MODEL_INDEXES, "adapter_config.json"))
    is_checkpoint = "trainer_state.json" in names or any(
        name.startswith("step-") and name.endswith(".safetensors") for name in names
    )
    has_vocabulary = {"vocab.json", "merges.txt"} <= names or any(name in names for name in _TOKENIZERS)
    return has_weights or is_checkpoint or has_vocabulary or any(name in names for name in _RUN_FILES)


def _all_files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)


def _saved_dataset(folder: Path, names: Sequence[str]) -> list[Path] | None:
    """The Arrow files of a dataset that Hugging Face's `save_to_disk` wrote; None if the folder is something else."""
    if not {"state.json", "dataset_info.json"} <= set(names):
        return None
    try:
        state = read_json(folder / "state.json")
        files = [folder / item["filename"] for item in state["_data_files"]]
        has_indices = bool(state.get("_indices_data_files") or state.get("_indices_files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / 'state.json'} is damaged ({error}): save the dataset again") from None
    if has_indices:
        raise DataError(f"{folder} has a selection of rows (indices): call flatten_indices() and save the dataset again")
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(f"{missing[0]} is missing: save or copy the dataset again")
    return files


def _split_of(folder: Path, names: Sequence[str]) -> Path:
    """The split of a dataset with several: its train split, or the only one."""
    try:
        splits = list(map(str, read_json(folder / "dataset_dict.json")["splits"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'dataset_dict.json'} is damaged ({error}): save the dataset again") from None
    there = [split for split in splits if split in names]
    if "train" in there or len(there) == 1:
        return folder / ("train" if "train" in there else there[0])
    raise DataError(f"{folder} has the splits {', '.join(there) or 'none'}: name the folder of one of them")
