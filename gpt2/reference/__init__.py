"""Two more implementations of GPT-2, to read and to check the PyTorch model against.

`python_gpt2` uses the standard library only; `numpy_gpt2` uses NumPy, with gradients derived by hand. They share no
arithmetic with the PyTorch model or with each other, only configs, tokenizers and the code that finds and reads files.
"""
