"""Measures of traces against computations that are written out here."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2 import GPT2
from gpt2.inspection import (
    Trace,
    TunedLens,
    ablate_each_head,
    ablate_each_layer,
    attention_entropy,
    attention_rollout,
    duplicate_token_scores,
    gradient_times_input,
    head_scores,
    induction_scores,
    integrated_gradients,
    lens_losses,
    lens_table,
    log_probability_of,
    logit_attribution,
    logit_difference,
    logit_lens,
    logit_of,
    loss_on,
    most_exciting,
    patch_each,
    previous_token_scores,
    previous_tokens,
    repeated_tokens,
    residual_norms,
    trace,
    train_tuned_lens,
)
from gpt2.quantization.quantize import quantize_int8
from gpt2.weights.tuned_lens import load_tuned_lens, save_tuned_lens
from gpt_config import GPT2Config
from gpt_config.errors import CheckpointError, ConfigError, GPT2Error, InputError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model

CONFIG = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=3, n_head=3, bos_token_id=0)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG, positions=0.5)


@pytest.fixture(scope="module")
def found(model: GPT2) -> Trace:
    return trace(model, IDS)


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


# ---- Attention ------------------------------------------------------------------------------------------------------


def test_entropy_and_rollout(found: Trace) -> None:
    patterns = np.stack([found["hook_pattern", layer].numpy() for layer in range(3)]).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(patterns * np.log(patterns), -1)
    np.testing.assert_allclose(attention_entropy(found), entropy, atol=1e-5)
    rolled = np.eye(6)
    for layer in range(3):
        rolled = (0.3 * np.eye(6) + 0.7 * patterns[layer].mean(1)) @ rolled
        np.testing.assert_allclose(attention_rollout(found, residual=0.3)[layer], rolled, atol=1e-5)
    np.testing.assert_allclose(attention_rollout(found).sum(-1), 1, atol=1e-5)
    with pytest.raises(InputError, match="residual=2"):
        attention_rollout(found, residual=2)


def test_scores_of_heads_are_means_of_diagonals_on_repeated_tokens(model: GPT2) -> None:
    ids = repeated_tokens(31, 8, rows=3, seed=1)
    assert ids.shape == (3, 16) and torch.equal(ids[:, :8], ids[:, 8:]) and all(len(set(row)) == 8 for row in ids.tolist())
    repeated = trace(model, ids, "hook_pattern")
    patterns = repeated.stack("hook_pattern")  # (L, B, H, T, T)

    def diagonal(offset: int) -> Tensor:
        return patterns.diagonal(offset, -2, -1).mean((1, 3))

    close(previous_token_scores(repeated), diagonal(-1))
    close(duplicate_token_scores(repeated), diagonal(-8))
    close(induction_scores(repeated), diagonal(-7)[..., None].squeeze(-1) * 9 / 8 - patterns[..., 7, 0].mean(1) / 8)
    assert repeated_tokens(31, 8, first=30).tolist()[0][0] == 30
    with pytest.raises(InputError, match="31 ids"):
        repeated_tokens(31, 32)
    assert head_scores(repeated, torch.zeros(3, 16, 16, dtype=torch.bool)).isnan().all()


def test_scores_of_heads_do_not_see_padding(model: GPT2) -> None:
    ids = repeated_tokens(31, 5)
    padded, mask = torch.zeros(1, 14, dtype=torch.int64), torch.zeros(1, 14, dtype=torch.int64)
    places = [1, 2, 4, 5, 6, 7, 9, 10, 11, 12]  # padding before, between and after tokens
    padded[0, places], mask[0, places] = ids[0], 1
    alone, among = trace(model, ids, "hook_pattern"), trace(model, padded, "hook_pattern", attention_mask=mask)
    for score in (previous_token_scores, duplicate_token_scores, induction_scores):
        close(score(among), score(alone))
    assert previous_tokens(among).sum() >= 9


# ---- The logit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
def test_the_parts_of_a_logit_add_up(model: GPT2, found: Trace, by: str) -> None:
    tokens = found.logits.argmin(-1)
    parts = logit_attribution(model, found, tokens, by=by)
    close(parts.total, found.logits.amin(-1), 1e-4)
    difference = logit_attribution(model, found, 7, minus=tokens, by=by)
    close(difference.total, found.logits[..., 7] - found.logits.amin(-1), 1e-4)
    assert len(parts.names) == len(set(parts.names)) == len(parts.values)


def test_the_part_of_each_component_is_its_own(model: GPT2, found: Trace) -> None:
    def part(stream: Tensor) -> Tensor:
        """What a summand of the stream adds to the logit of token 7, written with the norm itself."""
        normed = (stream - stream.mean(-1, keepdim=True)) / found["ln_final.hook_scale"] * model.ln_f.weight
        return normed @ model.wte.weight[7]

    by = {name: logit_attribution(model, found, 7, by=name) for name in ("layer", "head", "neuron")}
    values = {name: value for one in by.values() for name, value in zip(*one, strict=True)}
    close(values["embed"], part(found["hook_embed"]))
    close(values["1_attn_out"], part(found["hook_attn_out", 1]))
    close(values["2_mlp_out"], part(found["hook_mlp_out", 2]))
    close(values["L1H2"], part(found["hook_result", 1][:, :, 2]))
    close(values["1_attn_bias"], part(model.h[1].attn.c_proj.bias).expand(2, 6))
    close(values["L0N40"], part(found["hook_post", 0][..., 40:41] * model.h[0].mlp.c_proj.weight[40]))
    close(values["bias"], (model.ln_f.bias @ model.wte.weight[7]).expand(2, 6))
    with pytest.raises(InputError, match="by='x'"):
        logit_attribution(model, found, 7, by="x")
    with pytest.raises(InputError, match="not in this trace"):
        logit_attribution(model, trace(model, IDS, "hook_z"), 7)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_the_parts_add_up_in_fewer_bits(model: GPT2, kind: str) -> None:
    """The parts are in float32 for a model in 16 bits. An int8 model has no gradients."""
    small = copy.deepcopy(model)
    if kind == "int8":
        small = quantize_int8(small) or small
        with pytest.raises(InputError, match="int8 weights have no gradients: load the model with dtype=float32"):
            gradient_times_input(small, IDS, lambda logits: logits[:, -1, 7])
    else:
        small = small.to(torch.bfloat16)
    found = trace(small, IDS)
    for by in ("layer", "head", "neuron"):
        total = logit_attribution(small, found, 7, by=by).total
        assert total.dtype == torch.float32
        close(total, found.logits[..., 7].float(), 0.1)


def test_residual_norms(found: Trace) -> None:
    norms = residual_norms(found)
    assert len(norms) == 2 + 5 * 3
    close(norms["blocks.1.hook_resid_mid"], found["hook_resid_mid", 1].square().sum(-1).sqrt())


# ---- Lenses ---------------------------------------------------------------------------------------------------------


def test_the_lens_of_the_last_layer_is_the_model(model: GPT2, found: Trace) -> None:
    assert torch.equal(logit_lens(model, found["hook_resid_post", 2]), found.logits)
    table = lens_table(model, found, 3)
    assert table.names == [f"blocks.{layer}.hook_resid_{place}" for layer in range(3) for place in ("mid", "post")]
    assert table.ids.shape == (6, 2, 6, 3) and (table.ranks[-1] == 1).all() and (table.divergences[-1] == 0).all()
    probabilities = logit_lens(model, found["hook_resid_mid", 1]).softmax(-1)
    close(table.probabilities[2], probabilities.topk(3).values)
    assert torch.equal(table.ids[2], probabilities.topk(3).indices)
    best = found.logits.argmax(-1)
    order = probabilities.argsort(-1, descending=True)
    assert torch.equal(table.ranks[2], (order == best[..., None]).long().argmax(-1) + 1)
    close(table.entropies[2], torch.distributions.Categorical(probabilities).entropy())
    own = torch.distributions.Categorical(logits=found.logits)
    close(table.divergences[2], torch.distributions.kl_divergence(own, torch.distributions.Categorical(probabilities)))
    with pytest.raises(InputError, match="hook_resid_mid or hook_resid_post"):
        lens_table(model, trace(model, IDS, "hook_z"))


def test_a_tuned_lens_learns_is_saved_and_leaves_the_model_as_it_is(model: GPT2, tmp_path: Path) -> None:
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 31, (8, 12), generator=generator) for _ in range(60)]
    tests = [trace(model, torch.randint(0, 31, (8, 12), generator=generator), "hook_resid_pre")]
    losses: list[float] = []
    lens = train_tuned_lens(model, batches, learning_rate=0.01, on_step=lambda step, loss: losses.append(loss))
    assert (lens_losses(model, tests, lens) < 0.7 * lens_losses(model, tests)).all()
    assert len(losses) == 60 and losses[-1] < 0.7 * losses[0]
    close(torch.tensor(losses[0]), lens_losses(model, [trace(model, batches[0], "hook_resid_pre")]).mean())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    table = lens_table(model, tests[0], lens=lens)
    assert table.names == [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    close(table.divergences.mean((1, 2)), lens_losses(model, tests, lens))

    save_tuned_lens(lens, tmp_path / "lens.safetensors")
    loaded = load_tuned_lens(tmp_path / "lens.safetensors", model)
    assert all(torch.equal(a, b) for a, b in zip(lens.parameters(), loaded.parameters(), strict=True))
    other = random_model(GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3))
    with pytest.raises(CheckpointError, match="2 layers of width 12"):
        load_tuned_lens(tmp_path / "lens.safetensors", other)
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 20)
    for name, error in (("broken.safetensors", CheckpointError), ("lens.bin", InputError)):
        with pytest.raises(error):
            load_tuned_lens(tmp_path / name, model)
    with pytest.raises(ConfigError):
        train_tuned_lens(model, batches, learning_rate=0)


def test_a_new_tuned_lens_is_the_logit_lens(model: GPT2, found: Trace) -> None:
    stream = found["hook_resid_pre", 1]
    assert torch.equal(TunedLens(3, 12)(model, 1, stream), logit_lens(model, stream))


# ---- Effects --------------------------------------------------------------------------------------------------------


def test_tokens_outside_the_vocabulary(model: GPT2, found: Trace) -> None:
    for wrong in (
        lambda: logit_attribution(model, found, 31), lambda: logit_attribution(model, found, 1, minus=-1),
        lambda: logit_of(31)(found.logits), lambda: lens_table(model, found, 32), lambda: lens_table(model, found, 0),
    ):  # fmt: skip
        with pytest.raises(GPT2Error):
            wrong()


def test_metrics(found: Trace) -> None:
    logits, targets = found.logits, torch.tensor([4, 9])
    assert torch.equal(logit_of(5)(logits), logits[:, -1, 5])
    assert torch.equal(logit_of(targets, position=2)(logits), torch.stack([logits[0, 2, 4], logits[1, 2, 9]]))
    close(logit_difference(targets, 3)(logits), logit_of(targets)(logits) - logits[:, -1, 3])
    close(
        log_probability_of(targets)(logits),
        torch.stack([logits[0, -1].log_softmax(-1)[4], logits[1, -1].log_softmax(-1)[9]]),
    )
    close(loss_on(IDS)(logits)[0], torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:]))
    close(loss_on(IDS, start=3)(logits)[1], torch.nn.functional.cross_entropy(logits[1, 2:-1], IDS[1, 3:]))


def test_each_entry_of_an_ablation_is_an_edit_of_the_weights(model: GPT2) -> None:
    metric = loss_on(IDS)
    heads, layers = ablate_each_head(model, IDS, metric), ablate_each_layer(model, IDS, metric)
    assert heads.values.shape == (3, 3) and layers.values.shape == (3, 2)
    close(heads.base, metric(model(IDS)).mean())
    for layer in range(3):
        for head in range(3):
            edited = copy.deepcopy(model)
            edited.h[layer].attn.c_proj.weight.data[4 * head : 4 * head + 4] = 0
            close(heads.values[layer, head], metric(edited(IDS)).mean())
        for column, part in enumerate(("attn", "mlp")):
            edited = copy.deepcopy(model)
            for parameter in getattr(edited.h[layer], part).c_proj.parameters():
                parameter.data.zero_()
            close(layers.changes[layer, column], metric(edited(IDS)).mean() - layers.base)
    assert not torch.allclose(ablate_each_head(model, IDS, metric, mean_of=trace(model, IDS)).values, heads.values)
    with pytest.raises(InputError, match="no source"):
        _ = heads.recovered


def test_patching_recovers_where_the_texts_differ(model: GPT2) -> None:
    """The texts differ in token 2 only, so the stream before layer 0 is restored by patching position 2, and no other."""
    corrupt = IDS.clone()
    corrupt[:, 2] = torch.tensor([11, 12])
    clean, metric = trace(model, IDS), logit_difference(4, 9)
    table = patch_each(model, clean, corrupt, metric)
    close(table.base, metric(model(corrupt)).mean())
    close(table.recovered[0], torch.tensor([0.0, 0, 1, 0, 0, 0]))
    close(table.recovered[:, :2], torch.zeros(3, 2))  # before the difference
    last = patch_each(model, clean, corrupt, metric, "hook_resid_post").recovered
    close(last[2], torch.tensor([0.0, 0, 0, 0, 0, 1]))
    for name in ("hook_z", "attn.hook_v", "hook_pattern", "hook_attn_scores", "hook_result"):
        values = patch_each(model, clean, corrupt, metric, name).recovered
        assert values.shape == (3, 3) and values.abs().max() > 1e-3
    assert patch_each(model, clean, corrupt, metric, "hook_mlp_out").values.shape == (3, 6)
    with pytest.raises(InputError, match="same number of tokens"):
        patch_each(model, clean, corrupt[:, :3], metric)


# ---- Gradients ------------------------------------------------------------------------------------------------------


def test_gradients_of_tokens() -> None:
    model = random_model(CONFIG, dtype=torch.float64, positions=0.5)
    metric = log_probability_of(torch.tensor([4, 9]))
    found = gradient_times_input(model, IDS, metric)
    embedded = model.wte.weight[IDS].detach()
    for at in range(6):  # the slope of the metric if the embedding of one token is scaled
        scaled = [copy.deepcopy(embedded) for _ in range(2)]
        scaled[0][:, at] *= 1 + 1e-5
        scaled[1][:, at] *= 1 - 1e-5
        above, below = (metric(_from_embeddings(model, x)) for x in scaled)
        close(found.scores[:, at], (above - below) / 2e-5, 1e-7)
    zero = metric(_from_embeddings(model, torch.zeros_like(embedded)))
    close(found.total, metric(model(IDS)) - zero)
    errors = [integrated_gradients(model, IDS, metric, steps=steps).error.max().item() for steps in (2, 8, 32)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 1e-3
    close(integrated_gradients(model, IDS, metric).total, found.total)
    from_token = integrated_gradients(model, IDS, metric, baseline=7)
    close(from_token.total, metric(model(IDS)) - metric(model(torch.full_like(IDS, 7))))
    assert from_token.error.max() < 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())


def _from_embeddings(model: GPT2, embedded: Tensor) -> Tensor:
    return model.logits(model.stream(embedded + model.wpe.weight[:6], None, None)).detach()


def test_integrated_gradients_of_a_linear_metric_are_exact(model: GPT2) -> None:
    """With all layers ablated and a constant norm, the metric is linear in the embeddings, and one step is enough."""
    from gpt2.inspection import ablate_layers, intervene

    with intervene(model, ablate_layers(range(3)), {"ln_final.hook_scale": 2.0}):
        found = integrated_gradients(model, IDS, logit_of(5), steps=1)
    assert found.error.max() < 1e-4 and found.scores[:, :-1].abs().max() == 0
    for wrong in (lambda logits: logits.sum(), lambda logits: logits[:, -1]):
        with pytest.raises(InputError, match="one number for each row"):
            gradient_times_input(model, IDS, wrong)
    with pytest.raises(ConfigError):
        integrated_gradients(model, IDS, logit_of(5), steps=0)


# ---- A corpus -------------------------------------------------------------------------------------------------------


def test_the_most_exciting_texts(model: GPT2) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 31, (length,), generator=generator).tolist() for length in (3, 24, 9, 1, 30, 12, 0, 5)]
    best = most_exciting(model, iter(rows), 1, 17, 3, batch_size=2)
    alone = {number: trace(model, row[:24])["hook_post", 1][0, :, 17] for number, row in enumerate(rows) if row}
    order = sorted(alone, key=lambda number: -alone[number].max().item())
    assert [one.text for one in best] == order[:3]
    for one in best:
        close(torch.tensor(one.values), alone[one.text])
        assert (
            one.ids == rows[one.text][:24]
            and one.position == alone[one.text].argmax()
            and math.isclose(one.value, max(one.values))
        )
    assert most_exciting(model, rows, -1, -1, 1, name="hook_resid_post")[0].value > 0


def test_the_most_exciting_of_texts_in_words(model: GPT2, small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    texts = ["the cat", "far away", "every day the dog"]
    best = most_exciting(small_model, texts, 0, 3, 2, tokenizer=small_tokenizer)
    assert [one.ids for one in best] == [small_tokenizer.encode(texts[one.text]) for one in best]
    for arguments in ((small_model, texts, 0, 3), (model, [[1]], 9, 3), (model, [[1]], 0, 99), (model, [[1]], 0, 0, 0)):
        with pytest.raises(GPT2Error):
            most_exciting(*arguments)
