"""From paths to documents and records: what a file is, by its content, and readers of each format. It knows no tokenizer."""
