"""Undo the word splitting of WikiText and the Penn Treebank: the "de-tokenizers" of the GPT-2 paper, section 3.1.

GPT-2 was not trained on text like `the " 2 @-@ 3 " rule`, so the paper removes such spaces before scoring. The perplexity
is still computed per word of the original text. The paper's own rules are not published.

The rules for WikiText reverse what its authors (Merity et al. 2016, section 4.3) did to Moses-tokenized articles, as far as
a single line shows it. The rules for Mikolov's form of the Treebank (lower case, <unk>, N for numbers, hardly any
punctuation) join only what its tokenizer always splits off, so they can be reversed. This module knows text only.
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
    """`text` with ordinary spacing and without spaces at the ends of lines.

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
    """`text` with contractions, possessives and amounts of money joined, and without spaces at the ends of lines.

    Only what the corpus always splits off is joined, so splitting it off again restores `text`, except for the spaces at the
    ends of lines. <unk> and N stay, because the words and numbers that they replace are lost.

    >>> detokenize_ptb(" mr. <unk> 's company did n't pay its holders ' $ N million \\n")
    "mr. <unk>'s company didn't pay its holders' $N million\\n"
    """
    text = _PTB_CUT_OFF.sub(r"\1", text)
    return _LINE_ENDS.sub("", _PTB_CURRENCY.sub(r"\1", text))


DETOKENIZERS = {"wikitext": detokenize_wikitext, "ptb": detokenize_ptb}


def count_words(text: str) -> int:
    """The number of words separated by whitespace, plus one per line end, which both corpora count as a word."""
    return len(text.split()) + text.count("\n")
