"""For the API reference: doctests in docstrings become code blocks. Markdown would take ">>>" for three quotations."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# A line that begins with ">>>" and all lines after it up to an empty one.
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_FLAGS = re.compile(r" *# doctest:.*$", re.MULTILINE)


class DoctestFences(Extension):
    """Puts each doctest of a docstring into a fence, without flags that are for the test alone."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute that was found."""
        if obj.docstring:
            obj.docstring.value = _DOCTEST.sub(
                lambda found: f"```pycon\n{_FLAGS.sub('', found[0])}\n```", obj.docstring.value
            )
