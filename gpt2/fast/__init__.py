"""The fast paths of generation: the same tokens as from the model itself, in less time. They know no prompts and no text.

With `limits.NOTHING_FAST` generation uses the model itself, and a test holds the ids of both against each other. In float32
they are equal. In 16 bits and int8 other kernels round to other last digits.

- `plan` computes a step without the calls of modules, `forward` is what it computes, `scripted` runs that without Python.
- `linear` arranges weights for the kernel that reads them fastest, `int8_matrix` for many rows on matrix units.
- `greedy_head` finds the largest logit without all of the head, `cuda_graph` replays steps on a GPU.
- `unchanged` says whether a model is one that the plan knows, `limits` from where on each path is taken, `costs` what
  drafts cost.
"""
