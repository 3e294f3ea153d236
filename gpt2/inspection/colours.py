"""The colours of the HTML page and of the pictures, for a light and a dark background. It depends on nothing."""

from __future__ import annotations

from bisect import bisect_left

# Upper limits of the first levels of surprisal, in bits, as in `gpt2 score --format color`; the last level has no limit.
SURPRISAL_LIMITS = (1.0, 3.0, 6.0, 10.0)
# Upper limits of the first levels of a probability or of another share.
SHARE_LIMITS = (0.05, 0.15, 0.35, 0.6, 0.8)

# Text is readable on each level: the contrast is at least 4.5 (WCAG 2.2, level AA).
LIGHT = {
    "page": "#f6f7f9",
    "card": "#ffffff",
    "text": "#1b1f24",
    "muted": "#59636e",
    "line": "#d5dae0",
    "accent": "#0b5cad",
    "positive": "#0b5cad",
    "negative": "#c2410c",
    "surprisal": ("#fff8ee", "#fee3bd", "#fdc583", "#f9a05a", "#f27d42"),
    "share": ("#ffffff", "#e6f0fa", "#c9dff5", "#a3c9ee", "#7db2e6", "#599cdd"),
}
DARK = {
    "page": "#0f1216",
    "card": "#171b21",
    "text": "#e8ebef",
    "muted": "#9aa5b1",
    "line": "#2d343d",
    "accent": "#6db3f8",
    "positive": "#6db3f8",
    "negative": "#fb9256",
    "surprisal": ("#20242a", "#3d2c1d", "#5c391b", "#7d4517", "#a0500f"),
    "share": ("#171b21", "#17293c", "#173657", "#184676", "#1b5796", "#2065ad"),
}


def surprisal_level(bits: float) -> int:
    """Return the level of a surprisal in bits: 0 to 4.

    >>> surprisal_level(0.5), surprisal_level(12)
    (0, 4)
    """
    return bisect_left(SURPRISAL_LIMITS, bits)


def share_level(share: float) -> int:
    """Return the level of a probability or share: 0 to 5. Shares below 0 have level 0.

    >>> share_level(0.01), share_level(0.5), share_level(1)
    (0, 3, 5)
    """
    return bisect_left(SHARE_LIMITS, share)
