"""Draw the pictures of the README: a terminal session from what the commands print, and the floors from the floors' test.

    python docs/images/readme.py            # writes docs/images/terminal.svg and docs/images/floors.svg
    python docs/images/readme.py FOLDER     # writes them there

A test draws them and compares, so the pictures show what the commands print today.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gpt_test.test_floors import FLOOR_OF  # noqa: E402  (the path has to be set first)

COMMANDS = (
    'gpt2 generate "Once upon a time" --from_pretrained gpt2-tiny --max_tokens 45',
    'echo "One day the cat sat on the mat and looked at the moon." |\n'
    "    gpt2 score - --from_pretrained gpt2-tiny --format color",
    "gpt2 verify random | tail -n 1",
)
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
COLUMNS = 88
CHAR_WIDTH, LINE_HEIGHT, FONT_SIZE = 8.4, 20, 14
MARGIN, TITLE_BAR = 20, 36

_STYLE = re.compile(r"\x1b\[([0-9;]*)m")


def printed_by(command: str) -> str:
    """What a terminal shows of a command: both streams, in order."""
    script = f'gpt2() {{ "{sys.executable}" -m gpt2 "$@"; }}\n{command}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        ["bash", "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, text=True
    )
    return result.stdout.rstrip("\n")


def rgb(number: int) -> str:
    """A colour of the 6 x 6 x 6 cube of a terminal's 256 colours, as #rrggbb."""
    assert 16 <= number < 232, f"colour {number} is not in the cube"
    levels = (0, 95, 135, 175, 215, 255)
    red, rest = divmod(number - 16, 36)
    green, blue = divmod(rest, 6)
    return f"#{levels[red]:02x}{levels[green]:02x}{levels[blue]:02x}"


def cells(line: str) -> list[tuple[str, str]]:
    """(character, background or "") of each column of a line with terminal colours."""
    found, background = [], ""
    for place, part in enumerate(_STYLE.split(line)):
        if place % 2 == 0:
            found += [(character, background) for character in part]
        elif part in ("", "0"):
            background = ""
        elif part.startswith("48;5;"):
            background = rgb(int(part.removeprefix("48;5;")))
    return found


def wrapped(line: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """A line in parts of at most COLUMNS columns. It is cut after a space, because that is easier to read."""
    parts = []
    while len(line) > COLUMNS:
        end = max(column for column in range(1, COLUMNS + 1) if line[column - 1][0] == " ")
        parts.append(line[:end])
        line = line[end:]
    return [*parts, line]


def draw_line(row: int, line: list[tuple[str, str]], style: str) -> list[str]:
    """A line of the terminal: a rectangle for each background, and the text, each run at its column."""
    top = TITLE_BAR + MARGIN / 2 + row * LINE_HEIGHT
    boxes, texts, start = [], [], 0
    while start < len(line):
        background, end = line[start][1], start + 1
        while end < len(line) and line[end][1] == background:
            end += 1
        text = "".join(character for character, _ in line[start:end])
        left, width = MARGIN + start * CHAR_WIDTH, (end - start) * CHAR_WIDTH
        if background:
            boxes.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{LINE_HEIGHT}" fill="{background}"/>'
            )
        if text.strip():
            texts.append(
                f'<text class="{"on" if background else style}" x="{left:.1f}" y="{top + 15:.1f}" textLength="{width:.1f}">'
                f"{escape(text)}</text>"
            )
        start = end
    return boxes + texts


def draw_terminal() -> str:
    """A terminal window with the commands and what they print. Its colours are its own, so it suits light and dark pages."""
    parts, row = [], 0
    for command in COMMANDS:
        lines = [("command", cells(line)) for line in f"$ {command}".split("\n")]
        for printed in printed_by(command).split("\n"):
            lines += [("output", line) for line in wrapped(cells(printed))]
        for style, line in lines:
            parts += draw_line(row, line, style)
            row += 1
        row += 1
    width = 2 * MARGIN + COLUMNS * CHAR_WIDTH
    height = TITLE_BAR + 1.5 * MARGIN + (row - 1) * LINE_HEIGHT
    buttons = [
        f'<circle cx="{MARGIN + 20 * place}" cy="{TITLE_BAR / 2:.0f}" r="6" fill="{colour}"/>'
        for place, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" role="img">',
            "<title>A terminal session with gpt2 generate, gpt2 score and gpt2 verify</title>",
            f"<style>text {{ font: {FONT_SIZE}px {FONT}; white-space: pre; }}",
            ".command { fill: #8be9a8; } .output { fill: #e6e6e6; } .on { fill: #000000; }</style>",
            f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#1e2227" stroke="#5c6370"/>',
            *buttons,
            *parts,
            "</svg>\n",
        ]
    )


# What each floor is for.
FLOORS = {
    10: "entry points",
    9: "command line",
    8: "fine-tune; compare engines; measure speed",
    7: "the public names; train, evaluate",
    6: "generate; LoRA; reference engines",
    5: "model files; fast paths",
    4: "weights in int8",
    3: "the architecture: read this first",
    2: "text to token ids; key-value cache",
    1: "configurations and errors",
}


def names_on(floor: int) -> list[str]:
    """The modules and packages on a floor that exist, as they stand in the repository."""
    found = []
    for name, its_floor in FLOOR_OF.items():
        path = ROOT / name.replace(".", "/")
        if its_floor == floor and path.with_suffix(".py").exists():
            found.append(f"{name.removeprefix('gpt2.')}.py")
        elif its_floor == floor and path.is_dir():
            found.append("__init__.py" if name == "gpt2" else f"{name.removeprefix('gpt2.')}/")
    return found


def draw_floors() -> str:
    """The floors, the lowest at the bottom; an import points down."""
    width, row_height, top = 820, 38, 44
    height = top + len(FLOORS) * row_height + 12
    parts = []
    for row, floor in enumerate(sorted(FLOORS, reverse=True)):
        y = top + row * row_height
        kind = "model" if floor == 3 else "floor"
        parts.append(f'<rect class="{kind}" x="48" y="{y}" width="{width - 64}" height="{row_height - 6}" rx="5"/>')
        parts.append(f'<text class="number" x="66" y="{y + 21}" text-anchor="middle">{floor}</text>')
        parts.append(f'<text class="name" x="92" y="{y + 21}">{"   ".join(names_on(floor))}</text>')
        parts.append(f'<text class="note" x="{width - 28}" y="{y + 21}" text-anchor="end">{FLOORS[floor]}</text>')
    bottom = top + len(FLOORS) * row_height - 6
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'role="img">',
            "<title>The floors of the packages: an import points down</title>",
            "<style>",
            f".name, .number {{ font: 13px {FONT}; white-space: pre; }}",
            ".note, .head { font: 13px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; }",
            ".card { fill: #ffffff; stroke: #d0d7de; } .floor { fill: #eef2f7; } .model { fill: #ffe3a3; }",
            ".name { fill: #1f2328; } .number, .note, .head { fill: #57606a; } .arrow { stroke: #57606a; fill: none; }",
            "@media (prefers-color-scheme: dark) {",
            ".card { fill: #15191f; stroke: #3d444d; } .floor { fill: #262c36; } .model { fill: #5c4813; }",
            ".name { fill: #e6edf3; } .number, .note, .head { fill: #a9b4c0; } .arrow { stroke: #a9b4c0; } }",
            "</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            '<text class="head" x="48" y="28">gpt_config/ and gpt_encoder/ are packages of their own, the rest is in gpt2/. '
            "Imports point down only.</text>",
            f'<path class="arrow" stroke-width="2" d="M26 {top} V{bottom} M19 {bottom - 9} L26 {bottom} L33 {bottom - 9}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("terminal.svg", draw_terminal()), ("floors.svg", draw_floors())):
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
