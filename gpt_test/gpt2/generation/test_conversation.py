"""Conversation: turns get the ids that the whole prompt gives, and only new tokens are computed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from gpt2 import GPT2, complete
from gpt2.fast.plan import DecodePlan
from gpt2.finetuning.template import InstructionTemplate
from gpt2.generation.chat_template import ChatTemplate
from gpt2.generation.conversation import Conversation
from gpt_config import ConfigError, GPT2Config, GPT2Warning, InputTypeError
from gpt_encoder import GPT2Tokenizer, train_bpe
from gpt_test.conftest import TRAINING_TEXT, random_model
from gpt_test.gpt2.fast.watching import calls_of


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return train_bpe([TRAINING_TEXT], vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: GPT2Tokenizer) -> GPT2:
    eot, shape = tokenizer.eot_token_id, {"n_positions": 256, "n_embd": 24, "n_layer": 2, "n_head": 3}
    return random_model(GPT2Config(vocab_size=tokenizer.vocab_size, eos_token_id=eot, bos_token_id=eot, **shape))


def said(conversation: Conversation, text: str, **options: object) -> str:
    return "".join(conversation.answer(text, **{"max_new_tokens": 8, **options}))


def ids_alone(model: GPT2, ids: list[int], n: int) -> list[int]:
    import torch

    return model.generate(torch.tensor([ids]), max_new_tokens=n, use_cache=False)[0, len(ids) :].tolist()


def test_plain_models_continue_one_text(model: GPT2, tokenizer: GPT2Tokenizer) -> None:
    conversation, ids = Conversation(model, tokenizer), []
    for text in ("Once upon", " a time", " the cat"):
        ids += tokenizer.encode(text)
        expected = ids_alone(model, ids, 8)
        answer = said(conversation, text)
        assert (
            conversation.turns[-1].ids == expected and answer == tokenizer.decode(expected) == conversation.turns[-1].answer
        )
        ids += expected


def test_only_new_tokens_are_computed(model: GPT2, tokenizer: GPT2Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    said(conversation, TRAINING_TEXT[:60], max_new_tokens=40)
    with calls_of(DecodePlan.hidden_states) as calls:
        said(conversation, " the cat", max_new_tokens=1)
    n_new = len(tokenizer.encode(" the cat")) + 1  # the last token of the answer was given, but not computed
    assert [call.arguments["input_ids"].shape for call in calls] == [(1, n_new)]


def test_instructions_have_the_form_of_the_training_data(model: GPT2, tokenizer: GPT2Tokenizer) -> None:
    template = InstructionTemplate(instruction="Q: {instruction}\n", response="A: ", system="{system}\n")
    conversation = Conversation(model, tokenizer, template, system="Be good.")
    said(conversation, "Where is the cat?")
    first = [*tokenizer.encode("Be good.\nQ: Where is the cat?\nA: "), *conversation.turns[0].ids, tokenizer.eot_token_id]
    ids = [*first, *tokenizer.encode("Be good.\nQ: And the dog?\nA: ")]
    assert tokenizer.eot_token_id not in conversation.turns[0].ids
    said(conversation, "And the dog?")
    assert conversation.turns[1].ids == ids_alone(model, ids, 8)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_chat_template_gives_the_ids_of_transformers(tmp_path: Path, tokenizer: GPT2Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    messages = [
        {"role": "system", "content": "Be good."},
        {"role": "user", "content": "Where is {{ the cat }}?"},
        {"role": "assistant", "content": " By the sea. "},
        {"role": "user", "content": "And the dog?"},
    ]
    tokenizer.save_pretrained(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for source in (CHATML, InstructionTemplate().to_jinja()):
        expected = peer.apply_chat_template(messages, chat_template=source, add_generation_prompt=True, tokenize=False)
        ids = ChatTemplate(source).ids(messages, tokenizer)
        assert ids == peer(expected, add_special_tokens=False)["input_ids"]


def test_special_tokens_in_a_message_are_ordinary_text(tokenizer: GPT2Tokenizer) -> None:
    [eot] = tokenizer.special_tokens
    template = ChatTemplate("{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}")
    named = GPT2Tokenizer.from_pretrained("gpt2")
    ids = template.ids([{"role": "user", "content": f"a{eot}b"}], named)
    assert named.decode(ids).startswith(f"a{eot}b") and named.eot_token_id not in ids[:-1]


def test_the_template_of_a_folder_is_found(tmp_path: Path, tokenizer: GPT2Tokenizer) -> None:
    message = [{"role": "user", "content": "cat"}]

    def text() -> str:
        template = ChatTemplate.load(tmp_path)
        assert template is not None
        return tokenizer.decode(template.ids(message, tokenizer))

    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]})
    )
    assert text() == "d"
    config.write_text(json.dumps({"chat_template": "c{{ messages[0]['content'] }}"}))
    assert text() == "ccat"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert text() == "j"


@pytest.mark.parametrize(
    "source", ["{% for", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[3]['a']['b'] }}", "{{ 'a' + 1 }}"]
)
def test_templates_that_fail_are_one_line(source: str, tokenizer: GPT2Tokenizer) -> None:
    with pytest.raises(ConfigError, match="the chat template"):
        ChatTemplate(source).ids([{"role": "user", "content": "a"}], tokenizer)


def test_a_template_cannot_reach_python(tokenizer: GPT2Tokenizer) -> None:
    with pytest.raises(ConfigError, match="cannot be applied"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").ids([{"role": "user", "content": "a"}], tokenizer)


@pytest.mark.parametrize("n_pieces", [0, 1, 3])
def test_a_closed_answer_stays_as_far_as_it_was_generated(n_pieces: int, model: GPT2, tokenizer: GPT2Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    pieces = conversation.answer("Once upon", max_new_tokens=50)
    read = [next(pieces) for _ in range(n_pieces)]
    pieces.close()
    assert len(conversation.turns) == (n_pieces > 0)
    if n_pieces:
        assert conversation.turns[0].answer.startswith("".join(read)) and 0 < len(conversation.turns[0].ids) < 50
    ids = [token for turn in conversation.turns for token in [*tokenizer.encode(turn.text), *turn.ids]]
    said(conversation, " a cat")
    assert conversation.turns[-1].ids == ids_alone(model, ids + tokenizer.encode(" a cat"), 8)


def test_a_stop_string_is_not_part_of_the_conversation(model: GPT2, tokenizer: GPT2Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    whole = said(conversation, "Once", max_new_tokens=20)
    conversation.reset()
    assert not conversation.turns and conversation.prefix_cache.n_bytes == 0
    stop = whole[4:6]
    assert said(conversation, "Once", max_new_tokens=20, stop=(stop,)) == whole[: whole.index(stop)]
    assert conversation.turns[0].ids == tokenizer.encode(whole[: whole.index(stop)])


def test_the_oldest_turns_are_dropped_when_the_context_is_full(model: GPT2, tokenizer: GPT2Tokenizer) -> None:
    conversation, n_said = Conversation(model, tokenizer), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GPT2Warning, match=r"fills the model's 256 positions: .* dropped"):
            while True:
                said(conversation, f" {TRAINING_TEXT[n_said : n_said + 20]}", max_new_tokens=16)
                n_said += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said(conversation, " the cat", max_new_tokens=16)
    kept = [tokenizer.encode(turn.text) + turn.ids for turn in conversation.turns]
    assert 1 < len(kept) < n_said and sum(map(len, kept)) <= 128 + 16
    prompt = [token for ids in kept for token in ids][:-16]
    assert conversation.turns[-1].ids == ids_alone(model, prompt, 16)
    assert conversation.prefix_cache.n_bytes <= conversation.prefix_cache.max_bytes


def test_sampling_repeats_with_a_seed(model: GPT2, tokenizer: GPT2Tokenizer) -> None:
    options = {"do_sample": True, "seed": 5, "max_new_tokens": 12}
    [alone] = complete(model, tokenizer, "Once upon", **options)
    assert said(Conversation(model, tokenizer), "Once upon", **options) == alone.text


def test_wrong_arguments_raise_in_the_call_and_change_nothing(model: GPT2, tokenizer: GPT2Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    with pytest.raises(InputTypeError, match="text must be a str"):
        conversation.answer(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature"):
        conversation.answer("a", temperature=-1)
    assert conversation.turns == []


def test_an_error_before_the_first_token_removes_the_turn(tokenizer: GPT2Tokenizer) -> None:
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=256, n_embd=24, n_layer=2, n_head=3)
    model = random_model(config)
    conversation, raised = Conversation(model, tokenizer), []

    def interrupt(*_: object) -> None:
        raised.append(True)
        raise KeyboardInterrupt

    hook = model.h[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        said(conversation, "Once")
    hook.remove()
    assert raised and conversation.turns == []
    assert said(conversation, "Once")


def test_the_token_that_ended_an_answer_is_not_part_of_it(model: GPT2, tokenizer: GPT2Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    said(conversation, "Once")
    ids = conversation.turns[0].ids
    end = next(token for n, token in enumerate(ids) if n and token not in ids[:n])  # the first that is new after the first
    conversation.reset()
    answer = said(conversation, "Once", eos_token_id=(end,))
    assert conversation.turns[0].ids == ids[: ids.index(end)] and answer == tokenizer.decode(conversation.turns[0].ids)
