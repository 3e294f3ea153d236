"""Continue a prompt: `python generate.py "Once upon a time" --temperature 0.7 --do_sample`. The same as `gpt2 generate`."""

from gpt2.cli.generate import generate
from gpt2.cli.group import run

if __name__ == "__main__":
    run(generate, None, "generate.py")
