"""The tokenizer's work on long texts, a whole block at a time in NumPy arrays.

It gives the ids that the plain modules give, and is held against them; nothing here is imported before a text is long.
"""
