"""Activations and measures as TransformerLens computes them, for the golden file and for the live comparison.

Run it in an environment with torch, transformer_lens 4.3.0 and pytest to write the golden file again:

    PYTHONPATH=. python -m gpt_test.gpt2.inspection.transformer_lens_oracle

gpt2-tiny is stored in float16, so it is loaded in float32; attention must be eager, or there are no patterns. Activations
are those of unprocessed weights. TransformerLens attributes logits with the final norm folded into the weights, so for that
the weights are folded and centred, except the head, and value biases stay where they are.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2 import GPT2
from gpt2.inspection import activation_names
from gpt_config import GPT2Config
from gpt_config.shipped import shipped_models

GOLDEN = Path(__file__).parent / "golden" / "transformer_lens.json"
N_VALUES = 12  # of each array in the golden file, besides two sums
TEXT = "Once upon a time, there was a little girl named Lily. Once upon a time, there was a little dog."

Arrays = dict[str, np.ndarray[Any, Any]]


class Case(NamedTuple):
    """A model, two texts of the same length, and two tokens that a metric compares after the last token."""

    model: GPT2
    clean: Tensor
    corrupt: Tensor
    tokens: tuple[int, int]


def cases() -> dict[str, Case]:
    """The cases by name. The random model's numbers come from a formula, so that no generator of random numbers matters."""
    clean = torch.tensor([[300, 17, 256, 3000, 17, 256, 9, 300], [5, 4, 3, 2, 1, 0, 4000, 1234]])
    corrupt = clean.clone()
    corrupt[:, 3] = torch.tensor([40, 41])
    tiny = GPT2.from_pretrained("gpt2-tiny")
    config = GPT2Config(vocab_size=29, n_positions=16, n_embd=12, n_layer=3, n_head=3, n_inner=20)
    return {
        "gpt2-tiny": Case(tiny, clean, corrupt, (300, 1234)),
        "random": Case(formula_model(config), clean % 29, corrupt % 29, (3, 20)),
    }


def formula_model(config: GPT2Config) -> GPT2:
    """A model in eval mode whose parameters are far from their initial values, and irregular."""
    model = GPT2(config).eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            at = torch.arange(parameter.numel(), dtype=torch.float64)
            centre = 1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
            parameter.copy_((centre + 0.3 * torch.sin(0.37 * at * at + 1.7 * number)).view(parameter.shape))
    return model


def logit_difference(case: Case) -> Callable[[Tensor], Tensor]:
    """The metric of the tables."""
    return lambda logits: (logits[:, -1, case.tokens[0]] - logits[:, -1, case.tokens[1]]).mean()


def patched_sites(case: Case) -> tuple[str, ...]:
    """The activations that are patched one by one: of the larger model fewer, because this takes the longest."""
    if case.model.config.n_embd > 100:
        return ("hook_resid_pre", "hook_z")
    of_heads = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_pattern")
    return ("hook_resid_pre", "hook_resid_mid", "hook_attn_out", "hook_mlp_out", *of_heads)


def reduced(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """What the golden file has of an array: its shape, two sums of its finite numbers, and some of them."""
    flat = np.where(np.isneginf(array), 0, array).astype(np.float64).reshape(-1)
    places = np.linspace(0, flat.size - 1, min(N_VALUES, flat.size)).round().astype(int)
    values = [float(f"{value:.7g}") for value in flat[places]]
    weights = np.cos(np.arange(flat.size))  # so that a permutation shows
    sums = [float(f"{value:.9g}") for value in (np.abs(flat).mean(), (flat * weights).mean())]
    return {"shape": list(array.shape), "means": sums, "values": values}


# ---- TransformerLens ------------------------------------------------------------------------------------------------


def boot(case: Case, folder: Path, **processing: Any) -> Any:
    """The model of a case in TransformerLens."""
    import transformers
    from transformer_lens import TransformerBridge

    case.model.save_pretrained(folder)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(shipped_models()["gpt2-tiny"])
    options = {"tokenizer": tokenizer, "device": "cpu", "dtype": torch.float32}
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=theirs, **options)
    bridge.enable_compatibility_mode(disable_warnings=True, **processing)
    bridge.set_use_attn_result(True)
    bridge.set_use_hook_mlp_in(True)
    return bridge


@torch.no_grad()
def transformer_lens_arrays(case: Case) -> Arrays:
    """All arrays of a case by name: activations, and measures."""
    with tempfile.TemporaryDirectory() as folder:
        plain = boot(case, Path(folder), no_processing=True)
        found = _activations(plain, case) | _tables(plain, case)
        if case.model.config.vocab_size > 4000:
            found |= _head_scores(plain)
        folded = boot(case, Path(folder), fold_value_biases=False, center_unembed=False)
        found |= _attributions(folded, case)
    return {name: np.asarray(value.detach().float().numpy()) for name, value in found.items()}


def _activations(bridge: Any, case: Case) -> dict[str, Tensor]:
    logits, cache = bridge.run_with_cache(case.clean)
    found = {
        name: cache[name].expand(len(case.clean), *cache[name].shape[1:]) for name in activation_names(len(case.model.h))
    }
    for name in list(found):
        if name.endswith(("hook_resid_mid", "hook_resid_post")):
            found[f"lens: {name}"] = bridge.unembed(bridge.ln_final(cache[name]))
    return {"logits": logits, **found}


def _tables(bridge: Any, case: Case) -> dict[str, Tensor]:
    from transformer_lens import patching

    metric = logit_difference(case)
    _, cache = bridge.run_with_cache(case.clean)
    sites = patched_sites(case)
    found = {
        f"patch: {name}": function(bridge, case.corrupt, cache, metric)
        for name, function in (
            ("hook_resid_pre", patching.get_act_patch_resid_pre),
            ("hook_resid_mid", patching.get_act_patch_resid_mid),
            ("hook_attn_out", patching.get_act_patch_attn_out),
            ("hook_mlp_out", patching.get_act_patch_mlp_out),
            ("hook_z", patching.get_act_patch_attn_head_out_all_pos),
            ("hook_q", patching.get_act_patch_attn_head_q_all_pos),
            ("hook_k", patching.get_act_patch_attn_head_k_all_pos),
            ("hook_v", patching.get_act_patch_attn_head_v_all_pos),
            ("hook_pattern", patching.get_act_patch_attn_head_pattern_all_pos),
        )
        if name in sites
    }

    def without(layer: int, head: int) -> Tensor:
        def ablate(z: Tensor, hook: Any) -> Tensor:
            z[:, :, head] = 0
            return z

        hooks = [(f"blocks.{layer}.attn.hook_z", ablate)]
        return metric(bridge.run_with_hooks(case.clean, fwd_hooks=hooks))

    config = case.model.config
    rows = [torch.stack([without(layer, head) for head in range(config.n_head)]) for layer in range(config.n_layer)]
    return {**found, "ablate: heads": torch.stack(rows)}


def _head_scores(bridge: Any) -> dict[str, Tensor]:
    from transformer_lens.head_detector import detect_head

    found = {
        f"heads: {kind}": detect_head(bridge, TEXT, f"{kind}_head")
        for kind in ("previous_token", "duplicate_token", "induction")
    }
    return {**found, "heads: ids": bridge.to_tokens(TEXT).float()}


def _attributions(bridge: Any, case: Case) -> dict[str, Tensor]:
    _, cache = bridge.run_with_cache(case.clean)
    tokens = torch.full_like(case.clean, case.tokens[0])
    layers = cache.decompose_resid(layer=-1, return_labels=False)
    heads = cache.stack_head_results(layer=-1, return_labels=False)
    neurons = cache.stack_neuron_results(layer=-1, return_labels=False)
    return {
        "attribution: layer": cache.logit_attrs(layers, tokens),
        "attribution: head": cache.logit_attrs(heads, tokens),
        "attribution: neuron": cache.logit_attrs(neurons, tokens),
        "attribution: bias": bridge.b_U[case.tokens[0]],
    }


def main() -> None:
    from importlib.metadata import version

    packages = ("transformer-lens", "torch", "transformers", "numpy")
    golden = {
        "made by": f"gpt_test/gpt2/inspection/{Path(__file__).name}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        **{
            name: {key: reduced(value) for key, value in transformer_lens_arrays(case).items()}
            for name, case in cases().items()
        },
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden).replace('}, "', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
