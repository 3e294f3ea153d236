"""Results of the GPT-2 paper: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), table 3."""

from __future__ import annotations

# The paper's names for the sizes. The true numbers of parameters are larger: 124M, 355M, 774M and 1558M.
SIZES = ("117M", "345M", "762M", "1542M")

TABLE_3 = {
    "LAMBADA PPL": (35.13, 15.60, 10.87, 8.63),
    "LAMBADA ACC": (45.99, 55.48, 60.12, 63.24),
    "CBT-CN ACC": (87.65, 92.35, 93.45, 93.30),
    "CBT-NE ACC": (83.4, 87.1, 88.0, 89.05),
    "WikiText2 PPL": (29.41, 22.76, 19.93, 18.34),
    "PTB PPL": (65.85, 47.33, 40.31, 35.76),
    "enwik8 BPB": (1.16, 1.01, 0.97, 0.93),
    "text8 BPC": (1.17, 1.06, 1.02, 0.98),
    "WikiText103 PPL": (37.50, 26.37, 22.05, 17.48),
    "1BW PPL": (75.20, 55.72, 44.575, 42.16),
}

# For each task or corpus: the rows of table 3 to print next to our figures, and how the paper's method differs.
BESIDE = {
    "lambada": (
        ("LAMBADA PPL", "LAMBADA ACC"),
        "its accuracies use a stop-word filter (without it, 1542M has 52.66) and its de-tokenizers are not published; here "
        "there is no filter, and texts are used as they are in the file",
    ),
    "wikitext": (
        ("WikiText2 PPL",),
        "it reports perplexity per word, so compare word_perplexity; its de-tokenizers and windows are not published",
    ),
    "ptb": (
        ("PTB PPL",),
        "it reports perplexity per word, so compare word_perplexity; its de-tokenizers and windows are not published",
    ),
}


def rows_beside(name: str) -> dict[str, dict[str, float]]:
    """The rows of table 3 for the task or corpus `name`: {row: {size: value}}, empty if the paper has none."""
    rows = BESIDE[name][0] if name in BESIDE else ()
    return {row: dict(zip(SIZES, TABLE_3[row], strict=True)) for row in rows}


def table_beside(name: str) -> str:
    """The same rows as lines of text, then a sentence on how the paper's method differs; "" if the paper has none."""
    if name not in BESIDE:
        return ""
    lines = [f"{'the paper':16}" + "".join(f"{size:>9}" for size in SIZES)]
    for row, values in rows_beside(name).items():
        lines.append(f"{row:16}" + "".join(f"{value:9.2f}" for value in values.values()))
    return "\n".join([*lines, f"The paper's method differs: {BESIDE[name][1]}."])
