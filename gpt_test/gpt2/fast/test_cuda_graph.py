"""Steps that are replayed, as on a GPU, against those that are computed one by one. There is no GPU here: `Recorded` stands
for a CUDA graph, and does to tensors what that does to kernels."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2 import GPT2
from gpt2.fast.cuda_graph import GraphedStep, GraphedSteps
from gpt2.fast.limits import FAST, FastLimits, GraphLimits
from gpt2.fast.plan import DecodePlan
from gpt2.generation.batch import Batch
from gpt2.generation.decoder import Decoder
from gpt2.generation.loop import decode, start
from gpt2.generation.row import Row
from gpt2.generation.window import Window
from gpt2.kv_cache import KVCache
from gpt_config import CheckpointError, GenerationConfig, GPT2Config, GPT2Warning, InputError
from gpt_test.conftest import random_model, repetitive_model
from gpt_test.gpt2.fast.watching import calls_of

CONFIG = GPT2Config(vocab_size=60, n_positions=24, n_embd=32, n_layer=2, n_head=2)

# What a graph cannot hold: the processor would look at a number, or send one that it alone has.
_LOOKS = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "index", "equal", "lift_fresh", "to", "_to_copy"}


class Recorded(TorchDispatchMode):
    """The operations of a step in their order. To replay them is to compute each once more, from the same tensors into the
    same tensors, whatever Python would do by then."""

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        super().__init__()
        self.n_replays = 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        step()
        with self:
            step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.removeprefix("aten::") not in _LOOKS, func
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def __call__(self) -> None:
        self.n_replays += 1
        for func, args, kwargs, out in self._calls:
            aliases = [value.alias_info for value in func._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view: it stays where it is
            again = func(*args, **kwargs)
            if all(alias is None for alias in aliases):
                for there, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(there, Tensor):
                        there.copy_(new)


class Graphs:
    """Limits with which steps are recorded on this device, as soon as possible; what was recorded is in `made`."""

    def __init__(self, record: Callable[..., Any] = Recorded, **limits: int) -> None:
        self.made: list[Any] = []

        def recorder(step: Callable[[], None], device: torch.device) -> Any:
            self.made.append(record(step, device))
            return self.made[-1]

        soon = {"steps_before": 1, "steps_left": 1, "slots_at_once": 7, **limits}
        self.limits = FastLimits(
            graphs=GraphLimits(recorder=recorder, **soon),
            costs_of_drafts=(0.1, 0.1),  # guess often
        )


@pytest.fixture(autouse=True)
def _no_graph_fails() -> Iterator[None]:
    """A warning that there is no graph fails, but for the tests that expect it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no CUDA graph", GPT2Warning)
        yield


def continued(
    model: GPT2,
    prompts: list[list[int]],
    config: GenerationConfig,
    *,
    vocab_size: int | None = None,
    logprobs: bool = False,
    fast: FastLimits = FAST,
) -> list[Row]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a prompt has")
        rows = start(model, prompts, config, logprobs=logprobs)
    for _ in decode(Batch(model, vocab_size=vocab_size, fast=fast), rows):
        pass
    return rows


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@given(
    prompts=st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=30), min_size=1, max_size=5),
    n=st.integers(1, 60),
    do_sample=st.booleans(),
    logprobs=st.booleans(),
    vocab_size=st.integers(2, 60),
    slots_at_once=st.integers(1, 30),
    data=st.data(),
)
@settings(max_examples=25)
def test_texts_are_the_same(
    dtype: str,
    prompts: list[list[int]],
    n: int,
    do_sample: bool,
    logprobs: bool,
    vocab_size: int,
    slots_at_once: int,
    data: st.DataObject,
) -> None:
    """Padded, past the context, with rows that end and leave the batch, in part of the vocabulary, guessing ahead or not."""
    eot = data.draw(st.integers(0, vocab_size - 1))
    make = data.draw(st.sampled_from([random_model, repetitive_model]))
    model = make(replace(CONFIG, eos_token_id=eot), dtype=getattr(torch, dtype))
    config = GenerationConfig(max_new_tokens=n, do_sample=do_sample, seed=n, speculate=data.draw(st.booleans()))
    expected = continued(model, prompts, config, vocab_size=vocab_size, logprobs=logprobs)
    graphs = Graphs(slots_at_once=slots_at_once)
    found = continued(model, prompts, config, vocab_size=vocab_size, logprobs=logprobs, fast=graphs.limits)
    assert [(row.ids, row.finish_reason) for row in found] == [(row.ids, row.finish_reason) for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.logprobs == pytest.approx(other.logprobs, abs=1e-10 if dtype == "float64" else 1e-4)


@pytest.mark.parametrize(
    ("lengths", "n", "slots_at_once", "n_graphs"),
    [
        ([3], 19, 7, 3),  # after 4 tokens, 8 and 15
        ([3, 4, 5], 19, 7, 4),  # 6, 8, 15 and 22
        ([3], 30, 7, 6),  # 4, 8, 15 and 22; then half of the view is read anew, 12 tokens, and after 13 and 15
        ([3], 30, 23, 2),  # 4, and anew 13; after 24, where the cache is full, there are no steps to come
    ],
)
def test_steps_are_replayed(lengths: list[int], n: int, slots_at_once: int, n_graphs: int) -> None:
    """Else the test above would hold single steps against themselves."""
    config = GenerationConfig(max_new_tokens=n, stop_at_eot=False)
    graphs = Graphs(slots_at_once=slots_at_once)
    continued(random_model(CONFIG), [list(range(1, 1 + length)) for length in lengths], config, fast=graphs.limits)
    assert len(graphs.made) == n_graphs
    # What is computed without a graph is repeated by the one that it checks; only prompts are not, and the last of 24.
    assert sum(graph.n_replays for graph in graphs.made) == {19: 18, 30: 28}[n] - (slots_at_once == 23)


def test_few_steps_need_no_graph() -> None:
    graphs = Graphs(steps_left=5)
    for n, n_graphs in ((5, 0), (6, 1)):
        config = GenerationConfig(max_new_tokens=n, stop_at_eot=False)
        continued(random_model(CONFIG), [[1, 2, 3]], config, fast=graphs.limits)
        assert len(graphs.made) == n_graphs


def test_several_greedy_tokens_stay_in_the_vocabulary() -> None:
    model, config = random_model(CONFIG), GenerationConfig(max_new_tokens=18, stop_at_eot=False)
    [whole] = continued(model, [[1, 2, 3]], config)
    [part] = continued(model, [[1, 2, 3]], config, vocab_size=20)
    assert max(whole.ids) >= 20  # or the part would say nothing
    assert continued(model, [[1, 2, 3]], config, vocab_size=20, fast=Graphs().limits)[0].ids == part.ids


def test_beams_have_none() -> None:
    """Their rows are others after each step, and so is the cache."""
    config = GenerationConfig(max_new_tokens=15, num_beams=3, stop_at_eot=False)
    model = random_model(CONFIG)
    [expected] = continued(model, [[1, 2, 3]], config)
    graphs = Graphs(steps_before=2)
    [found] = continued(model, [[1, 2, 3]], config, fast=graphs.limits)
    assert found.ids == expected.ids and not graphs.made


def test_what_was_in_memory_does_no_harm() -> None:
    """A masked slot has no weight, but no weight times NaN is NaN; memory that was not written to may hold that."""
    model = random_model(CONFIG)
    expected = Decoder(model, [Window([1, 2, 3], 24)], 20)
    graphs = Graphs()
    with torch.inference_mode():
        found = Decoder(model, [Window([1, 2, 3], 24)], 20, fast=graphs.limits)
        for step in range(8):
            token = int(expected.next_logits().argmax())
            assert int(found.next_logits().argmax()) == token
            for each in (found, expected):
                each.windows[0].ids.append(token)
            assert found._cache is not None
            if step == 0:
                for layer in found._cache.layers:
                    layer[:, :, :, 3:] = float("nan")
    assert graphs.made


def test_guesses_go_beyond_a_graph() -> None:
    """What they read it has no slots for; what they leave behind, NaN even, it does not see."""
    model = random_model(CONFIG)
    with torch.no_grad():
        model.wpe.weight[10] = float("nan")

    def logits(fast: FastLimits, *, drafts: bool) -> Iterator[Tensor]:
        steps = Decoder(model, [Window([1, 2, 3], 24)], 20, only_largest=True, fast=fast)
        for token in (5, 6):
            yield steps.next_logits().clone()
            steps.windows[0].ids.append(token)
        if drafts:
            steps.next_logits([7, 8, 9])  # the last at position 7, the first that is not the graph's
            assert steps.reserve_greedy_steps() == 0
            steps.reject(3)
        else:
            steps.next_logits()
        steps.windows[0].ids.append(7)
        yield steps.next_logits([8, 9, 10, 11, 12] if drafts else ())[:1].clone()  # that at position 10 is NaN
        for token in (8, 9, 10):
            steps.windows[0].ids.append(token)
            yield steps.next_logits().clone()

    expected, graphs = list(logits(FAST, drafts=False)), Graphs()
    for found, right in zip(logits(graphs.limits, drafts=True), expected, strict=True):
        assert torch.allclose(found, right, atol=1e-5)
    assert len(graphs.made) > 1


def refuses(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    raise RuntimeError("operation not permitted\nwhen the stream is capturing")


def does_nothing(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    step()
    return lambda: None


def reads_another_token(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    def replay() -> None:
        step._tokens.fill_(59)
        step()

    return replay


def stores_nothing(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    def replay() -> None:
        before = [layer.clone() for layer in step._store.layers]
        step()
        for layer, of_layer in zip(step._store.layers, before, strict=True):
            layer.copy_(of_layer)

    return replay


def stands_still(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    def replay() -> None:
        step()
        step._slot.sub_(1)

    return replay


def goes_on_with_another_token(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    def replay() -> None:
        step()
        step._tokens.fill_(59)

    return replay


def forgets_its_choice(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    def replay() -> None:
        step()
        step.chosen.zero_()

    return replay


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (refuses, "RuntimeError: operation not permitted."),
        (does_nothing, "its logits are off by "),
        (reads_another_token, "its logits are off by "),
        (stores_nothing, "its keys and values are off by 1 "),
        (forgets_its_choice, "it does not go on"),
        (stands_still, "it does not go on"),
        (goes_on_with_another_token, "it does not go on"),
    ],
)
def test_without_a_sound_graph_tokens_come_as_before(record: Callable[..., Any], reason: str) -> None:
    """What the trial has written is taken back; several greedy tokens come at once as they do elsewhere."""
    model, config = random_model(CONFIG, positions=0.5), GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    expected, graphs = continued(model, [[1, 2, 3]], config)[0].ids, Graphs(record)
    with (
        calls_of(DecodePlan.greedy_tokens) as at_once,
        pytest.warns(GPT2Warning, match=f"no CUDA graph could be recorded .{reason}") as told,
    ):
        assert continued(model, [[1, 2, 3]], config, fast=graphs.limits)[0].ids == expected
    assert len(told) == 1 and len(graphs.made) <= 1 and sum(call.arguments["n"] for call in at_once) >= 15


def test_where_one_cannot_be_recorded_it_is_not_tried_again() -> None:
    config, graphs = GenerationConfig(max_new_tokens=9, stop_at_eot=False), Graphs(refuses)
    with pytest.warns(GPT2Warning) as told:
        for _ in range(2):
            continued(random_model(CONFIG), [[1, 2, 3]], config, fast=graphs.limits)
    assert len(told) == 1


def test_several_greedy_tokens_come_at_once() -> None:
    model, config = random_model(CONFIG), GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    expected = continued(model, [[1, 2, 3]], config)[0].ids
    assert sum(a != b for a, b in itertools.pairwise(expected)) > 5
    with calls_of(GraphedSteps.greedy_tokens) as at_once:
        fast = replace(Graphs(slots_at_once=24).limits, seconds_at_once=99)
        assert continued(model, [[1, 2, 3]], config, fast=fast)[0].ids == expected
    # After the prompt's and the one that the graph repeats; the last is what is left.
    assert [call.arguments["n"] for call in at_once] == [1, 16, 1]


def test_a_model_that_changes_on_the_way_is_refused() -> None:
    model, graphs = random_model(CONFIG), Graphs()
    steps = Decoder(model, [Window([1, 2, 3], 24)], 20, fast=graphs.limits)
    for token in (5, 6):
        steps.next_logits()
        steps.windows[0].ids.append(token)
    model.double()
    with pytest.raises(InputError, match=r"the cache is torch\.float32 on cpu and the model computes in torch\.float64"):
        steps.next_logits()
    assert graphs.made


def test_a_model_with_something_else_in_it_has_none() -> None:
    """A hook, for example, would be called while a step is recorded, and never again."""
    model = random_model(CONFIG)
    model.h[0].register_forward_hook(lambda module, args, out: out)
    graphs = Graphs()
    continued(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=9, stop_at_eot=False), fast=graphs.limits)
    assert not graphs.made


def test_a_step_makes_nothing_on_another_device() -> None:
    """Nothing here is on a GPU, but "meta" takes no part in what a CPU does either."""
    with torch.device("meta"), torch.inference_mode():
        model = GPT2(CONFIG).eval()
        cache = KVCache(CONFIG, batch_size=2, device="meta")
    for n_padding in (None, torch.zeros(2, 1, dtype=torch.int64, device="meta")):
        step = GraphedStep(model, cache, n_padding, 20)
        with torch.inference_mode():
            step()
        assert step.logits.device.type == "meta"


if torch.cuda.is_available():  # nothing to be skipped elsewhere

    def test_on_a_gpu() -> None:
        """Real graphs, without a warning."""
        model, config = random_model(CONFIG), GenerationConfig(max_new_tokens=40, stop_at_eot=False)
        for prompts in ([[1, 2, 3]], [[1, 2, 3], [4]]):
            expected = [row.ids for row in continued(model.cpu(), prompts, config)]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert [row.ids for row in continued(model.to("cuda"), prompts, config)] == expected


@pytest.mark.parametrize("position", [3, 9])
def test_nan_is_told(position: int) -> None:
    """In the step that a graph would be checked with, and in one that is replayed."""
    model = random_model(CONFIG)
    with torch.no_grad():
        model.wpe.weight[position] = float("nan")
    config, graphs = GenerationConfig(max_new_tokens=15, stop_at_eot=False), Graphs()
    with pytest.raises(CheckpointError, match="NaN"):
        continued(model, [[1, 2, 3]], config, fast=graphs.limits)
    assert len(graphs.made) == (position == 9) * 2  # the other one after 7 tokens
