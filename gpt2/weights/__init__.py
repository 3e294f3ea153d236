"""Model folders: which files they contain, parameter names, reading, writing, and the tokenizer of a model."""
