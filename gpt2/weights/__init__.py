"""Model folders: which files they hold, names, reading, writing, the tokenizer beside them."""
