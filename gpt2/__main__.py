"""`python -m gpt2` runs the `gpt2` command."""

from gpt2.cli import main

if __name__ == "__main__":
    main()
