"""A page in one file: its style and script are inside it, and its content-security policy allows nothing else.

It knows the colours and how a page is put together, not what a page shows.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template

from gpt2.inspection.colours import DARK, LIGHT


def self_contained_page(package: str, name: str, fields: Mapping[str, str], allowed: str = "") -> str:
    """Return the template `name`.html of the folder `web` of a package as one text, filled in with `fields`.

    `name`.css comes after the style that all pages share. `fields` are HTML already. The policy allows the page's own style
    and script, and what `allowed` adds to it, such as "connect-src 'self'".
    """
    style = f"{_variables()}\n{web_file('gpt2.inspection', 'base.css')}\n{web_file(package, f'{name}.css')}"
    script = web_file(package, f"{name}.js")
    policy = [
        "default-src 'none'",
        f"style-src '{_hash(style)}'",
        f"script-src '{_hash(script)}'",
        "base-uri 'none'",
        "form-action 'none'",
        *filter(None, [allowed]),
    ]
    own = {"policy": "; ".join(policy), "style": style, "script": script}
    return Template(web_file(package, f"{name}.html")).substitute(own, **fields)


def web_file(package: str, name: str) -> str:
    """Return the text of a file in the folder `web` of a package."""
    return files(package).joinpath("web", name).read_text(encoding="utf-8")


def _variables() -> str:
    """The colours as variables of CSS, for light and dark."""

    def declared(colours: Mapping[str, str | Sequence[str]]) -> str:
        flat = {
            name if isinstance(value, str) else f"{name}-{i}": one
            for name, value in colours.items()
            for i, one in enumerate((value,) if isinstance(value, str) else value)
        }
        return " ".join(f"--{name}: {value};" for name, value in flat.items())

    return f":root {{ {declared(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {declared(DARK)} }} }}"


def _hash(content: str) -> str:
    """The source expression that allows an inline element with this content."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode('utf-8')).digest()).decode('ascii')}"
