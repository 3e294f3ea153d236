"""The fast paths of generation: the tokens of the model itself, in less time. They depend on the model, not on text.

With `limits.NOTHING_FAST`, generation uses the model itself; a test compares the ids of both. In float32 they are equal. In
16 bits and int8 the kernels round differently, so ids may differ where two logits are nearly equal.

- `plan` computes a step without calling modules. `forward` contains its computation. `scripted` runs it without Python.
- `linear` packs weights for the kernel that reads them fastest. `packed_rows` does so for several rows in float32,
  `int8_matrix` for many rows on matrix units.
- `greedy_head` finds the largest logit without reading the whole head. `cuda_graph` replays steps on a GPU.
- `unchanged` checks that the plan computes the same as the model. `limits` says when each path is used. `costs` has the
  costs of drafts.
"""
