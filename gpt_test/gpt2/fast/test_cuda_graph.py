"""Replayed steps give the results of steps that are computed one by one.

These tests need no GPU: `Recorded` takes the place of a CUDA graph, and replays operations as a graph replays kernels.
"""

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

# Operations that a graph cannot contain, because they copy a value from the device or to it.
_COPIES = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "index", "equal", "lift_fresh", "to", "_to_copy"}


class Recorded(TorchDispatchMode):
    """Records the operations of a step in their order.

    A replay computes each again, from the same tensors into the same tensors, without running the step's Python code.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        super().__init__()
        self.n_replays = 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        step()
        with self:
            step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.removeprefix("aten::") not in _COPIES, func
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def __call__(self) -> None:
        self.n_replays += 1
        for func, args, kwargs, out in self._calls:
            aliases = [value.alias_info for value in func._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view keeps its address
            again = func(*args, **kwargs)
            if all(alias is None for alias in aliases):
                for there, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(there, Tensor):
                        there.copy_(new)


class Graphs:
    """Limits with which steps are recorded on this device as early as possible. `made` has the recorded steps."""

    def __init__(self, record: Callable[..., Any] = Recorded, **limits: int) -> None:
        self.made: list[Any] = []

        def recorder(step: Callable[[], None], device: torch.device) -> Any:
            self.made.append(record(step, device))
            return self.made[-1]

        soon = {"steps_before": 1, "steps_left": 1, "slots_at_once": 7, **limits}
        self.limits = FastLimits(
            graphs=GraphLimits(recorder=recorder, **soon),
            costs_of_drafts=(0.1, 0.1),  # low costs, so that drafts are made often
        )


@pytest.fixture(autouse=True)
def _no_graph_fails() -> Iterator[None]:
    """Make the warning that no graph could be recorded an error, except in tests that expect it."""
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
    """With padding, past the context, with rows that end, in part of the vocabulary, with and without drafts."""
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
        ([3], 19, 7, 3),  # recorded at 4, 8 and 15 cached tokens
        ([3, 4, 5], 19, 7, 4),  # at 6, 8, 15 and 22
        ([3], 30, 7, 6),  # at 4, 8, 15 and 22; then the window slides, 12 tokens are prefilled again, and at 13 and 15
        ([3], 30, 23, 2),  # at 4, and after the window has slid at 13; at 24 the cache is full and no steps follow
    ],
)
def test_steps_are_replayed(lengths: list[int], n: int, slots_at_once: int, n_graphs: int) -> None:
    """Otherwise the test above would compare single steps with themselves."""
    config = GenerationConfig(max_new_tokens=n, stop_at_eot=False)
    graphs = Graphs(slots_at_once=slots_at_once)
    continued(random_model(CONFIG), [list(range(1, 1 + length)) for length in lengths], config, fast=graphs.limits)
    assert len(graphs.made) == n_graphs
    # Each step without a graph is repeated by the graph that it checks, except prefills and the step that fills 24 slots.
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
    assert max(whole.ids) >= 20  # otherwise `vocab_size=20` would change nothing
    assert continued(model, [[1, 2, 3]], config, vocab_size=20, fast=Graphs().limits)[0].ids == part.ids


def test_beam_search_has_no_graphs() -> None:
    """Its rows and its cache change after each step."""
    config = GenerationConfig(max_new_tokens=15, num_beams=3, stop_at_eot=False)
    model = random_model(CONFIG)
    [expected] = continued(model, [[1, 2, 3]], config)
    graphs = Graphs(steps_before=2)
    [found] = continued(model, [[1, 2, 3]], config, fast=graphs.limits)
    assert found.ids == expected.ids and not graphs.made


def test_nan_in_unused_slots_does_no_harm() -> None:
    """A masked slot has a weight of 0, but 0 times NaN is NaN. Memory that was not written to may contain NaN."""
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


def test_drafts_may_exceed_the_slots_of_a_graph() -> None:
    """The graph does not see what rejected drafts have stored, even if it is NaN."""
    model = random_model(CONFIG)
    with torch.no_grad():
        model.wpe.weight[10] = float("nan")

    def logits(fast: FastLimits, *, drafts: bool) -> Iterator[Tensor]:
        steps = Decoder(model, [Window([1, 2, 3], 24)], 20, only_largest=True, fast=fast)
        for token in (5, 6):
            yield steps.next_logits().clone()
            steps.windows[0].ids.append(token)
        if drafts:
            steps.next_logits([7, 8, 9])  # the last draft is at position 7, the first one outside the graph
            assert steps.reserve_greedy_steps() == 0
            steps.reject(3)
        else:
            steps.next_logits()
        steps.windows[0].ids.append(7)
        yield steps.next_logits([8, 9, 10, 11, 12] if drafts else ())[:1].clone()  # the draft at position 10 gives NaN
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


def keeps_the_slot(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    def replay() -> None:
        step()
        step._slot.sub_(1)

    return replay


def continues_with_another_token(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
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
        (does_nothing, "its logits differ by "),
        (reads_another_token, "its logits differ by "),
        (stores_nothing, "its keys and values differ by 1 "),
        (forgets_its_choice, "its next input is wrong"),
        (keeps_the_slot, "its next input is wrong"),
        (continues_with_another_token, "its next input is wrong"),
    ],
)
def test_a_wrong_graph_is_not_used(record: Callable[..., Any], reason: str) -> None:
    """The values that it wrote are restored, and several greedy tokens are computed in one call without it."""
    model, config = random_model(CONFIG, positions=0.5), GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    expected, graphs = continued(model, [[1, 2, 3]], config)[0].ids, Graphs(record)
    with (
        calls_of(DecodePlan.greedy_tokens) as at_once,
        pytest.warns(GPT2Warning, match=f"no CUDA graph could be recorded .{reason}") as caught,
    ):
        assert continued(model, [[1, 2, 3]], config, fast=graphs.limits)[0].ids == expected
    assert len(caught) == 1 and len(graphs.made) <= 1 and sum(call.arguments["n"] for call in at_once) >= 15


def test_after_a_failure_recording_is_not_tried_again() -> None:
    config, graphs = GenerationConfig(max_new_tokens=9, stop_at_eot=False), Graphs(refuses)
    with pytest.warns(GPT2Warning) as caught:
        for _ in range(2):
            continued(random_model(CONFIG), [[1, 2, 3]], config, fast=graphs.limits)
    assert len(caught) == 1


def test_several_greedy_tokens_are_computed_in_one_call() -> None:
    model, config = random_model(CONFIG), GenerationConfig(max_new_tokens=20, stop_at_eot=False)
    expected = continued(model, [[1, 2, 3]], config)[0].ids
    assert sum(a != b for a, b in itertools.pairwise(expected)) > 5
    with calls_of(GraphedSteps.greedy_tokens) as at_once:
        fast = replace(Graphs(slots_at_once=24).limits, seconds_at_once=99)
        assert continued(model, [[1, 2, 3]], config, fast=fast)[0].ids == expected
    # The prefill gives the first token, and the step that the graph repeats the second; the last call gives the rest.
    assert [call.arguments["n"] for call in at_once] == [1, 16, 1]


def test_a_model_that_changes_its_dtype_while_decoding_is_refused() -> None:
    model, graphs = random_model(CONFIG), Graphs()
    steps = Decoder(model, [Window([1, 2, 3], 24)], 20, fast=graphs.limits)
    for token in (5, 6):
        steps.next_logits()
        steps.windows[0].ids.append(token)
    model.double()
    with pytest.raises(InputError, match=r"the cache is torch\.float32 on cpu and the model computes in torch\.float64"):
        steps.next_logits()
    assert graphs.made


def test_a_changed_model_has_no_graphs() -> None:
    """A hook, for example, would be called while a step is recorded, but not when it is replayed."""
    model = random_model(CONFIG)
    model.h[0].register_forward_hook(lambda module, args, out: out)
    graphs = Graphs()
    continued(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=9, stop_at_eot=False), fast=graphs.limits)
    assert not graphs.made


def test_a_step_makes_no_tensor_on_another_device() -> None:
    """The device "meta" takes the place of a GPU: it refuses tensors of the CPU too."""
    with torch.device("meta"), torch.inference_mode():
        model = GPT2(CONFIG).eval()
        cache = KVCache(CONFIG, batch_size=2, device="meta")
    for n_padding in (None, torch.zeros(2, 1, dtype=torch.int64, device="meta")):
        step = GraphedStep(model, cache, n_padding, 20)
        with torch.inference_mode():
            step()
        assert step.logits.device.type == "meta"


if torch.cuda.is_available():  # not defined elsewhere, so that no test is reported as skipped

    def test_on_a_gpu() -> None:
        """CUDA graphs give the ids of the CPU, without a warning."""
        model, config = random_model(CONFIG), GenerationConfig(max_new_tokens=40, stop_at_eot=False)
        for prompts in ([[1, 2, 3]], [[1, 2, 3], [4]]):
            expected = [row.ids for row in continued(model.cpu(), prompts, config)]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert [row.ids for row in continued(model.to("cuda"), prompts, config)] == expected


@pytest.mark.parametrize("position", [3, 9])
def test_nan_is_reported(position: int) -> None:
    """In the step that a graph would be checked with, and in a replayed step."""
    model = random_model(CONFIG)
    with torch.no_grad():
        model.wpe.weight[position] = float("nan")
    config, graphs = GenerationConfig(max_new_tokens=15, stop_at_eot=False), Graphs()
    with pytest.raises(CheckpointError, match="NaN"):
        continued(model, [[1, 2, 3]], config, fast=graphs.limits)
    assert len(graphs.made) == (position == 9) * 2  # the second graph is recorded after 7 slots
