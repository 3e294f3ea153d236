"""Interventions: the same results as hand-made edits of the weights, in calls and in generation, and nothing stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt2 import GPT2, stream
from gpt2.fast.plan import DecodePlan
from gpt2.inspection import (
    Site,
    ablate_heads,
    ablate_layers,
    ablate_neurons,
    activation_names,
    intervene,
    patch,
    replace_pattern,
    steer,
    token_mean,
    trace,
)
from gpt2.inspection.intervention import Edits
from gpt_config import GPT2Config
from gpt_config.errors import InputError, InputTypeError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model

CONFIG = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=3, n_head=3, bos_token_id=0)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
OTHER = torch.tensor([[7, 7, 1, 2, 0, 4], [5, 6, 5, 8, 5, 1]])


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG, positions=0.5)


def generated(model: GPT2) -> Tensor:
    return model.generate(IDS, max_new_tokens=8, stop_at_eot=False)


# (edits, the hand-made edit of the weights)
Case = tuple[Callable[[GPT2], Edits], Callable[[GPT2], object]]
FIRST = slice(0, 4)  # the rows of head 0
MEANS = [0.1 * number for number in range(12)]


def _case_head_mean(edited: GPT2) -> None:
    """The mean of a head as part of the bias."""
    edited.h[1].attn.c_proj.bias += (
        token_mean(_of_other(edited), "blocks.1.attn.hook_z")[2] @ edited.h[1].attn.c_proj.weight[8:]
    )
    edited.h[1].attn.c_proj.weight[8:] = 0


def _of_other(model: GPT2):
    return trace(model, OTHER)


CASES: dict[str, Case] = {
    "a head": (
        lambda model: ablate_heads([(1, 2), (0, 0), (1, -3)]),
        lambda m: [m.h[i].attn.c_proj.weight[rows].zero_() for i, rows in ((1, slice(8, 12)), (0, FIRST), (1, FIRST))],
    ),
    "the mean of a head": (lambda model: ablate_heads([(1, 2)], mean_of=_of_other(model)), _case_head_mean),
    "neurons": (
        lambda model: ablate_neurons([(2, 5), (2, 40)]),
        lambda m: (m.h[2].mlp.c_proj.weight[5].zero_(), m.h[2].mlp.c_proj.weight[40].zero_()),
    ),
    "a layer": (
        lambda model: ablate_layers([1]),
        lambda m: [p.zero_() for part in (m.h[1].attn, m.h[1].mlp) for p in part.c_proj.parameters()],
    ),
    "the MLP of a layer": (
        lambda model: ablate_layers([0], part="mlp"),
        lambda m: (m.h[0].mlp.c_proj.weight.zero_(), m.h[0].mlp.c_proj.bias.zero_()),
    ),
    "steering": (
        lambda model: steer("blocks.1.hook_resid_mid", torch.tensor(MEANS), scale=2.0),
        lambda m: m.h[1].attn.c_proj.bias.add_(torch.tensor(MEANS), alpha=2),
    ),
    "the queries": (
        lambda model: {"blocks.2.attn.hook_q": lambda q: 2 * q},
        lambda m: (m.h[2].attn.c_attn.weight[:, :12].mul_(2), m.h[2].attn.c_attn.bias[:12].mul_(2)),
    ),
    "keys and values": (
        lambda model: {"blocks.*.attn.hook_[kv]": 0.5},
        lambda m: [(block.attn.c_attn.weight[:, 12:].zero_(), block.attn.c_attn.bias[12:].fill_(0.5)) for block in m.h],
    ),
    "the normalized stream": (
        lambda model: {"ln_final.hook_normalized": lambda x: 2 * x, "ln2.hook_scale": lambda x: 3 * x},
        lambda m: [m.ln_f.weight.mul_(2), *(block.ln_2.weight.div_(3) for block in m.h)],
    ),
    "embeddings": (
        lambda model: {"hook_embed": lambda x: x * 1.5, "hook_pos_embed": torch.zeros(12)},
        lambda m: (m.wpe.weight.zero_(), setattr(m, "wte", _Scaled(m.wte))),
    ),
    "a uniform pattern": (
        lambda model: {"hook_pattern": lambda p: (p > 0) / (p > 0).sum(-1, keepdim=True)},
        lambda m: [(b.attn.c_attn.weight[:, :12].zero_(), b.attn.c_attn.bias[:12].zero_()) for b in m.h],
    ),
    "the scores": (
        lambda model: {"hook_attn_scores": lambda s: 3 * s},
        lambda m: [setattr(block.attn, "scale", 3 * block.attn.scale) for block in m.h],
    ),
    "the results of heads": (
        lambda model: {"blocks.0.attn.hook_result": lambda r: torch.stack([r[:, :, 0], 2 * r[:, :, 1], 0 * r[:, :, 2]], 2)},
        lambda m: (m.h[0].attn.c_proj.weight[4:8].mul_(2), m.h[0].attn.c_proj.weight[8:].zero_()),
    ),
    "before the activation": (
        lambda model: {"mlp.hook_pre": lambda x: x + 1},
        lambda m: [block.mlp.c_fc.bias.add_(1) for block in m.h],
    ),
}  # fmt: skip


class _Scaled(torch.nn.Module):
    def __init__(self, wte: torch.nn.Module) -> None:
        super().__init__()
        self.wte = wte

    def forward(self, ids: Tensor) -> Tensor:
        return self.wte(ids) * 1.5

    def logits(self, hidden: Tensor) -> Tensor:
        return self.wte.logits(hidden)


@pytest.mark.parametrize("name", CASES)
def test_an_intervention_is_a_hand_made_edit_of_the_weights(model: GPT2, name: str) -> None:
    edits, edit_weights = CASES[name]
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edit_weights(edited)
    before = model(IDS)
    with intervene(model, edits(model)):
        torch.testing.assert_close(model(IDS), edited(IDS), rtol=1e-4, atol=1e-4)
        ids = generated(model)
    assert torch.equal(ids, generated(edited))
    assert not torch.allclose(before, edited(IDS), atol=1e-3)
    assert torch.equal(model(IDS), before) and DecodePlan.fits(model)


def test_streams_run_with_the_intervention(small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    edited = copy.deepcopy(small_model)
    edited.h[0].mlp.c_proj.weight.data.zero_(), edited.h[0].mlp.c_proj.bias.data.zero_()
    with intervene(small_model, ablate_layers([0], part="mlp")):
        found = list(stream(small_model, small_tokenizer, "the cat", max_new_tokens=8))
    assert found == list(stream(edited, small_tokenizer, "the cat", max_new_tokens=8))
    assert found != list(stream(small_model, small_tokenizer, "the cat", max_new_tokens=8))


@pytest.mark.parametrize("name", activation_names(3))
def test_a_patch_of_each_activation_is_seen_there_and_changes_what_follows(model: GPT2, name: str) -> None:
    source = trace(model, OTHER, name)
    with intervene(model, patch(source, name)):
        found = trace(model, IDS)
    torch.testing.assert_close(found[name], source[name])
    names = activation_names(3)
    clean = trace(model, IDS)
    assert all(torch.equal(found[before], clean[before]) for before in names[: names.index(name)])
    assert not torch.allclose(found.logits, clean.logits, atol=1e-4) or name == "hook_pos_embed"
    if name in ("blocks.2.hook_resid_post", "ln_final.hook_normalized"):
        torch.testing.assert_close(found.logits, model(OTHER))


@pytest.mark.parametrize("positions", [[0], [1, -1], None])
def test_a_patch_of_positions_holds_in_generation_too(model: GPT2, positions: list[int] | None) -> None:
    """The patched prompt is cached; the tokens after it are not patched. Without a cache the same ids come."""
    edits = patch(trace(model, OTHER), ["blocks.1.hook_resid_pre", "blocks.2.attn.hook_z"], positions=positions)
    with intervene(model, edits):
        cached = generated(model)
        assert torch.equal(cached, model.generate(IDS, max_new_tokens=8, stop_at_eot=False, use_cache=False))
        found = trace(model, IDS)
    source, clean = trace(model, OTHER), trace(model, IDS)
    places = range(6) if positions is None else [at % 6 for at in positions]
    for at in range(6):
        expected = source if at in places else clean
        assert torch.equal(found["hook_resid_pre", 1][:, at], expected["hook_resid_pre", 1][:, at])
    with intervene(model, steer("hook_embed", torch.ones(12), positions=[2])):
        assert torch.equal(generated(model), model.generate(IDS, max_new_tokens=8, stop_at_eot=False, use_cache=False))


def test_a_patch_of_heads_leaves_the_others(model: GPT2) -> None:
    source, clean = trace(model, OTHER), trace(model, IDS)
    for name, heads_at in (("hook_z", 2), ("hook_pattern", 1), ("hook_attn_scores", 1)):
        with intervene(model, patch(source, f"blocks.0.attn.{name}", heads=[-1])):
            found = trace(model, IDS)
        kept, patched = found[name, 0].movedim(heads_at, 0).split([2, 1])
        assert torch.equal(kept, clean[name, 0].movedim(heads_at, 0)[:2])
        assert torch.equal(patched, source[name, 0].movedim(heads_at, 0)[2:])


def test_patterns_of_one_head(model: GPT2) -> None:
    first = torch.zeros(24, 24)
    first[:, 0] = 1
    with intervene(model, replace_pattern(1, 2, first), replace_pattern(0, 0, lambda p: p.flip(-1))):
        found = trace(model, IDS)
        cached = generated(model)
        assert torch.equal(cached[:, -1], trace(model, cached[:, :-1], "hook_z").logits[:, -1].argmax(-1))
    assert torch.equal(found["hook_z", 1][:, :, 2], found["hook_v", 1][:, :1, 2].expand(-1, 6, -1))
    with pytest.raises(InputError, match="give 6 x 6"), intervene(model, replace_pattern(1, 2, first[:3, :3])):
        model(IDS)


def test_edits_apply_in_the_order_of_computation_however_they_are_nested(model: GPT2) -> None:
    seen = []

    def note(value: Tensor, site: Site) -> None:
        seen.append(site.name)

    with (
        intervene(model, {"blocks.0.hook_resid_post": lambda x: x + 1}),
        intervene(model, {"hook_resid_mid": lambda x: 2 * x}),
    ):
        inner_first = trace(model, IDS)
    with intervene(model, {"hook_resid_mid": lambda x: 2 * x}, {"blocks.0.hook_resid_post": lambda x: x + 1}):
        assert torch.equal(model(IDS), inner_first.logits)
        with intervene(model, {"*": note}):
            model(IDS)
    assert seen == activation_names(3)
    mid, out = inner_first["hook_resid_mid", 0], inner_first["hook_mlp_out", 0]
    torch.testing.assert_close(inner_first["hook_resid_post", 0], mid + out + 1)
    with intervene(model, {"hook_z": 1.0}, {"hook_z": lambda z: 2 * z}), intervene(model, {"hook_z": lambda z: z + 1}):
        assert trace(model, IDS, "hook_z")["hook_z", 0].unique().tolist() == [3.0]
        with intervene(model, {"hook_z": lambda z: 5 * z}):
            assert trace(model, IDS, "hook_z")["hook_z", 0].unique().tolist() == [15.0]
        assert trace(model, IDS, "hook_z")["hook_z", 0].unique().tolist() == [3.0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None])
@pytest.mark.parametrize(
    "at", ["hook_embed", "blocks.1.attn.hook_pattern", "blocks.2.hook_resid_mid", "ln_final.hook_scale"]
)
def test_nothing_stays_after_an_error(model: GPT2, error: type[BaseException] | None, at: str) -> None:
    before, modules = model(IDS), dict(model.named_modules())
    own = {name: set(vars(module)) for name, module in modules.items()}

    def interrupt(value: Tensor) -> Tensor:
        if error is None:
            return value + 1
        raise error

    def run() -> None:
        with intervene(model, {at: interrupt}), intervene(model, {"hook_z": 0.0}):
            generated(model)

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    for name, module in model.named_modules():
        assert module is modules[name] and set(vars(module)) == own[name]
        assert not any(value for key, value in vars(module).items() if "hooks" in key)
    assert torch.equal(model(IDS), before) and DecodePlan.fits(model)


def test_gradients_flow_through_edits(model: GPT2) -> None:
    vector = torch.zeros(12, requires_grad=True)
    with intervene(model, steer("blocks.1.hook_resid_pre", vector)):
        model(IDS)[:, -1, 3].sum().backward()
    expected = trace(model, IDS, with_gradients=True)
    gradient = expected.gradients(expected.logits[:, -1, 3].sum())["blocks.1.hook_resid_pre"]
    torch.testing.assert_close(vector.grad, gradient.sum((0, 1)))
    assert model.wte.weight.grad is not None
    model.zero_grad()


def test_functions_of_one_and_two_parameters(model: GPT2) -> None:
    names: list[str] = []

    def as_in_transformer_lens(value: Tensor, hook: Site) -> Tensor:
        names.append(hook.name)
        return value

    def in_place(value: Tensor, scale: float = 2.0) -> None:
        value *= scale

    expected = trace(model, IDS, "hook_post")["hook_post", 0]
    with intervene(model, {"blocks.0.mlp.hook_post": as_in_transformer_lens}, {"blocks.0.mlp.hook_post": in_place}):
        assert torch.equal(trace(model, IDS, "hook_post")["hook_post", 0], 2 * expected)
    with intervene(model, {"blocks.0.mlp.hook_post": torch.relu}):
        assert torch.equal(trace(model, IDS, "hook_post")["hook_post", 0], expected.relu())
    assert names == ["blocks.0.mlp.hook_post"]


def test_a_site_has_the_layer_and_the_number_of_tokens_before(model: GPT2) -> None:
    sites: list[Site] = []
    with intervene(model, {"*": lambda value, site: sites.append(site)}):
        model.generate(IDS, max_new_tokens=3, stop_at_eot=False)
    assert {(site.name.split(".")[1], site.layer) for site in sites if site.layer is not None} == {
        ("0", 0),
        ("1", 1),
        ("2", 2),
    }
    assert {site.past for site in sites if site.name == "hook_embed"} == {0, 6, 7} == {site.past for site in sites}


def test_wrong_edits(model: GPT2) -> None:
    for edits, kind, message in [
        ({"hook_patern": 0.0}, InputError, "similar names"), ([("hook_z", 0.0)], InputTypeError, "mapping"),
        ({"hook_z": "zero"}, InputTypeError, "must be a tensor"), ({"hook_z": torch.zeros(5)}, InputError, "broadcasts"),
        ({"hook_z": lambda z: "zero"}, InputTypeError, "returned str"), (ablate_heads([(0, 3)]), InputError, "3 heads"),
        (ablate_neurons([(0, 99)]), InputError, "48 neurons"), (ablate_heads([(7, 0)]), InputError, "not the name"),
        (patch(trace(model, IDS[:, :3]), "hook_pattern"), InputError, "of one length"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message) as error, intervene(model, edits):
            model(IDS)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="part='x'"):
        ablate_layers([0], part="x")
    with pytest.raises(InputError, match="count from 0"):
        steer("hook_embed", torch.zeros(12), positions=[-1])
    with pytest.raises(InputError, match="not in this trace"):
        patch(trace(model, IDS, "hook_q"), "hook_z")
    with pytest.raises(InputTypeError), intervene(torch.nn.Linear(2, 2), {"hook_z": 0.0}):
        pass
    assert not any(module._forward_hooks for module in model.modules())
