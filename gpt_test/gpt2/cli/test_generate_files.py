"""`gpt2 generate --file`: lines and JSONL, options of a line, and runs into `--out` that go on after an interruption."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2.cli.output_file import OutputFile
from gpt2.cli.prompts import unescape
from gpt_config import GPT2Config, InputError
from gpt_config.folder_lock import locked
from gpt_encoder import CharTokenizer
from gpt_test.conftest import random_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def model_options(small_folder: Path) -> list[str]:
    return ["--from_pretrained", str(small_folder), "--max_tokens", "6"]


def jsonl(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p", "-"])
def test_a_json_line_has_a_prompt_options_and_other_fields(run_command, model_options, tmp_path: Path, name: str) -> None:
    items = [
        {"id": 7, "prompt": "The cat\nand the dog", "max_tokens": 2, "completion": "mine"},
        {"text": "The dog", "do_sample": True, "temperature": 1.5, "seed": 3, "stop": None, "num_samples": 2},
    ]
    path = jsonl(tmp_path / "p.jsonl", items)
    if name == "p":
        path = path.rename(tmp_path / "p")
    source = ["-"] if name == "-" else [str(path)]
    stdin = path.read_bytes() if name == "-" else b""
    result = run_command("generate", "--file", *source, *model_options, "--json", stdin=stdin)
    first, *others = map(json.loads, result.out.splitlines())
    assert first["prompt"] == "The cat\nand the dog" and first["id"] == 7 and first["input_completion"] == "mine"
    assert len(first["ids"]) == 2 and first["completion"] != "mine"
    options = ["--do_sample", "--temperature", "1.5", "--seed", "3", "--num_samples", "2", "--json"]
    alone = run_command("generate", "The dog", *model_options, *options).out.splitlines()
    assert [item["ids"] for item in others] == [json.loads(line)["ids"] for line in alone]
    assert [item["seed"] for item in others] == [3, 3]


def test_text_files_are_lines_and_field_names_the_prompt(run_command, model_options, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.txt", [{"prompt": "The cat", "question": "The dog"}])
    assert '{"prompt"' in run_command("generate", "--file", path, *model_options).out
    assert run_command("generate", "--file", path, "--field", "question", *model_options).out.startswith("The dog")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: it is not JSON"),
        ("[1]", "line 2: it is list, not an object"),
        ('{"question": "x"}', "line 2: there is no field 'prompt' or 'text': name it with --field"),
        ('{"prompt": 5}', "line 2: the field 'prompt' is int, not a string"),
        ('{"prompt": "x", "temperature": -1}', "line 2: --temperature=-1 must be 0 (greedy) or a positive number"),
        ('{"prompt": "x", "temperature": "hot"}', "line 2: --temperature='hot' must be"),
        ('{"prompt": "x", "max_new_tokens": 1.5}', "line 2: --max_tokens=1.5 must be a whole number"),
        ('{"prompt": "x", "stop": 5}', "line 2: stop=5 must be a string or a list of strings"),
        ('{"prompt": "x", "do_sample": "no"}', "line 2: do_sample='no' must be true or false"),
        (
            '{"prompt": "x", "num_beams": 2, "early_stopping": 5}',
            "line 2: early_stopping='5' must be one of false, true, never",
        ),
        ('{"prompt": "x", "eos_token_id": "5"}', "line 2: eos_token_id='5' must be a number or a list of numbers"),
        ('{"prompt": "x", "seed": [1]}', "line 2: seed=[1] must be a single value"),
        ('{"prompt": "x", "max_tokens": 2, "max_new_tokens": 3}', "line 2: max_new_tokens is another name of max_tokens"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_computed(
    run_command, model_options, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "The cat"}\n' + line + "\n")
    result = run_command("generate", "--file", tmp_path / "p.jsonl", *model_options, "--out", tmp_path / "out")
    assert result.status == 1 and result.out == "" and message in result.err and len(result.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_cannot_be_encoded_is_named_by_its_line(run_command, tmp_path: Path) -> None:
    tokenizer = CharTokenizer.from_texts("helo")
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    random_model(config).save_pretrained(tmp_path, tokenizer=tokenizer)
    for content, message in (("hello\nHello\n", "line 2: the character 'H'"), ("hello\n\n", "line 2: the prompt is empty")):
        (tmp_path / "p").write_text(content)
        result = run_command("generate", "--file", tmp_path / "p", "--from_pretrained", tmp_path)
        assert result.status == 1 and result.out == "" and message in result.err


def test_special_tokens_escapes_and_line_ends(run_command, model_options, small_tokenizer) -> None:
    def ids(*args: str, stdin: bytes = b"") -> list[int]:
        return json.loads(run_command("generate", *args, *model_options, "--json", stdin=stdin).out)["prompt_ids"]

    assert ids("a<|endoftext|>", "--special_tokens") == [*small_tokenizer.encode("a"), small_tokenizer.eot_token_id]
    assert small_tokenizer.eot_token_id not in ids("a<|endoftext|>")
    assert ids("-", stdin=b"a\nb\r\n") == ids("-", stdin=b"a\nb") == ids(r"a\nb", "--escape") != ids(r"a\nb")
    assert unescape(r"a\tb\\n\x") == "a\tb\\n\\x"
    hint = run_command("generate", "a", *model_options, "--stop", r"\n").err
    assert "add --escape" in hint and len(hint.splitlines()) == 1
    assert run_command("generate", "a", *model_options, "--stop", r"\n", "--escape").err == ""


def many_prompts(path: Path, n: int) -> Path:
    rng = random.Random(0)
    items = [
        {"prompt": f"{n} " + " ".join(rng.choices(["the", "cat", "dog"], k=rng.randint(0, 12))), "id": n}
        | ({"max_tokens": rng.randint(0, 20)} if n % 3 else {})
        for n in range(n)
    ]
    return jsonl(path, items)


@pytest.mark.parametrize("options", [["--json"], ["--json", "--num_samples", "2"], []])
def test_a_run_cut_anywhere_goes_on_to_the_same_bytes(run_command, model_options, tmp_path: Path, options) -> None:
    """The batch is small, so that the file has several parts."""
    path, out = many_prompts(tmp_path / "p.jsonl", 24), tmp_path / "out"
    command = ["generate", "--file", path, *model_options, "--do_sample", "--batch_size", 1, *options, "--out", out]
    result = run_command(*command)
    assert (result.status, result.out, result.err) == (0, "", "")
    whole, progress = out.read_bytes(), Path(f"{out}.progress").read_bytes()
    if options:
        items = list(map(json.loads, whole.splitlines()))
        assert [item["id"] for item in items][:: len(items) // 24] == list(range(24)) and "timings" not in items[0]
    sizes = progress.split(b"\n", 1)[1]
    for cut, cut_progress in ((0, 0), (len(whole) // 3, 0), (len(whole) // 2, 7), (len(whole), 1), (len(whole) - 1, 0)):
        out.write_bytes(whole[:cut])
        Path(f"{out}.progress").write_bytes(progress[: len(progress) - cut_progress * len(sizes) // 20])
        result = run_command(*command)
        assert (result.status, result.err, out.read_bytes()) == (0, "", whole)
        assert Path(f"{out}.progress").read_bytes() == progress
    assert "is complete" in run_command(*command).err and out.read_bytes() == whole


def test_another_command_does_not_go_on(run_command, model_options, small_config, small_tokenizer, tmp_path: Path) -> None:
    path, out, other = many_prompts(tmp_path / "p.jsonl", 3), tmp_path / "out", tmp_path / "model"
    command = ["generate", "--file", path, *model_options, "--do_sample", "--out", out]
    assert run_command(*command).status == 0
    before = out.read_bytes()
    random_model(small_config, seed=1).save_pretrained(other, tokenizer=small_tokenizer)
    for more, message in (
        (["--temperature", "0.5"], "was begun with temperature 1.0, and this command has 0.5"),
        (["--batch_size", "4"], "batch_size 8"),
        (["--json"], "json False"),
        (["--from_pretrained", other], "was begun with other model"),
    ):
        result = run_command(*command, *more)
        assert result.status == 1 and message in result.err and len(result.err.splitlines()) == 1
    many_prompts(path, 4)
    assert "was begun with other prompts" in run_command(*command).err
    Path(f"{out}.progress").unlink()
    assert "choose another --out" in run_command(*command).err
    assert out.read_bytes() == before


def test_options_of_a_line_have_their_kinds(run_command, model_options, tmp_path: Path) -> None:
    options = {"early_stopping": True, "num_beams": 2, "eos_token_id": 5, "logit_bias": {"7": -100}, "ignore_eot": False}
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "The cat", **options}])
    result = run_command("generate", "--file", path, *model_options, "--json")
    given = ["--early_stopping", "true", "--num_beams", "2", "--eos_token_id", "5", "--logit_bias", "7=-100"]
    alone = run_command("generate", "The cat", *model_options, *given, "--json")
    assert (result.status, result.err) == (0, "") and json.loads(result.out)["ids"] == json.loads(alone.out)["ids"]


def test_a_file_that_another_process_writes_is_refused(run_command, model_options, tmp_path: Path) -> None:
    path, out = many_prompts(tmp_path / "p.jsonl", 3), tmp_path / "out"
    command = ["generate", "--file", path, *model_options, "--out", out]
    out.touch()
    with locked(out):
        result = run_command(*command)
    assert (result.status, out.read_bytes()) == (1, b"") and "another process is writing" in result.err
    assert run_command(*command).status == 0


@pytest.mark.parametrize("content", [b"x\n", b'{"a": 1}\n-5\n', b'{"a": 1}\n9\n5\n', b'{"a": 1}\nx\n', b"[]\n"])
def test_a_damaged_progress_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out.progress").write_bytes(content)
    with pytest.raises(InputError, match="is damaged: delete it"):
        OutputFile(tmp_path / "out")


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_name_without_a_file_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not the name of a file: name a file to write"):
        OutputFile(name)


def start(*args: object, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "generate.py", *map(str, args)], **options)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_thousand_prompts_killed_at_ten_moments_give_the_same_bytes(small_folder: Path, tmp_path: Path) -> None:
    path = many_prompts(tmp_path / "p.jsonl", 1000)
    options = ["--file", path, "--from_pretrained", small_folder, "--max_tokens", 60, "--do_sample", "--seed", 1, "--json"]
    began = time.monotonic()
    assert start(*options, "--out", tmp_path / "whole").wait() == 0
    seconds, rng, n_killed = time.monotonic() - began, random.Random(5), 0
    while n_killed < 10:
        process = start(*options, "--out", tmp_path / "cut")
        try:
            process.wait(rng.uniform(0.2, 1.0) * seconds / 2)
        except subprocess.TimeoutExpired:
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            assert process.wait() < 0
            n_killed += 1
            continue
        (tmp_path / "cut").unlink()  # it ended before ten were killed: begin again
        (tmp_path / "cut.progress").unlink()
    assert start(*options, "--out", tmp_path / "cut").wait() == 0
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupted_run_without_out_has_printed_what_was_finished(small_folder: Path, tmp_path: Path) -> None:
    options = ["--from_pretrained", small_folder, "--batch_size", 2, "--max_tokens", 2000]
    items = [{"prompt": f"{n}", "max_tokens": 3} for n in range(6)] + [{"prompt": "x", "max_tokens": 10**6, "ignored": 1}]
    path = jsonl(tmp_path / "p.jsonl", items)
    process = start("--file", path, *options, "--no_echo", "--json", stdout=subprocess.PIPE)
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline())["prompt"] for _ in range(6)]
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert lines == [str(n) for n in range(6)]
