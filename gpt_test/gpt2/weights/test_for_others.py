"""Each kind of folder that we write opens in transformers, with its pipelines, and computes the same there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2, complete
from gpt2.adapters.files import read_adapter, save_adapter
from gpt2.adapters.lora import add_lora
from gpt2.finetuning.classification import classify
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.finetuning.classifier_files import save_classifier
from gpt2.finetuning.template import TEMPLATES, InstructionTemplate
from gpt2.weights.folder import tokenizer_source
from gpt_config import GenerationConfig, GPT2Config, LoRAConfig
from gpt_config.shipped import shipped_models
from gpt_encoder import CharTokenizer, GPT2Tokenizer, Tokenizer, load_tokenizer
from gpt_test.conftest import TRAINING_TEXT, random_model

TEXTS = ["the cat sat", "the boat", "the old dog waited " * 30, "A fish, a fish!\n"]


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[verify]')")


@pytest.fixture
def characters() -> CharTokenizer:
    return CharTokenizer.from_texts([TRAINING_TEXT, *TEXTS, "\t\r\u2028é🦙"])


def language_model(tokenizer: Tokenizer, folder: Path) -> GPT2:
    eot = tokenizer.eot_token_id
    shape = {"vocab_size": tokenizer.vocab_size, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}
    model = random_model(GPT2Config(**shape, bos_token_id=eot, eos_token_id=eot))
    model.save_pretrained(folder, tokenizer=tokenizer)
    return model


def test_a_character_tokenizer_has_the_same_ids_in_transformers(
    transformers, characters: CharTokenizer, tmp_path: Path
) -> None:
    language_model(characters, tmp_path / "model")
    characters.save_pretrained(tmp_path / "alone")
    for folder in (tmp_path / "model", tmp_path / "alone"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert len(theirs) == characters.vocab_size and theirs.eos_token_id == characters.eot_token_id
        for text in (*TEXTS, "\r\n\t  é 🦙\u2028", ""):
            ids = characters.encode(text)
            assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
        assert theirs("a<|endoftext|>")["input_ids"] == characters.encode("a<|endoftext|>", allowed_special="all")
        with pytest.raises(Exception, match="UNK"):  # no id stands for a character that the vocabulary lacks
            theirs("Z")
        assert load_tokenizer(folder).encode(TEXTS[0]) == characters.encode(TEXTS[0])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == 40


def test_the_files_of_another_tokenizer_are_replaced(
    characters: CharTokenizer, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    characters.save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), GPT2Tokenizer)
    characters.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"char_vocab.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_a_language_model_generates_the_same_text(
    transformers, small_tokenizer: GPT2Tokenizer, characters: CharTokenizer, tmp_path: Path, kind: str
) -> None:
    tokenizer: Tokenizer = small_tokenizer if kind == "bytes" else characters
    model = language_model(tokenizer, tmp_path)
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert pipeline.tokenizer.model_max_length == 40
    for prompt in ("the cat", "A fish"):
        options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
        expected = pipeline(prompt, clean_up_tokenization_spaces=False, **options)[0]["generated_text"]
        assert complete(model, tokenizer, prompt, GenerationConfig(max_new_tokens=12))[0].text == expected


def test_generation_config_is_written_and_kept(transformers, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    language_model(small_tokenizer, tmp_path / "first")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "first")
    assert theirs.eos_token_id == theirs.bos_token_id == small_tokenizer.eot_token_id
    theirs.update(do_sample=True, temperature=0.6)
    theirs.save_pretrained(tmp_path / "first")
    GPT2.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = transformers.GenerationConfig.from_pretrained(tmp_path / "second")
    assert again.do_sample and again.temperature == 0.6 and again.eos_token_id == small_tokenizer.eot_token_id


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [(None, "abc"), ("multi_label_classification", "abc"), ("regression", "a")],
    ids=["single", "multi", "regression"],
)
def test_a_classifier_labels_batches_of_long_texts(
    transformers, small_tokenizer: GPT2Tokenizer, tmp_path: Path, problem_type: str | None, labels: str
) -> None:
    model = language_model(small_tokenizer, tmp_path / "base")
    classifier = GPT2Classifier(model, labels, problem_type=problem_type).eval()
    torch.nn.init.normal_(classifier.score.weight)
    save_classifier(classifier, tmp_path / "classifier", small_tokenizer)
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "classifier"), device="cpu")
    rows = [small_tokenizer.encode(text)[:40] for text in TEXTS]
    found = dict(classify(classifier, rows))
    for row, scores in enumerate(pipeline(TEXTS, top_k=None, truncation=True, batch_size=4)):
        expected = {score["label"]: score["score"] for score in scores}
        assert dict(zip(labels, found[row], strict=True)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", [*TEMPLATES, "odd"])
@pytest.mark.parametrize("thinks", [False, True])
def test_the_chat_template_writes_the_prompts_of_the_instruction_template(
    transformers, small_tokenizer: GPT2Tokenizer, tmp_path: Path, name: str, thinks: bool
) -> None:
    odd = InstructionTemplate(
        system="[é🦙 '{system}' \\n {{x}} {% y %}]\n", instruction="«{instruction}»\t", response="\tR:"
    )
    template = {**TEMPLATES, "odd": odd}[name]
    template = InstructionTemplate(**{**vars(template), "thinks": thinks})
    language_model(small_tokenizer, tmp_path)
    template.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]

    def rendered(messages: list[dict[str, str]], **options: bool) -> str:
        text: str = theirs.apply_chat_template(messages, tokenize=False, **options)
        return text

    assert rendered(messages, add_generation_prompt=True) == template.prompt("U", system="S")
    assert rendered(messages[1:], add_generation_prompt=True) == template.prompt("U")
    thought = "T" if thinks else ""
    answer = {"role": "assistant", "content": "A", "thought": thought}
    first = template.prompt("U", system="S") + template.answer("A", thought=thought) + "<|endoftext|>"
    assert rendered([*messages, answer]) == first
    turns = [*messages, answer, {"role": "user", "content": "V"}]
    assert rendered(turns, add_generation_prompt=True) == first + template.prompt("V")


def test_peft_finds_the_shipped_base_and_so_does_another_installation(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = GPT2.from_pretrained("gpt2-tiny")
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        model.h[0].attn.c_attn.lora_B.normal_()
    save_adapter(model, tmp_path / "adapter", base_model="gpt2-tiny")
    assert read_adapter(tmp_path / "adapter").config.base_model == str(shipped_models()["gpt2-tiny"].resolve())
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 3, 1000]])
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=1e-4)
    path = tmp_path / "adapter" / "adapter_config.json"
    elsewhere = {**json.loads(path.read_text()), "base_model_name_or_path": "/elsewhere/gpt2/assets/gpt2-tiny"}
    shutil.copytree(tmp_path / "adapter", tmp_path / "moved")
    (tmp_path / "moved" / "adapter_config.json").write_text(json.dumps(elsewhere))
    with torch.no_grad():
        torch.testing.assert_close(GPT2.from_pretrained(tmp_path / "moved")(ids), expected, atol=1e-4, rtol=1e-4)
    assert tokenizer_source(str(tmp_path / "moved")) == "gpt2-tiny"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "a list of templates"])
def test_the_chat_template_of_a_model_is_saved_with_it(transformers, small_folder: Path, tmp_path: Path, place: str) -> None:
    template = "{% for message in messages %}<{{ message.content }}>{% endfor %}\n"
    source, path = tmp_path / "source", tmp_path / "source" / "tokenizer_config.json"
    shutil.copytree(small_folder, source)
    if place == "chat_template.jinja":
        (source / place).write_text(template)
    else:
        several = [{"name": "rag", "template": "no"}, {"name": "default", "template": template}]
        value = template if place == "tokenizer_config.json" else several
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": value}))
    model = GPT2.from_pretrained(source)
    model.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "other", tokenizer=load_tokenizer(source))  # a tokenizer without its templates
    theirs, other = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("copy", "other"))
    messages = [{"role": "user", "content": "the cat"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "<the cat>" and other.chat_template is None


def test_a_new_model_keeps_the_tokenizer_that_is_in_its_folder(tmp_path: Path) -> None:
    """As in transformers, where the two are saved one after the other. It has as many rows as OpenAI's tokenizer."""
    tokenizer = CharTokenizer.from_texts(["abc"])
    tokenizer.save_pretrained(tmp_path)
    random_model(GPT2Config(n_positions=4, n_embd=2, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("cab") == tokenizer.encode("cab")
