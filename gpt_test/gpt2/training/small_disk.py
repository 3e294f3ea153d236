"""A run that fills its disk, and is resumed when there is space: `python -m gpt_test.gpt2.training.small_disk FOLDER DATA`.

The disk is a tmpfs, mounted on FOLDER for this process and its children only. The results are written to stderr.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from pathlib import Path

REFUSED = 77  # exit status if the system does not let users mount a disk
_NEWUSER = 0x10000000  # flag of Linux's unshare: a new user namespace
_NEWNS = 0x00020000  # flag of Linux's unshare: a new mount namespace
_REMOUNT = 32  # flag of Linux's mount: change a mounted file system
_SETTINGS = (
    "--tokenizer char --n_layer 1 --n_head 1 --n_embd 64 --context 16 --batch_size 2 --sample_tokens 0 --quiet "
    "--checkpoint_interval 1 --max_steps 12"
)


def mount(folder: Path, size: str, flags: int = 0) -> bool:
    return ctypes.CDLL(None).mount(b"none", os.fsencode(folder), b"tmpfs", flags, f"size={size}".encode()) == 0


def own_disk(folder: Path) -> bool:
    """Mount a disk of 2 MB on `folder`, in new namespaces in which this process is root. Return whether this worked."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(_NEWUSER | _NEWNS) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return False
    return mount(folder, "2m")


def gpt2(*arguments: object) -> int | None:
    from gpt2.cli import main

    sys.argv = ["gpt2", *map(str, arguments)]
    run = multiprocessing.get_context("fork").Process(target=main)
    run.start()
    run.join()
    return run.exitcode


def report(status: int | None, files: str) -> None:
    print(f"status {status}: {files}", file=sys.stderr, flush=True)


def check(folder: Path, data: str) -> None:
    checkpoints = folder / "run" / "checkpoints"
    status = gpt2("train", "--data", data, "--out", folder / "run", *_SETTINGS.split())
    names = [path.name for path in checkpoints.iterdir()]
    n_unfinished = sum("tmp" in name for name in names)
    report(status, f"{len(names) - n_unfinished} checkpoints, {n_unfinished} unfinished")
    if not mount(folder, "20m", _REMOUNT):
        sys.exit("the disk cannot be made larger")
    status = gpt2("train", "--resume", folder / "run", "--quiet")
    report(status, max(path.name for path in checkpoints.iterdir()))


if __name__ == "__main__":
    if not own_disk(Path(sys.argv[1])):
        sys.exit(REFUSED)
    check(Path(sys.argv[1]), sys.argv[2])
