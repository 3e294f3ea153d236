"""How the number of threads follows what steps cost: simulated machines without a clock, and torch's number around steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from threading import Event, Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.fast.threads import ThreadCount, adjusted_threads, step, thread_report
from gpt2.generation.batch import Batch
from gpt2.generation.loop import decode, start
from gpt_config import GenerationConfig, GPT2Config
from gpt_config.cores import ThreadLimit, fixed_threads, process_limit, use_thread_limit
from gpt_test.conftest import random_model

CPU = torch.device("cpu")


class Machine:
    """`cores` cores beside `busy` endless processes: what a step of one second on one core takes with some threads.

    If threads and busy processes together are more than the cores, one thread is always late: that step takes 10 times as
    long, but every fourth is lucky.
    """

    def __init__(self, cores: int, busy: int = 0) -> None:
        self.cores, self.busy, self.n_steps = cores, busy, 0

    def run(self, threads: ThreadCount, n_steps: int, kind: str = "decode") -> float:
        """Steps per second of a run of `n_steps`."""
        seconds = 0.0
        for _ in range(n_steps):
            self.n_steps += 1
            count = threads.of(kind)
            is_crowded = count + self.busy > self.cores and self.busy > 0
            took = self.best(count) * (10 if is_crowded and self.n_steps % 4 else 1)
            seconds += took
            threads.measured(kind, took, share=0.5 if is_crowded else 1.0)
        return n_steps / seconds

    def best(self, count: int) -> float:
        """Seconds of a step with `count` undisturbed threads."""
        return 0.05 * (0.1 + 0.9 / count)


def test_alone_all_cores_compute_every_step() -> None:
    threads = ThreadCount(8)
    machine = Machine(8)
    for _ in range(1000):
        assert threads.of("decode") == 8
        machine.run(threads, 1)


@pytest.mark.parametrize(("cores", "busy"), [(2, 1), (4, 1), (4, 2), (8, 3), (64, 1), (64, 32)])
@pytest.mark.parametrize("is_busy_first", [True, False])
def test_beside_busy_processes(cores: int, busy: int, is_busy_first: bool) -> None:
    """Most of the speed that the free cores allow, whether the others came before or after the first step."""
    threads, machine = ThreadCount(cores), Machine(cores)
    if not is_busy_first:
        machine.run(threads, 100)
    machine.busy = busy
    machine.run(threads, 20)
    reached = machine.run(threads, 2000)
    assert reached > 0.75 / machine.best(cores - busy)


def test_when_the_others_end_all_cores_compute_again() -> None:
    threads, machine = ThreadCount(8), Machine(8, busy=2)
    machine.run(threads, 300)
    assert threads.of("decode") < 8
    machine.busy = 0
    machine.run(threads, 1000)
    assert machine.run(threads, 100) > 0.97 / machine.best(8)


def test_one_slow_step_changes_little() -> None:
    """A step that the machine held up for once: a few steps later all cores compute again."""
    threads, machine = ThreadCount(2), Machine(2)
    machine.run(threads, 50)
    threads.measured("decode", 100 * machine.best(2))
    machine.run(threads, 10)
    assert threads.of("decode") == 2
    machine.run(threads, 100)
    assert threads.of("decode") == 2


def test_a_model_that_is_slow_by_itself_is_not_taken_for_a_busy_machine() -> None:
    """The first step takes longer because it warms up; and no trial begins, because the thread had its core."""
    threads, machine = ThreadCount(4), Machine(4)
    threads.measured("decode", 50 * machine.best(4))
    for _ in range(100):
        assert threads.of("decode") == 4
        machine.run(threads, 1)


def test_fewer_threads_that_are_no_faster_are_given_up() -> None:
    """Where steps are slow now and then and fewer threads do not help, trials become rare."""
    threads, n_trials = ThreadCount(4), 0
    for number in range(1000):
        is_trial = threads.of("decode") < 4
        n_trials += is_trial
        threads.measured("decode", 2.0 if is_trial else 1.0 if number % 3 == 0 else 0.05, share=0.5)
    assert 0 < n_trials < 30


@pytest.mark.parametrize("gain", [0.5, 0.9])
@pytest.mark.parametrize("seconds", [0.02, 0.5])
def test_alone_again_steps_that_vary_do_not_hold_threads_back(gain: float, seconds: float) -> None:
    """After a moment beside a busy process, less than 3% are lost, also where more threads gain little: they share the part
    `gain` of a step."""
    random = Random(0)
    threads, now, late, ideal = ThreadCount(8), 0.0, 0.0, 0.0
    while now < 300:
        count, is_busy = threads.of("decode"), 10 <= now < 14
        chance = random.lognormvariate(0, 0.15)
        is_late = is_busy and count == 8 and random.random() > 0.2
        took = seconds * chance * (1 - gain + gain / count) * (15 if is_late else 1)
        threads.measured("decode", took, share=0.5 if is_late else 1.0)
        now += took
        if not is_busy and now > 14:
            late, ideal = late + took, ideal + seconds * chance * (1 - gain + gain / 8)
    assert late < 1.03 * ideal


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1), (1.0, 2)])
def test_steps_that_lost_their_cores_are_slow_sooner(share: float, expected: int) -> None:
    threads = ThreadCount(2)
    for _ in range(10):
        threads.measured("decode", 0.02)
    for _ in range(2):
        threads.measured("decode", 0.032, share=share)
    assert threads.of("decode") == expected


def test_each_kind_has_its_own_number() -> None:
    """Beside a busy process both use one thread; alone again, training uses both cores, and decoding, which one core serves
    as fast, may stay with one."""
    threads = ThreadCount(2)

    def run(n_steps: int, *, is_busy: bool) -> None:
        for number in range(n_steps):
            for kind, with_one in (("decode", 0.02), ("train", 0.4)):
                is_slow = is_busy and threads.of(kind) == 2 and number % 4
                seconds = 1.0 if is_slow else with_one if kind == "decode" or threads.of(kind) == 1 else with_one / 2
                threads.measured(kind, seconds, share=0.5 if is_slow else 1.0)

    run(5, is_busy=False)
    run(40, is_busy=True)
    assert (threads.of("decode"), threads.of("train")) == (1, 1)
    run(60, is_busy=False)
    assert threads.of("train") == 2


def test_kinds_are_compared_with_themselves() -> None:
    """A step of another kind that takes longer, as training beside decoding, is no reason for a trial."""
    threads = ThreadCount(4)
    for _ in range(50):
        threads.measured("decode", 0.01)
        threads.measured("train", 1.0)
        threads.measured("prefill", 0.5, work=500)
        assert threads.of("prefill") == 4
    threads.measured("prefill", 1.0, work=1000)
    assert threads.of("prefill") == 4
    threads.measured("prefill", 2.0, work=500)
    threads.measured("decode", 0.01)
    threads.measured("prefill", 2.0, work=500)
    assert (threads.of("prefill"), threads.of("decode"), threads.of("other")) == (2, 4, 4)
    threads.measured("other", 1.0)  # it says nothing about the trial
    threads.measured("prefill", 9.0, work=500)
    assert threads.of("prefill") == 4


@given(
    most=st.integers(1, 128),
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(1e-6, 1e3), st.floats(0.5, 1e4), st.booleans()), max_size=200
    ),
)
@settings(max_examples=100)
def test_the_count_stays_in_its_limits(most: int, steps: list[tuple[str, float, float, bool]]) -> None:
    threads = ThreadCount(most)
    for kind, seconds, work, is_crowded in steps:
        threads.measured(kind, seconds, work, share=0.5 if is_crowded else 1.0)
        assert 1 <= threads.of(kind) <= most


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_torch_has_its_number_again_after_a_step() -> None:
    with torch_threads(2):
        with pytest.raises(KeyError), step("test", CPU):
            raise KeyError
        assert torch.get_num_threads() == 2
        with fixed_threads(1):
            with step("test", CPU):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 2
            with step("test", torch.device("meta")):
                assert torch.get_num_threads() == 2


def test_a_fixed_number_may_be_more_than_torch_has() -> None:
    with torch_threads(1), fixed_threads(3):
        with adjusted_threads(CPU):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1


def test_the_reader_of_a_batch_computes_with_its_own_number(small_config: GPT2Config) -> None:
    model = random_model(small_config)
    rows = start(model, [[1, 2, 3]], GenerationConfig(max_new_tokens=5, do_sample=True, seed=0))
    seen: list[int] = []
    with torch_threads(2), fixed_threads(1):
        batch = Batch(model, on_step=lambda _: seen.append(torch.get_num_threads()))
        for _ in decode(batch, rows):
            assert torch.get_num_threads() == 2
    assert set(seen) == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ids_do_not_depend_on_the_number(dtype: torch.dtype) -> None:
    model = random_model(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=500, n_positions=128)).to(dtype)
    prompt = torch.arange(60).view(2, 30)
    results = []
    for count in (1, 2, 3):
        with fixed_threads(count):
            results.append(model.generate(prompt, max_new_tokens=40, do_sample=True, seed=1, temperature=1.5))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_report() -> None:
    with fixed_threads(3, "--threads 3"):
        assert thread_report() == "3 threads (--threads 3)"
    with torch_threads(1):
        report = thread_report()
    assert report == f"1 thread ({process_limit().reason if process_limit().count == 1 else 'torch is set to 1'})"


class Clock:
    """Seconds that pass only when a test says so, because those of a busy machine are not the same twice."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What steps are measured by: each had a core for all of its time."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(time, "thread_time", clock)
    return clock


def test_slow_steps_are_noticed(clock: Clock) -> None:
    """Steps that take as long as those of a busy machine: fewer threads are used, and the report says why."""
    used = []
    with torch_threads(6), use_thread_limit(ThreadLimit(6, "six", False)), adjusted_threads(CPU):
        for number in range(14):
            with step("sleep", CPU):
                used.append(torch.get_num_threads())
                clock.now += 0.2 if number >= 5 and used[-1] > 3 else 0.01
    assert used[:7] == [6] * 6 + [3] and used[-3:] == [3, 3, 3]
    with torch_threads(6), use_thread_limit(ThreadLimit(6, "six", False)):
        assert thread_report() == "3 threads (of 6, because other processes use the cores)"


def test_a_step_of_steps_is_not_measured_twice(clock: Clock) -> None:
    with torch_threads(5), use_thread_limit(ThreadLimit(5, "five", False)):
        for number in range(10):
            with step("outer", CPU):
                with step("inner", CPU):
                    clock.now += 0.01
                if number == 9:
                    clock.now += 0.2
        with adjusted_threads(CPU):
            assert torch.get_num_threads() == 5


def test_a_step_counts_for_the_number_that_it_ran_with(clock: Clock) -> None:
    """One Python thread begins a trial while a step of another runs: that step says nothing about the trial."""
    begun, may_end = Event(), Event()

    def long_step() -> None:
        with torch_threads(7), step("shared", CPU):
            begun.set()
            may_end.wait(60)

    with torch_threads(7), use_thread_limit(ThreadLimit(7, "seven", False)):
        other = Thread(target=long_step)
        other.start()
        assert begun.wait(60)
        used = []
        for number in range(8):
            with step("shared", CPU):
                used.append(torch.get_num_threads())
                clock.now += 1 if number == 6 else 0.01  # the seventh begins a trial
                if number == 7:
                    may_end.set()
                    other.join()
        assert used == [7] * 7 + [3]
        with step("shared", CPU):
            clock.now += 0.01
            assert torch.get_num_threads() == 3
