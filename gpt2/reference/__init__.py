"""GPT-2 twice more, to be read and to check the PyTorch model against: in plain Python, and in NumPy with hand-written
gradients. They share no arithmetic with it or with each other, only configs, tokenizers and the place of files."""
