"""The page of `gpt2 inspect` about a text, to which the playground links. It knows no HTTP."""

from __future__ import annotations

import copy

import torch

from gpt2.inspection.overviews import overview
from gpt2.inspection.page import MAX_TOKENS, html_page
from gpt2.model import GPT2
from gpt2.serving.fields import ApiError
from gpt2.serving.models import Served
from gpt2.serving.protocol import encoded
from gpt_config.errors import GPT2Error


def inspection_page(served: Served, text: str) -> str:
    """Return the HTML page of a text of 1 to 128 tokens. Raises ApiError for other texts.

    It may be called in any thread, while the engine uses the model.
    """
    ids = encoded(text, served, "text", special=False)
    if not 0 < len(ids) <= MAX_TOKENS:
        raise ApiError(f"text has {len(ids)} tokens: a page shows 1 to {MAX_TOKENS}", param="text")
    try:
        return html_page(overview(_twin(served.model), ids, tokenizer=served.tokenizer, name=served.name))
    except GPT2Error as error:
        raise ApiError(str(error), param="text") from None


def _twin(model: GPT2) -> GPT2:
    """A model with the same weights in memory and modules of its own: hooks on it do not change what the engine computes.

    One in 16 bits is copied to float32, because measures are computed in it.
    """
    if model.dtype in (torch.float16, torch.bfloat16):
        return copy.deepcopy(model).float()
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
