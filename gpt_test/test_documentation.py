"""README.md and docs/: every block runs as it stands, outputs are those shown, links lead somewhere, nothing is left out.

`gpt2` is a stand-in with random weights here, so only texts of gpt2-tiny are compared. `page_blocks` describes the marks.
"""

from __future__ import annotations

import doctest
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

import pytest

from gpt2 import GPT2
from gpt_config import GPT2Config
from gpt_test import page_blocks
from gpt_test.gpt_config.test_locate import cache_repository
from gpt_test.offline_site import loads_from_elsewhere
from gpt_test.page_blocks import LANGUAGES, Block, PageRun, read_blocks, without_blocks
from gpt_test.test_floors import FLOOR_OF

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BLOCKS = {page: read_blocks(path, page) for page, path in PAGES.items()}
# What the commands of a page may name.
LINKED = ("generate.py", "README.md", "requirements.txt", "examples", "docs")
MAX_README_WORDS = 1100


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, warm_commands: Path) -> dict[str, str]:
    """gpt2 in the hub's cache, and the commands `python` and `gpt2`."""
    folder = tmp_path_factory.mktemp("documentation")
    GPT2(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder / "stand-in")
    (folder / "cache").mkdir()
    cache_repository(str(folder / "cache"), "gpt2", folder / "stand-in")
    return {
        **os.environ,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{warm_commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
    }


class Page:
    """The blocks of a page that are run, each when it or a later one is asked for."""

    def __init__(self, folder: Path, environment: dict[str, str], blocks: list[Block]) -> None:
        for name in LINKED:
            if (ROOT / name).exists():
                (folder / name).symlink_to(ROOT / name)
        self.run, self.blocks = PageRun(folder, environment), blocks
        self._problems: list[str] = []
        self._lock = Lock()

    def problem(self, block: Block) -> str:
        """What is wrong with a block; "" if nothing is."""
        place = self.blocks.index(block)
        with self._lock:
            while len(self._problems) <= place:
                self._problems.append(self.run.run(self.blocks[len(self._problems)]))
            return self._problems[place]

    def run_all(self) -> None:
        """Run the blocks one by one, so that each problem is known as soon as its block has run."""
        for block in self.blocks:
            self.problem(block)


@pytest.fixture(scope="module")
def problem_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> Iterator[Callable[[Block], str]]:
    """What is wrong with a block.

    Two pages run at a time, because they mostly wait for imports. With `pytest -n` each process runs what it is asked for.
    """
    asked = {item.callspec.params["block"] for item in request.session.items if "problem_of" in item.fixturenames}
    with ExitStack() as stack:
        pages: dict[str, Page] = {}
        for name, blocks in BLOCKS.items():
            blocks = [block for block in blocks if block.is_run and (block.mark != "slow" or block in asked)]
            wanted = [place for place, block in enumerate(blocks, start=1) if block in asked]
            if wanted:
                pages[name] = Page(tmp_path_factory.mktemp("page"), environment, blocks[: wanted[-1]])
                stack.enter_context(pages[name].run)
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pool = stack.enter_context(ThreadPoolExecutor(2))
            for page in pages.values():
                pool.submit(page.run_all)
        yield lambda block: pages[block.page].problem(block)


def params() -> list[object]:
    found: list[object] = []
    for block in (block for blocks in BLOCKS.values() for block in blocks if block.is_run):
        marks = [pytest.mark.xdist_group(block.page), *([pytest.mark.slow] if block.mark == "slow" else [])]
        found.append(pytest.param(block, id=block.place, marks=marks))
    return found


@pytest.mark.parametrize("block", params())
def test_block_runs(block: Block, problem_of: Callable[[Block], str]) -> None:
    if block.language == "python" and "gpt2.training" in block.text:  # without it a training warns, which is an error here
        pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -r requirements-dev.txt)")
    problem = problem_of(block)
    assert not problem, f"{block.place}: {problem}"


@pytest.mark.parametrize("page", PAGES)
def test_languages_and_marks_are_known(page: str) -> None:
    """A fence with anything else after its backticks is not shown as code on the site, and would not be run here."""
    for block in BLOCKS[page]:
        assert block.language in LANGUAGES, f"{block.place}: {block.language!r} is not one of {', '.join(LANGUAGES)}"
        assert block.mark in ("", "slow", "output"), f"{block.place}: <!-- {block.mark} --> has no meaning"


def anchors_of(path: Path) -> set[str]:
    """What a link can name on a page: headings, ids, and the objects of the API reference."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ +(.+?) *$", without_blocks(text), re.MULTILINE)
    slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    ids = re.findall(r"\bid=\"([^\"]+)\"|\{ *#([\w-]+)|^::: (\S+)", text, re.MULTILINE)
    return slugs | {name for names in ids for name in names}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Relative links and pictures name files that exist, and anchors that are on their pages."""
    prose = re.sub(r"`[^`\n]+`", "", without_blocks(PAGES[page].read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(<?([^)\s>]+)|\b(?:src|href)=\"([^\"]+)\"", prose):
        link = "".join(target)
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        path = PAGES[page].parent / name if name else PAGES[page]
        assert path.exists(), f"{page}: there is no {link}"
        assert not anchor or anchor in anchors_of(path), f"{page}: {link} names no heading"


def test_doctests_of_the_reader() -> None:
    assert doctest.testmod(page_blocks).failed == 0


def test_readme_is_short() -> None:
    n_words = len(PAGES["README.md"].read_text(encoding="utf-8").split())
    assert n_words <= MAX_README_WORDS, f"README.md has {n_words} words: move what newcomers do not need to docs/"


def test_the_two_commands_are_there() -> None:
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    assert 'pip install -r requirements.txt && python generate.py "Once upon a time" --temperature 0.7 --do_sample' in readme
    assert "pip install -r requirements-dev.txt && pytest gpt_test" in readme


def test_every_file_is_named() -> None:
    """Each module of the packages has a line in docs/architecture.md, and no line names a module that is gone."""
    tables = PAGES["docs/architecture.md"].read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w/]+\.py)` \|", tables, re.MULTILINE))
    there = {
        str(path.relative_to(ROOT))
        for package in ("gpt_config", "gpt_encoder", "gpt2")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named ^ there == {"generate.py"}  # which is in no package


@pytest.mark.parametrize(("command", "page"), [("generate", "generate"), ("tokenize", "tokenizer"), ("quantize", "faster")])
def test_every_option_is_named(command: str, page: str) -> None:
    from gpt2.cli.group import load_command

    # docs/options.md has the options that all commands have.
    text = "".join(PAGES[f"docs/{name}.md"].read_text(encoding="utf-8") for name in (page, "options"))
    for parameter in load_command(command).params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert not option.startswith("--") or re.search(rf"`{option}\b", text), f"docs/{page}.md has no {option}"


def test_the_walks_name_functions_that_exist() -> None:
    """docs/architecture.md follows a token and a weight through functions, as they are called in the code."""
    steps = re.findall(r"\| `(\w+)` in `([\w/]+\.py)` \|", PAGES["docs/architecture.md"].read_text(encoding="utf-8"))
    assert len(steps) > 20
    for name, path in steps:
        assert re.search(rf"\b(?:def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8")), f"{path} has no {name}"


def test_the_drawing_has_the_floors_of_the_code() -> None:
    """Each part stands at the height of its floor in the drawing of docs/architecture.md."""
    drawing = re.search(r"<svg.*?</svg>", PAGES["docs/architecture.md"].read_text(encoding="utf-8"), re.DOTALL)
    assert drawing is not None
    texts = re.findall(r'<text class="(note|name)[^"]*" x="[^"]+" y="(\d+)"[^>]*>([^<]+)</text>', drawing[0])
    floor_at = {y: int(text) for kind, y, text in texts if kind == "note"}
    drawn = {text.removesuffix(".py").replace("/", "."): floor_at[y] for kind, y, text in texts if kind == "name"}
    there = {name: floor for name, floor in FLOOR_OF.items() if is_there(name)} | {"generate": 10}
    assert {name if name in there else f"gpt2.{name}": floor for name, floor in drawn.items()} == there


def is_there(name: str) -> bool:
    """Whether a part with this dotted name exists; `gpt2` itself is not drawn, because it is around the others."""
    path = ROOT / name.replace(".", "/")
    return name != "gpt2" and (path.is_dir() or path.with_suffix(".py").is_file())


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://example.org/a.js"></script>',
        '<img src="//example.org/a.png">',
        '<link rel="stylesheet" href="https://example.org/a.css">',
        '<link rel="preconnect" href="https://example.org">',
        "<style>@import 'https://example.org/a.css';</style>",
        '<p style="background: url(https://example.org/a.png)">',
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(html: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html)
    (tmp_path / "other.html").write_text('<a href="https://example.org">a link</a> <img src="a.png">')
    assert [path.name for path, _ in loads_from_elsewhere(tmp_path)] == ["page.html"]
