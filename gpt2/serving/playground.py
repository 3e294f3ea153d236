"""The page to try the server in a browser. Its files are in `web`; it knows the API's paths, and no model."""

from __future__ import annotations

from gpt2.inspection.colours import SURPRISAL_LIMITS
from gpt2.inspection.self_contained import self_contained_page

ALTERNATIVES = 10


def playground_page() -> str:
    """Return the HTML page as one self-contained text, for `GET /`.

    It asks for `v1/models` and `v1/completions` relative to its own address. Its content-security policy allows its own
    style and script, and requests to the server that it comes from.
    """
    fields = {"limits": ",".join(map(str, SURPRISAL_LIMITS)), "alternatives": str(ALTERNATIVES)}
    return self_contained_page("gpt2.serving", "playground", fields, "connect-src 'self'; img-src data:")
