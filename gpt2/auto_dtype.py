"""`dtype="auto"`: the fastest dtype on this machine with which a model says what it says in float32.

That is tried out, not supposed: each candidate continues a text greedily, and one pass in float32 over what it wrote tells
whether float32 would have written the same.
"""

from __future__ import annotations

import os

import torch

from gpt2.checkpoints.loading import load_model
from gpt2.device import resolve_device
from gpt2.model import GPT2

_N_TOKENS = 48

# A token that float32 holds for this much less probable than its own choice, in nats, is as good as that: a tie.
_TIE = 0.01


def load_fastest(name_or_folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> GPT2:
    """The model in the first dtype, from the fastest on, whose greedy text is that of float32; else in float32.

    `quantization.is_int8` and `model.dtype` tell which it is. It takes about as long as to generate 50 tokens.
    """
    target = resolve_device(device)
    reference = load_model(name_or_folder, device=target)
    for dtype in _candidates(target):
        candidate = load_model(name_or_folder, device=target, dtype=dtype)
        if says_the_same(candidate, reference):
            return candidate
    return reference


def _candidates(device: torch.device) -> tuple[str, ...]:
    """The dtypes that may be faster than float32, the fastest first: measured on a CPU, supposed on others."""
    if device.type == "cpu":
        return "int8", "bfloat16"
    if device.type == "cuda":
        return ("bfloat16",) if torch.cuda.is_bf16_supported(including_emulation=False) else ("float16",)
    return ()


@torch.inference_mode()
def says_the_same(candidate: GPT2, reference: GPT2) -> bool:
    """Whether `reference` would choose the tokens of the greedy text that `candidate` writes, ties aside."""
    config = reference.config
    start = torch.tensor([[config.bos_token_id or 0]], device=reference.device)
    ids = candidate.generate(start, max_new_tokens=min(_N_TOKENS, config.n_positions - 1), stop_at_eot=False)
    log_probs = reference(ids[:, :-1]).float().log_softmax(-1)[0]
    chosen = log_probs.gather(1, ids[0, 1:, None])[:, 0]
    return bool((log_probs.amax(-1) - chosen < _TIE).all())
