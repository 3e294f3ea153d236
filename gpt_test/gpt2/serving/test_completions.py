"""/v1/completions: texts equal those of `complete`, and log-probabilities those of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from gpt2 import complete
from gpt2.generation.draft_model import DraftModel
from gpt2.serving import engine
from gpt2.serving.models import Served
from gpt2.serving.prompt_pass import compute_beginning
from gpt2.serving.token_texts import CompletionArrays, TokenTexts
from gpt_config import GPT2Config
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model
from gpt_test.gpt2.serving.running import N_POSITIONS, Answer, Running, in_threads, running

PROMPTS = ["the cat", "Once upon a time there was a small", "x", "boats and fish by the sea, said the old dog"]


def expected(served: Served, prompts: Any, **options: Any) -> list[str]:
    return [found.text for found in complete(served.model, served.tokenizer, prompts, **options)]


def logprobs_of(served: Served, ids: Sequence[int]) -> torch.Tensor:
    """The natural logarithms (T, V) of the probabilities after each token."""
    with torch.inference_mode():
        return served.model(torch.tensor([list(ids)]))[0].double().log_softmax(-1)


def test_texts_are_those_of_complete(server: Running, served: Mapping[str, Served]) -> None:
    """Choice j of prompt p has index 2p + j, and the text of the same seed, prompt and number elsewhere."""
    answer = server.complete(prompt=PROMPTS, n=2, seed=5, max_tokens=12, temperature=0.9, top_k=20, model="small")
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.9, "top_k": 20, "seed": 5}
    texts = expected(served["small"], PROMPTS, num_return_sequences=2, **options)
    assert [choice["index"] for choice in answer["choices"]] == list(range(8))
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert len(set(texts)) == 8
    assert answer["object"] == "text_completion" and answer["model"] == "small"
    n_prompt = sum(len(served["small"].tokenizer.encode(prompt)) for prompt in PROMPTS)
    assert answer["usage"]["prompt_tokens"] == n_prompt
    assert answer["usage"]["total_tokens"] == n_prompt + answer["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"temperature": 0}, {}),
        ({"temperature": 0, "repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"temperature": 0, "frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"temperature": 0, "presence_penalty": 2}, {"presence_penalty": 2.0}),
        ({"temperature": 0, "logit_bias": {"65": 100}}, {"logit_bias": {65: 100.0}}),
        ({"temperature": 0, "stop": ["e", "zz"]}, {"stop": ("e", "zz")}),
        ({"seed": 3, "top_p": 0.5}, {"do_sample": True, "seed": 3, "top_p": 0.5}),
        ({"seed": 3, "min_p": 0.2}, {"do_sample": True, "seed": 3, "min_p": 0.2}),
        ({"seed": 3, "ignore_eos": True}, {"do_sample": True, "seed": 3, "stop_at_eot": False}),
        ({"seed": 3, "min_tokens": 9}, {"do_sample": True, "seed": 3, "min_new_tokens": 9}),
    ],
)  # fmt: skip
def test_each_option_has_its_effect(
    server: Running, served: Mapping[str, Served], fields: dict[str, Any], options: dict[str, Any]
) -> None:
    texts = expected(served["small"], ["the cat"], max_new_tokens=15, **options)
    assert server.texts(prompt="the cat", max_tokens=15, **fields) == texts


def test_prompts_may_be_ids(server: Running, served: Mapping[str, Served]) -> None:
    tokenizer = served["small"].tokenizer
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = server.texts(prompt=PROMPTS, temperature=0)
    assert server.texts(prompt=ids, temperature=0) == texts
    assert server.texts(prompt=ids[1], temperature=0) == [texts[1]]
    start = expected(served["small"], [[tokenizer.eot_token_id]], max_new_tokens=16)
    for nothing in (None, "", [[]], [""]):
        assert server.texts(prompt=nothing, temperature=0) == start
    assert server.texts(temperature=0) == start


def test_many_clients_at_once_get_the_texts_that_they_get_alone(server: Running, served: Mapping[str, Served]) -> None:
    """Seven clients on four slots, with long and short prompts, greedy and not."""
    long = " ".join(["the old dog and the small cat"] * 3)[:120]
    asked = [
        {"prompt": prompt + str(number), "max_tokens": 5 + 3 * number, "seed": number, "temperature": number % 3 / 2}
        for number, prompt in zip(range(7), itertools.cycle([long, *PROMPTS]), strict=False)
    ]
    found: dict[int, list[str]] = {}
    in_threads(lambda number: found.update({number: server.texts(**asked[number])}), range(len(asked)))
    for number, fields in enumerate(asked):
        options = {"seed": number, "temperature": fields["temperature"], "do_sample": fields["temperature"] > 0}
        alone = expected(served["small"], [fields["prompt"]], max_new_tokens=fields["max_tokens"], **options)
        assert found[number] == alone


def test_long_prompts_in_parts(served: Mapping[str, Served], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is computed in parts of 16 tokens, or 8 while rows run, and its text is the one without parts."""
    passes: list[int] = []

    def counted(*arguments: Any, part: Callable[[], int], **rest: Any) -> Any:
        number = len(passes)
        passes.append(0)

        def counted_part() -> int:
            passes[number] += 1
            return part()

        return compute_beginning(*arguments, part=counted_part, **rest)

    monkeypatch.setattr(engine, "compute_beginning", counted)
    small = served["small"]
    prompts = [[65 + number, *range(70, 120 + number)] for number in range(6)]
    with running({"small": small}, slots=3, part=8, part_alone=16) as server:
        found = server.texts(prompt=prompts, max_tokens=20, seed=1, n=2)
        again = server.texts(prompt=prompts[0], max_tokens=20, seed=1, n=2)
        server.wait_until_idle()
    options = {"max_new_tokens": 20, "seed": 1, "do_sample": True, "num_return_sequences": 2}
    assert found == expected(small, prompts, **options) and again == found[:2]
    assert passes[0] >= 3 and max(passes) > passes[0], "the first one alone, others beside running rows"


@pytest.mark.parametrize("model", ["drafting", "coarse"])
def test_other_models(server: Running, served: Mapping[str, Served], model: str) -> None:
    """With drafts, and in bfloat16, a client alone gets the text of `complete`, also for a long prompt."""
    one = served[model]
    for prompt in ("the cat and the cat and the cat and", [65] * 70):
        for fields, options in (({"temperature": 0}, {}), ({"seed": 1}, {"do_sample": True, "seed": 1})):
            found = server.texts(model=model, prompt=prompt, max_tokens=25, **fields)
            assert found == expected(one, [prompt], max_new_tokens=25, **options)


def test_a_draft_model(small_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It drafts for a text that runs alone, which stays the same."""
    n_drafts: list[int] = []
    propose = DraftModel.propose

    def counted(*arguments: Any) -> list[int]:
        drafts = propose(*arguments)
        n_drafts.append(len(drafts))
        return drafts

    monkeypatch.setattr(DraftModel, "propose", counted)
    config = GPT2Config(vocab_size=small_tokenizer.vocab_size, n_positions=N_POSITIONS, n_embd=24, n_layer=6, n_head=3)
    small = GPT2Config(vocab_size=small_tokenizer.vocab_size, n_positions=N_POSITIONS, n_embd=8, n_layer=1, n_head=1)
    one = Served("one", random_model(config), small_tokenizer, draft_model=random_model(small))
    with running({"one": one}, slots=2) as server:
        for fields, options in (({"temperature": 0}, {}), ({"seed": 1}, {"do_sample": True, "seed": 1})):
            assert server.texts(prompt="the cat", max_tokens=40, **fields) == expected(
                one, ["the cat"], max_new_tokens=40, **options
            )
            assert max(n_drafts) > 0
            n_drafts.clear()


def test_best_of_gives_the_most_probable_texts(server: Running, served: Mapping[str, Served]) -> None:
    options = {"max_new_tokens": 8, "do_sample": True, "seed": 1, "num_return_sequences": 6}
    found = complete(served["small"].model, served["small"].tokenizer, ["the cat"], **options)
    found.sort(key=lambda completion: sum(completion.logprobs) / len(completion.logprobs), reverse=True)
    answer = server.complete(prompt="the cat", max_tokens=8, seed=1, n=2, best_of=6)
    assert [choice["text"] for choice in answer["choices"]] == [completion.text for completion in found[:2]]
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
    assert answer["usage"]["completion_tokens"] == sum(len(completion.ids) for completion in found)


@pytest.mark.parametrize("n_top", [0, 1, 5, 20])
def test_log_probabilities_of_an_echo_as_lm_eval_reads_them(
    server: Running, served: Mapping[str, Served], n_top: int
) -> None:
    """Unequal prompts in any order, one generated token each, numbers of the model itself."""
    one = served["small"]
    prompts = [one.tokenizer.encode(prompt) for prompt in PROMPTS] + [[300 - 1] * (N_POSITIONS)]
    answer = server.complete(prompt=prompts, max_tokens=1, echo=True, logprobs=n_top, temperature=0)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        arrays, logprobs = choice["logprobs"], logprobs_of(one, prompt)
        new = int(logprobs[-1].argmax())
        ids = [*prompt, new]
        assert len(arrays["tokens"]) == len(arrays["token_logprobs"]) == len(arrays["top_logprobs"]) == len(ids)
        assert arrays["token_logprobs"][0] is None and arrays["top_logprobs"][0] is None
        wanted = [float(logprobs[place - 1, token]) for place, token in enumerate(ids) if place]
        assert arrays["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-5)
        texts = zip(arrays["tokens"], arrays["token_logprobs"], arrays["top_logprobs"], strict=True)
        for place, (text, number, top) in enumerate(texts):
            if place:
                assert top[text] == number
                assert (number == max(top.values())) == (n_top == 0 or int(logprobs[place - 1].argmax()) == ids[place])
                assert n_top <= len(top) <= n_top + 1


def test_the_end_token_is_in_the_arrays(server: Running, served: Mapping[str, Served]) -> None:
    one = served["small"]
    end = one.tokenizer.eot_token_id
    answer = server.complete(prompt="the cat", max_tokens=9, logit_bias={str(end): 100}, temperature=0, logprobs=2)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["tokens"] == ["<|endoftext|>"] and answer["usage"]["completion_tokens"] == 1
    own = float(logprobs_of(one, one.tokenizer.encode("the cat"))[-1, end])
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([own], abs=1e-5), "it is the model's own number"
    echoed = server.complete(
        prompt="the cat", max_tokens=1, logit_bias={str(end): 100}, temperature=0, logprobs=1, echo=True
    )
    assert echoed["choices"][0]["text"] == "the cat"
    assert echoed["choices"][0]["logprobs"]["tokens"][-1] == "<|endoftext|>"


def test_no_new_token(server: Running) -> None:
    answer = server.complete(prompt=["the cat", "a dog"], max_tokens=0, echo=True, logprobs=1)
    assert [choice["text"] for choice in answer["choices"]] == ["the cat", "a dog"]
    assert "".join(answer["choices"][0]["logprobs"]["tokens"]) == "the cat"
    assert answer["usage"]["completion_tokens"] == 0
    assert server.texts(prompt="the cat", max_tokens=0) == [""]


def test_echo_and_generation_go_together(server: Running, served: Mapping[str, Served]) -> None:
    """The tokens after the scored prompt are those without the scores."""
    fields = {"prompt": "the cat", "max_tokens": 10, "seed": 8, "n": 2}
    plain = server.texts(**fields)
    for more in ({"echo": True}, {"echo": True, "logprobs": 3}):
        assert server.texts(**fields, **more) == ["the cat" + text for text in plain]


def joined(answer: Answer, n: int) -> list[dict[str, Any]]:
    """The choices that the chunks of a stream add up to."""
    assert answer.status == 200 and answer.events[-1] == "[DONE]"
    choices: list[dict[str, Any]] = [{"text": "", "logprobs": None, "finish_reason": None} for _ in range(n)]
    for event in answer.events[:-1]:
        for chunk in event["choices"]:
            choice = choices[chunk["index"]]
            assert choice["finish_reason"] is None, "nothing comes after the end"
            choice["text"] += chunk["text"]
            choice["finish_reason"] = chunk["finish_reason"]
            if chunk["logprobs"] is not None:
                known = choice["logprobs"] or {name: [] for name in chunk["logprobs"]}
                choice["logprobs"] = {name: known[name] + chunk["logprobs"][name] for name in known}
    return choices


def is_same(found: Any, wanted: Any) -> bool:
    """Whether two parts of answers are equal, with logarithms of float32, whose rounding depends on the rows of a step."""
    if isinstance(found, float) and isinstance(wanted, float):
        return math.isclose(found, wanted, abs_tol=1e-5)
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(is_same(found[name], wanted[name]) for name in found)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(is_same, found, wanted))
    return bool(found == wanted)


@pytest.mark.parametrize("more", [{}, {"echo": True}, {"stop": ["e", "th", "xyz"]}, {"echo": True, "max_tokens": 0}])
def test_a_stream_adds_up_to_the_answer(server: Running, more: dict[str, Any]) -> None:
    """Also the arrays, with tokens whose text is held back for a stop string."""
    fields = {"prompt": ["the cat", "Once upon"], "n": 2, "seed": 4, "max_tokens": 20, "logprobs": 2, **more}
    whole = server.complete(**fields)
    streamed = server.ask("/v1/completions", {**fields, "stream": True, "stream_options": {"include_usage": True}})
    for choice, found in zip(whole["choices"], joined(streamed, 4), strict=True):
        assert is_same(found, {name: choice[name] for name in found}), (found, choice)
    *chunks, last, _ = streamed.events
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert streamed.headers["content-type"].startswith("text/event-stream")


def test_a_stream_comes_in_pieces(server: Running) -> None:
    streamed = server.ask("/v1/completions", {"prompt": "the cat", "stream": True, "model": "slow", "temperature": 0})
    assert len(streamed.events) > 8
    assert all(event["choices"][0]["logprobs"] is None for event in streamed.events[:-1])


def test_a_character_of_several_tokens_is_not_split(server: Running, served: Mapping[str, Served]) -> None:
    """Forced by a bias: the bytes of an emoji, one after another, each by a request of its own."""
    tokenizer = served["small"].tokenizer
    ids = tokenizer.encode("🦙")
    assert len(ids) == 4
    answer = server.complete(prompt=[tokenizer.encode("a") + ids], max_tokens=0, echo=True, logprobs=0)
    arrays = answer["choices"][0]["logprobs"]
    assert arrays["tokens"] == ["a", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\xa6", "bytes:\\x99"]
    assert arrays["text_offset"] == [0, 1, 1, 1, 1] and answer["choices"][0]["text"] == "a🦙"
    texts = {TokenTexts(tokenizer).of(token) for token in tokenizer.token_bytes}
    assert len(texts) == len(tokenizer.token_bytes), "no two tokens share a text"
    # A single token that is repeated is never whole: its bytes come as U+FFFD at the end, and no chunk has half of one.
    forced = {"prompt": "a", "max_tokens": 3, "logit_bias": {str(ids[0]): 100}, "temperature": 0, "ignore_eos": True}
    streamed = server.ask("/v1/completions", {**forced, "stream": True})
    assert (
        "".join(event["choices"][0]["text"] for event in streamed.events[:-1]) == server.texts(**forced)[0] == "\ufffd" * 3
    )


def test_infinity_is_clamped(small_tokenizer: GPT2Tokenizer) -> None:
    arrays = CompletionArrays(TokenTexts(small_tokenizer)).add([65], [-math.inf], [[(66, -math.inf)]])
    assert arrays["token_logprobs"] == [-9999.0] and set(arrays["top_logprobs"][0].values()) == {-9999.0}


def test_chat(server: Running, served: Mapping[str, Served]) -> None:
    one = served["chat"]
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    fields = {"model": "chat", "messages": messages, "max_completion_tokens": 12, "seed": 2, "n": 2}
    answer = server.ask("/v1/chat/completions", {**fields, "logprobs": True, "top_logprobs": 2}).json
    prompt = "system: be kind\nuser: the cat\nassistant:"
    texts = expected(one, [prompt], max_new_tokens=12, do_sample=True, seed=2, num_return_sequences=2)
    assert [choice["message"]["content"] for choice in answer["choices"]] == texts
    assert answer["object"] == "chat.completion" and answer["choices"][0]["message"]["role"] == "assistant"
    content = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode("utf-8", "replace").startswith(texts[0])
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    streamed = server.ask("/v1/chat/completions", {**fields, "stream": True}).events
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for number, text in enumerate(texts):
        mine = [event["choices"][0] for event in streamed[:-1] if event["choices"][0]["index"] == number]
        assert "".join(chunk["delta"].get("content", "") for chunk in mine) == text
        assert mine[-1]["finish_reason"] == answer["choices"][number]["finish_reason"]


def test_a_chat_may_fill_the_context(server: Running) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "cat"}], "temperature": 0, "ignore_eos": True}
    usage = server.ask("/v1/chat/completions", body).json["usage"]
    assert usage["total_tokens"] == N_POSITIONS + 1
