"""WikiText as it was before it was cut into words: "invertible de-tokenizers" of the GPT-2 paper, section 3.1.

GPT-2 never saw text like `the " 2 @-@ 3 " rule`, and the paper scores it with the blanks removed; what the perplexity is
shared among stays the words of the original. The paper's own rules are not published; these undo what WikiText's maker
(Merity et al. 2016, section 4.3) did to Moses-tokenized articles, as far as single lines show it.
"""

from __future__ import annotations

import re

_JOINED = re.compile(r" @([-,.])@ ")  # inside numbers and compounds
_CLOSING = re.compile(r" ([.,;:!?%)\]}])(?=\s|$)")
_OPENING = re.compile(r"([(\[{]) ")
_CONTRACTION = re.compile(r" ('(?:s|re|ve|ll|d|m|t)|n't)\b")
_QUOTED = re.compile(r'" ([^"\n]*?) "')
_HEADING = re.compile(r"(?<==) (?==)")
_LINE_ENDS = re.compile(r"^ | $", re.MULTILINE)


def detokenize_wikitext(text: str) -> str:
    """`text` with ordinary spacing.

    >>> detokenize_wikitext(' He said , " it \\'s 3 @.@ 5 % ( or so ) " . ')
    'He said, "it\\'s 3.5% (or so)".'
    """
    text = _JOINED.sub(r"\1", text)
    text = _OPENING.sub(r"\1", text)
    text = _CLOSING.sub(r"\1", text)
    text = _QUOTED.sub(r'"\1"', text)
    text = _CONTRACTION.sub(r"\1", text)
    return _LINE_ENDS.sub("", _HEADING.sub("", text))


def count_words(text: str) -> int:
    """Words between spaces, and one for each line end, which WikiText and the Penn Treebank count as a word too."""
    return len(text.split()) + text.count("\n")
