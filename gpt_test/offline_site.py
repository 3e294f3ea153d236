"""Whether a built site loads anything from another host. `python gpt_test/offline_site.py FOLDER` fails if so, and names it.

A link that a reader may follow is no load. It knows HTML and CSS, and no page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_ELSEWHERE = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
# Attributes whose content a browser fetches, in any element; `href` counts for those below only.
_LOADED = {"src", "srcset", "poster", "data", "xlink:href"}
_LOADED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest", "modulepreload"}
_IN_CSS = re.compile(r"@import\s+(?:url\()?[\"']?([^\"')\s;]+)|url\(\s*[\"']?([^\"')\s]+)")


class _Loads(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._is_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_style = tag == "style"
        values = {name: value or "" for name, value in attrs}
        self.found += [value for name, value in values.items() if name in _LOADED]
        if tag in ("image", "use") or (tag == "link" and _LOADED_LINKS & set(values.get("rel", "").split())):
            self.found.append(values.get("href", ""))
        self.found += _loaded_by_css(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._is_style:
            self.found += _loaded_by_css(data)
            self._is_style = False


def _loaded_by_css(text: str) -> list[str]:
    return [first or second for first, second in _IN_CSS.findall(text)]


def loads_from_elsewhere(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file of the site with an address on another host that it loads."""
    for path in sorted(folder.rglob("*")):
        found: list[str] = []
        if path.suffix in (".html", ".svg"):
            parser = _Loads()
            parser.feed(path.read_text(encoding="utf-8"))
            found = parser.found
        elif path.suffix == ".css":
            found = _loaded_by_css(path.read_text(encoding="utf-8"))
        yield from ((path, address) for address in found if _ELSEWHERE.match(address))


if __name__ == "__main__":
    loads = list(loads_from_elsewhere(Path(sys.argv[1])))
    for path, address in loads:
        print(f"{path} loads {address}: put the file into docs/assets", file=sys.stderr)
    if not list(Path(sys.argv[1]).rglob("*.html")):
        sys.exit(f"{sys.argv[1]} has no pages")
    sys.exit(1 if loads else 0)
