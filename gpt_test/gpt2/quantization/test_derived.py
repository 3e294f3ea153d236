"""Derived values are made once, again when the weights change, and are kept only while the layer exists."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import torch
from torch import nn

from gpt2.quantization.derived import Derived, state_of, state_with_contents
from gpt2.quantization.layers import Int8Linear


def test_it_is_made_once_for_each_state() -> None:
    derived: Derived[int] = Derived()
    layer, made = nn.Linear(2, 3), iter(range(9))
    assert layer not in derived and derived.state(layer) is None
    values = [derived.of(layer, state_of(layer.weight), lambda: next(made)) for _ in range(3)]
    assert values == [0, 0, 0] and layer in derived and derived.state(layer) == state_of(layer.weight)
    with torch.no_grad():
        layer.weight.add_(1)
    assert derived.of(layer, state_of(layer.weight), lambda: next(made)) == 1
    derived.forget(layer)
    assert layer not in derived and derived.of(layer, state_of(layer.weight), lambda: next(made)) == 2


def test_after_an_error_no_value_is_kept() -> None:
    derived: Derived[float] = Derived()
    layer = nn.Linear(2, 3)
    for _ in range(2):
        try:
            derived.of(layer, 1, lambda: 1 / 0)
        except ZeroDivisionError:
            assert layer not in derived


def test_it_does_not_keep_the_layer() -> None:
    derived: Derived[int] = Derived()
    layer = nn.Linear(2, 3)
    derived.of(layer, 0, lambda: 1)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_which_changes_the_two_states_detect() -> None:
    weight = torch.randn(4, 6)
    shallow, deep = state_of(weight), state_with_contents(weight)
    weight.data[1, 2] += 1  # this does not change the tensor's version
    assert state_of(weight) == shallow and state_with_contents(weight) != deep
    weight += 1
    assert state_of(weight) != shallow
    with torch.inference_mode():
        weight = torch.ones(2)  # an inference tensor has no version
        assert state_of(weight, None) == state_of(weight)


def test_copies_and_pickles_of_a_packed_layer_are_plain_layers() -> None:
    layer = Int8Linear(torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.ones(8) / 100, torch.zeros(8))
    x = torch.randn(3, 16)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other.is_packed and torch.equal(other(x), y)
        assert other.state_dict().keys() == {"weight_int8", "scale", "bias"}
