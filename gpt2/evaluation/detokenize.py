"""WikiText and the Penn Treebank as before they were cut into words: the "de-tokenizers" of the GPT-2 paper, section 3.1.

GPT-2 never saw text like `the " 2 @-@ 3 " rule`, and the paper scores it with the blanks removed; what the perplexity is
shared among stays the words of the original. The paper's own rules are not published. Those for WikiText undo what its
maker (Merity et al. 2016, section 4.3) did to Moses-tokenized articles, as far as single lines show it. Those for the
Treebank in Mikolov's form (lower case, <unk>, N for numbers, hardly any punctuation) join what its tokenizer always cuts,
so they can be undone.
"""

from __future__ import annotations

import re

_JOINED = re.compile(r" @([-,.])@ ")  # inside numbers and compounds
_CLOSING = re.compile(r" ([.,;:!?%)\]}])(?=\s|$)")
_OPENING = re.compile(r"([(\[{]) ")
_CONTRACTION = re.compile(r" ('(?:s|re|ve|ll|d|m|t)|n't)\b")
_QUOTED = re.compile(r'" ([^"\n]*?) "')
_HEADING = re.compile(r"(?<==) (?==)")
_PTB_CUT_OFF = re.compile(r"(?<=\S) ('(?:s|re|ve|ll|d|m)?|n't)(?=\s|$)")
_PTB_CURRENCY = re.compile(r"((?:^|(?<=\s))[$#]) (?=N(?:\s|$))", re.MULTILINE)
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


def detokenize_ptb(text: str) -> str:
    """`text` with contractions, possessives and sums of money in one piece.

    What stands alone in the corpus only because it was cut off loses its blank, so cutting it off again gives `text` back,
    but for the blanks around a line. <unk> and N stay: what they stood for is lost.

    >>> detokenize_ptb(" mr. <unk> 's company did n't pay its holders ' $ N million \\n")
    "mr. <unk>'s company didn't pay its holders' $N million\\n"
    """
    text = _PTB_CUT_OFF.sub(r"\1", text)
    return _LINE_ENDS.sub("", _PTB_CURRENCY.sub(r"\1", text))


DETOKENIZERS = {"wikitext": detokenize_wikitext, "ptb": detokenize_ptb}


def count_words(text: str) -> int:
    """Words between spaces, and one for each line end, which WikiText and the Penn Treebank count as a word too."""
    return len(text.split()) + text.count("\n")
