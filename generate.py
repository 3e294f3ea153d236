"""Continue a prompt: `python generate.py "Once upon a time" --temperature 0.7 --do_sample`. It runs `gpt2 generate`."""

from gpt2.cli import main

if __name__ == "__main__":
    main(prog_name="generate.py", command="generate")
