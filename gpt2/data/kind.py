"""What a file is, by its content: text, records, token ids, or something that is refused. It reads only the first bytes."""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass

from gpt2.data.source import Source
from gpt_config.errors import DataError

HEAD_BYTES = 1 << 16  # what is looked at
# Kinds of `Kind.name`.
TEXT, JSONL, JSON, TABLE, PARQUET, ARROW = "text", "jsonl", "json", "table", "parquet", "arrow"
TOKENS = ("gpt2", "llm.c", "npy", "raw")  # token ids: of this package, llm.c, NumPy, and nanoGPT, whose files have no header

LLMC_MAGICS = {20240520: 2, 20240801: 4}  # the first int32 of llm.c's header: bytes per id
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What stands at the start of a file (or at another place): what the file is.
_FORMATS: tuple[tuple[bytes, int, str], ...] = (
    (b"\x89PNG\r\n", 0, "a PNG picture"),
    (b"\xff\xd8\xff", 0, "a JPEG picture"),
    (b"GIF8", 0, "a GIF picture"),
    (b"II*\0", 0, "a TIFF picture"),
    (b"MM\0*", 0, "a TIFF picture"),
    (b"%PDF-", 0, "a PDF document"),
    (b"{\\rtf", 0, "an RTF document"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0, "an old Office document"),
    (b"PK\x03\x04", 0, "a ZIP archive (also .docx, .xlsx, .epub, .npz, .pt)"),
    (b"PK\x05\x06", 0, "an empty ZIP archive"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive"),
    (b"Rar!\x1a\x07", 0, "a RAR archive"),
    (b"ustar", 257, "a tar archive"),
    (b"\x1f\x9d", 0, "a file compressed with compress"),
    (b"\x04\x22\x4d\x18", 0, "a file compressed with lz4"),
    (b"\x7fELF", 0, "a program"),
    (b"MZ\x90\0", 0, "a program"),
    (b"\xcf\xfa\xed\xfe", 0, "a program"),
    (b"\0asm", 0, "a WebAssembly program"),
    (b"\xca\xfe\xba\xbe", 0, "a Java class or program"),
    (b"SQLite format 3\0", 0, "an SQLite database"),
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file"),
    (b"GGUF", 0, "a GGUF model"),
    (b"ggjt", 0, "a GGML model"),
    (b"Obj\x01", 0, "an Avro file"),
    (b"ORC", 0, "an ORC file"),
    (b"FEA1", 0, "a Feather file of version 1"),
    (b"RIFF", 0, "a sound or video"),
    (b"ID3", 0, "a sound"),
    (b"fLaC", 0, "a sound"),
    (b"OggS", 0, "a sound"),
    (b"ftyp", 4, "a video"),
    (b"\x1a\x45\xdf\xa3", 0, "a video"),
    (b"\0\x05\x16\x07", 0, "metadata of macOS (AppleDouble)"),
    (b"version https://git-lfs.github.com/spec/", 0, "a Git LFS pointer, not the file itself (run `git lfs pull`)"),
)
_EVEN_IN_TEXT = (b"%PDF-", b"{\\rtf", b"version https://git-lfs.github.com/spec/")
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x58\x63\x5d\x7d\x28\x8a\x95\x4b\x4a\x4d\x71]")
_SAFETENSORS = re.compile(rb"[^\0][\s\S]{2}\0{5}\{\s*\"")
_ARROW_STREAM = re.compile(rb"\xff{4}[\s\S]{3}\0[\x08-\x20]\0\0\0")
# Characters that no text has: all of ASCII's control characters but backspace, tab, line ends, form feed and escape.
_CONTROLS = bytes(code for code in range(32) if chr(code) not in "\b\t\n\v\f\r\x1a\x1b")
_OBJECT_START, _LIST_START = re.compile(r'\s*\{\s*("(?:[^"\\]|\\.)*"\s*:|\})'), re.compile(r'\s*\[\s*[{"\]]')
MOST_WRONG_SHARE = 0.01  # of the bytes may be wrong
MOST_WRONG_FREE = 8  # wrong bytes are always accepted


@dataclass(frozen=True)
class Kind:
    """What a file is, and the encoding of its text (that of token ids has no meaning)."""

    name: str
    encoding: str = "utf-8"

    @property
    def is_tokens(self) -> bool:
        return self.name in TOKENS


def kind_of(source: Source) -> Kind:
    """Return what `source` is. DataError if it cannot be read or is none of the kinds that this package reads."""
    head = source.head(HEAD_BYTES)
    if kind := _binary_kind(head):
        return Kind(kind)
    if other := _other_format(head):
        raise DataError(f"{source.name} is {other}: convert it to text, JSONL, CSV or Parquet, or name another file")
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return Kind(_text_kind(head.decode(encoding, "replace"), source.suffix, len(head) < HEAD_BYTES), encoding)
    if reason := why_no_text(head):
        # nanoGPT's files have no header: ids of 2 bytes and nothing else.
        if source.suffix == ".bin" and (source.is_compressed() or source.size % 2 == 0):
            return Kind("raw")
        raise DataError(f"{source.name} {reason}")
    return Kind(_text_kind(head.decode("utf-8", "replace"), source.suffix, len(head) < HEAD_BYTES))


def _binary_kind(head: bytes) -> str:
    if head.startswith(b"GPT2TOKS"):
        return "gpt2"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"PAR1"):
        return PARQUET
    if head.startswith(b"ARROW1\0\0") or _ARROW_STREAM.match(head):
        return ARROW
    if len(head) > 4 and int.from_bytes(head[:4], "little") in LLMC_MAGICS and 0 < head[4] < 16:
        return "llm.c"
    return ""


def _other_format(head: bytes) -> str:
    for magic, place, name in _FORMATS:
        # A text may begin with the letters of a magic, as "ORC": it counts in bytes that are no text only.
        if head.startswith(magic, place) and (magic in _EVEN_IN_TEXT or why_no_text(head)):
            return name
    if _PICKLE.match(head) and b"\0" in head[:512]:
        return "a pickle of Python or PyTorch"
    return "a safetensors file of weights" if _SAFETENSORS.match(head) else ""


def why_no_text(head: bytes) -> str:
    """Say why bytes without a byte-order mark are no UTF-8 text, with the remedy; "" if they are."""
    if b"\0" in head:
        n_even, n_odd = head[::2].count(0), head[1::2].count(0)
        encoding = "utf-16-le" if n_odd > n_even else "utf-16-be"
        text = head[: len(head) // 2 * 2].decode(encoding, "replace")
        if max(n_even, n_odd) > len(head) / 4 and not any(c < " " and c not in "\t\n\r" for c in text):
            return f"may be UTF-16 without a byte-order mark: convert it to UTF-8 (iconv -f {encoding} -t utf-8)"
        return "is not text (it has NUL bytes): name a text, or convert it"
    text = head.decode("utf-8", "surrogateescape")  # a character that is cut at the end has fewer bytes than may be wrong
    n_wrong = 0 if text.isascii() else sum("\udc80" <= character <= "\udcff" for character in text)
    if too_many_wrong(n_wrong, len(head)):
        return not_utf_8(n_wrong, len(head))
    n_controls = len(head) - len(head.translate(None, _CONTROLS))
    if too_many_wrong(n_controls, len(head)):
        return (
            f"is not text ({n_controls} of its first {len(head)} bytes are control characters): name a text, or convert it"
        )
    return ""


def too_many_wrong(n_wrong: int, n_bytes: int) -> bool:
    """Whether `n_wrong` bytes that are not UTF-8, of `n_bytes`, are too many for a text: over 1 in 100, and over 8."""
    return n_wrong > max(MOST_WRONG_FREE, MOST_WRONG_SHARE * n_bytes)


def not_utf_8(n_wrong: int, n_bytes: int) -> str:
    """The end of an error's message about a file with `n_wrong` wrong bytes in its first `n_bytes`."""
    return (
        f"is not UTF-8 text ({n_wrong} of its first {n_bytes} bytes are not): convert it "
        "(iconv -f latin1 -t utf-8, or from its own encoding)"
    )


def _text_kind(text: str, suffix: str, is_whole: bool) -> str:
    text = text.lstrip("\ufeff")
    lines = [line for line in text.split("\n") if line.strip()]
    complete = lines if is_whole or text.endswith("\n") else lines[:-1]
    if _OBJECT_START.match(text):
        # Another .json than one object per line is one object; a .jsonl has one per line, whatever its first lines are.
        if suffix == ".json":
            return JSONL if len(lines) > 1 and all(map(_is_object, complete[:1])) else JSON
        if suffix in (".jsonl", ".ndjson") or (lines and all(map(_is_object, complete[:2])) and complete):
            return JSONL
    if suffix == ".json" or (suffix not in (".jsonl", ".ndjson") and _LIST_START.match(text) and _is_list(text, is_whole)):
        return JSON
    if suffix in (".jsonl", ".ndjson"):
        return JSONL
    return TABLE if suffix in (".csv", ".tsv") else TEXT


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_list(text: str, is_whole: bool) -> bool:
    """Whether `text` is a JSON list of objects, or its start."""
    start = text.index("[") + 1
    rest = text[start:].lstrip()
    if not rest.startswith("{"):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):
        return not is_whole
    return rest[end:].lstrip()[:1] in ("", ",", "]")
