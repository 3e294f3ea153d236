"""Stock clients: OpenAI's package, and lm-eval's `local-completions` beside our own adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from gpt2 import complete
from gpt2.cli.serve import template_of
from gpt2.pretrained import load_model
from gpt2.serving.models import Served
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_test.gpt2.serving.running import DAMAGED, Running, running


@pytest.fixture
def client(server: Running) -> Any:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with openai.OpenAI(base_url=f"{server.server.address}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.mark.slow
def test_openai(client: Any, served: Mapping[str, Served]) -> None:
    import openai

    one = served["small"]
    [wanted] = complete(one.model, one.tokenizer, "the cat", max_new_tokens=20, do_sample=True, seed=3)
    fields = {"model": "small", "prompt": "the cat", "max_tokens": 20, "seed": 3}
    answer = client.completions.create(**fields, logprobs=2, extra_body={"top_k": 0})
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == wanted.text
    assert chunks[-1].usage == answer.usage
    messages = [{"role": "user", "content": "the cat"}]
    chat = client.chat.completions.create(model="chat", messages=messages, max_tokens=9, temperature=0, logprobs=True)
    said = client.chat.completions.create(model="chat", messages=messages, max_tokens=9, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == chat.choices[0].message.content
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
    assert "small" in [model.id for model in client.models.list()] and client.models.retrieve("small").id == "small"
    assert len(client.embeddings.create(model="small", input=["a", "the cat"]).data[1].embedding) == 24
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="small", prompt="a", suffix="b")
    assert (error.value.param, error.value.code) == ("suffix", "unsupported")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nothing", prompt="a")
    with pytest.raises(openai.APIError, match="NaN"):
        list(client.completions.create(model="damaged", prompt=[65] * DAMAGED, stream=True))


ITEMS = [
    ("Once upon a time there was a", " small cat who lived by the sea."),
    ("Once upon a time there was a", " big bear."),
    ("", "The old dog said hello."),
    ("The cat said:", " \"Where do they go?\""),
    ("A very long story. " * 20, "The end."),
    ("Lily liked emoji such as", " 🦙 and ü."),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 2, "num_concurrent": 4}], ids=str)
def test_lm_eval_scores_as_our_adapter(options: dict[str, Any]) -> None:
    """Over the shipped model, with its tokenizer read from the server; texts that are generated are equal, too."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    api = pytest.importorskip("lm_eval.models.openai_completions", reason="lm_eval[api] is not installed")
    from lm_eval.api.instance import Instance

    from gpt2.evaluation.lm_eval_adapter import FromScratchLM

    model = load_model("gpt2-tiny", device="cpu", dtype="float32")
    served = Served("gpt2-tiny", model, load_tokenizer_for(model), template_of(model))

    def requests(kind: str, arguments: list[Any]) -> list[Any]:
        made = [Instance(request_type=kind, doc={}, arguments=given, idx=n) for n, given in enumerate(arguments)]
        return made

    scored = requests("loglikelihood", ITEMS)
    until = requests("generate_until", [(context, {"until": ["."], "max_gen_toks": 20}) for context, _ in ITEMS[:4]])
    rolling = requests("loglikelihood_rolling", [("Once upon a time there was a small cat.",)])
    with running({"gpt2-tiny": served}) as server:
        url = f"{server.server.address}/v1/completions"
        theirs = api.LocalCompletionsAPI(base_url=url, model="gpt2-tiny", max_length=1 + model.config.n_positions, **options)
        assert type(theirs.tokenizer).__name__ == "RemoteTokenizer"
        found = theirs.loglikelihood(scored), theirs.generate_until(until), theirs.loglikelihood_rolling(rolling)
    ours = FromScratchLM("gpt2-tiny")
    wanted = ours.loglikelihood(scored), ours.generate_until(until), ours.loglikelihood_rolling(rolling)
    assert [score for score, _ in found[0]] == pytest.approx([score for score, _ in wanted[0]], abs=1e-5)
    assert [is_greedy for _, is_greedy in found[0]] == [is_greedy for _, is_greedy in wanted[0]]
    assert found[1] == wanted[1]
    assert found[2] == pytest.approx(wanted[2], abs=1e-5)
