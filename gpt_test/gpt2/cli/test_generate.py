"""`gpt2 generate`: its output, its errors and its exit statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2 import GPT2, complete
from gpt2.fast.threads import thread_report
from gpt_encoder import CharTokenizer, load_tokenizer
from gpt_test.conftest import random_model
from gpt_test.gpt_config.test_locate import cache_repository

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def model_options(small_folder: Path) -> list[str]:
    return ["--from_pretrained", str(small_folder), "--max_tokens", "12"]


def expected_text(folder: Path | str, prompt: str, **options) -> str:
    return complete(GPT2.from_pretrained(folder), load_tokenizer(folder), prompt, max_new_tokens=12, **options)[0].text


def test_it_prints_the_prompt_and_its_continuation(run_command, model_options, small_folder: Path) -> None:
    result = run_command("generate", "The cat", *model_options)
    assert (result.status, result.err) == (0, "")
    assert result.out == "The cat" + expected_text(small_folder, "The cat") + "\n"


@pytest.mark.parametrize("options", [["--no_stream"], ["--no-stream"], ["--stream"]])
def test_streamed_or_not_the_text_is_the_same(run_command, model_options, options) -> None:
    assert (
        run_command("generate", "The cat", *model_options, *options).out
        == run_command("generate", "The cat", *model_options).out
    )


def test_no_echo_prints_only_the_continuation(run_command, model_options, small_folder: Path) -> None:
    assert (
        run_command("generate", "The cat", *model_options, "--no_echo").out == expected_text(small_folder, "The cat") + "\n"
    )


def test_sampling_options_reach_the_sampler_in_both_spellings(run_command, model_options, small_folder: Path) -> None:
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 4}
    expected = "The cat" + expected_text(small_folder, "The cat", do_sample=True, **options) + "\n"
    underscores = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    hyphens = [part.replace("_", "-") for part in underscores]
    for spelled in ([*underscores, "--do_sample"], [*hyphens, "--do-sample"]):
        result = run_command("generate", "The cat", *model_options, *spelled)
        assert (result.out, result.err) == (expected, "")


def test_stdin_is_the_prompt_without_its_last_line_end(run_command, model_options) -> None:
    expected = run_command("generate", "The cät", *model_options).out
    assert run_command("generate", "-", *model_options, stdin="The cät\n".encode()).out == expected
    assert run_command("generate", "-", *model_options, stdin="The cät".encode()).out == expected


def test_a_file_has_a_prompt_per_line(run_command, model_options, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"The cat\r\n\nThe dog\n")
    texts = [run_command("generate", prompt, *model_options).out for prompt in ("The cat", "", "The dog")]
    for size in ("1", "2", "8"):
        result = run_command("generate", "--file", path, *model_options, "--batch_size", size)
        assert result.out == "".join(texts)
        assert result.err.count("== prompt") == 3


def test_samples_come_in_order(run_command, model_options) -> None:
    options = ["--do_sample", "--seed", "1", "--num_samples", "3"]
    objects = [
        json.loads(line) for line in run_command("generate", "A", *model_options, *options, "--json").out.splitlines()
    ]
    text = run_command("generate", "A", *model_options, *options)
    assert text.out == "".join(f"A{item['completion']}\n" for item in objects)
    assert [item["sample"] for item in objects] == [0, 1, 2]


def test_json_has_all_fields(run_command, model_options, small_folder: Path) -> None:
    result = run_command("generate", "The cat", *model_options, "--json", "--do_sample", "--seed", "7")
    (line,) = result.out.splitlines()
    item = json.loads(line)
    tokenizer = load_tokenizer(small_folder)
    assert item["prompt"] == "The cat" and item["prompt_ids"] == tokenizer.encode("The cat")
    assert item["seed"] == 7 and item["model"] == str(small_folder) and item["finish_reason"] in ("length", "eot")
    assert len(item["ids"]) == len(item["logprobs"]) and all(logprob <= 0 for logprob in item["logprobs"])
    assert item["completion"] == expected_text(small_folder, "The cat", do_sample=True, seed=7)
    assert set(item["timings"]) == {"first_token_seconds", "seconds", "tokens_per_second"}


def test_stop_and_beams(run_command, model_options, small_folder: Path) -> None:
    text = expected_text(small_folder, "The cat")
    result = run_command("generate", "The cat", *model_options, "--stop", text[4:7], "--json")
    item = json.loads(result.out)
    assert item["finish_reason"] == "stop" and item["completion"] == text[: text.find(text[4:7])]
    beams = run_command("generate", "The cat", *model_options, "--num_beams", "3", "--num_samples", "2", "--json")
    assert len(beams.out.splitlines()) == 2 and beams.err == ""


def test_no_new_tokens(run_command, small_folder: Path) -> None:
    assert run_command("generate", "The cat", "--from_pretrained", small_folder, "--max_tokens", 0).out == "The cat\n"


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (["--temperature", "0.7"], "--temperature has no effect without --do_sample"),
        (["--top_k", "5", "--top_p", "0.5"], "--top_k, --top_p have no effect without --do_sample"),
        (["--seed", "5"], "--seed has no effect"),
        (["--num_samples", "2"], "--num_samples 2 gives the same text each time"),
        (["--temperature", "0"], None),
        (["--temperature", "0.7", "--do_sample"], None),
        (["--repetition_penalty", "1.2"], None),
        (["--typical_p", "0.5"], "--typical_p has no effect without --do_sample"),
        (
            ["--length_penalty", "2", "--early_stopping", "never"],
            "--length_penalty, --early_stopping have no effect without",
        ),
        (["--penalty_window", "5"], "--penalty_window has no effect without a penalty"),
        (["--penalty_window", "5", "--presence_penalty", "1"], None),
        (["--top_logprobs", "2"], "--top_logprobs has no effect without --json"),
    ],
)
def test_an_option_without_effect_is_reported_in_one_line(run_command, model_options, options, warning) -> None:
    result = run_command("generate", "The cat", *model_options, *options)
    lines = [line for line in result.err.splitlines() if not line.startswith("==")]
    assert result.status == 0
    assert len(lines) == (warning is not None)
    if warning:
        assert lines[0].startswith("warning: ") and warning in lines[0]


def test_a_long_prompt_is_reported_in_one_line(run_command, model_options) -> None:
    result = run_command("generate", "the cat " * 60, *model_options)
    assert result.status == 0
    (line,) = result.err.splitlines()
    assert line.startswith("warning: a prompt has ") and "the model sees 40" in line


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["x", "--temperature", "nan"], 2, "--temperature=nan must be 0 (greedy) or a positive number"),
        (["x", "--temperature", "hot"], 2, "'hot' is not a valid float"),
        (["x", "--top_k", "-1"], 2, "--top_k=-1 must be a whole number of 0 or more (0 is no limit)"),
        (["x", "--top_p", "1.5"], 2, "--top_p=1.5"),
        (["x", "--min_tokens", "200"], 2, "--min_tokens=200 is more than max_new_tokens=100: lower one (max_new_tokens is"),
        (["x", "--ignore_eot", "--eos_token_id", "5"], 2, "choose one (stop_at_eot is --ignore_eot)"),
        (["x", "--logit_bias", "5:1"], 2, "--logit_bias='5:1' must be ID=BIAS, such as 50256=-5"),
        (["x", "--logit_bias", "300=1"], 1, "token id 300 is outside the vocabulary"),
        (["x", "--bad_words", ""], 2, "--bad_words='' must be a text of at least one character"),
        (["x", "--early_stopping", "maybe"], 2, "'maybe' is not one of 'false', 'true', 'never'"),
        (["x", "--max_tokens", "-1"], 2, "--max_tokens=-1"),
        (["x", "--num_samples", "0"], 2, "--num_samples=0"),
        (["x", "--num_beams", "2", "--do_sample"], 2, "choose one"),
        (["x", "--num_beams", "2", "--num_samples", "3"], 2, "is more than num_beams=2"),
        (["x", "--seed", "-1"], 2, "--seed=-1"),
        (["x", "--stop", "\udcff"], 1, "--stop is not UTF-8 text"),
        (["x", "--from_pretrained", ""], 1, "the name of the model is empty"),
        (["x", "--stop", ""], 2, "stop='' must be a string of at least one character"),
        (["x", "--batch_size", "0"], 2, "0 is not in the range x>=1"),
        (["x", "--device", "gpu"], 1, "device 'gpu' is unknown: this machine has cpu"),
        (["x", "--dtype", "int3"], 1, "dtype 'int3' is unknown: use one of float32"),
        (["x", "--from_pretrained", "no/such/place"], 1, "there is no folder 'no/such/place'"),
        (["x", "--from_pretrained", "gpt2"], 1, "the hub cannot be reached: connect to the network"),
        (["x", "--model_name", "no/such/place"], 1, "there is no folder"),
        ([], 2, "give either a PROMPT (or - for standard input), --file FILE or --instruction TEXT"),
        (["x", "--file", "y"], 2, "give either a PROMPT"),
        (["x", "y"], 2, "unexpected extra argument"),
        (["x", "--wat"], 2, "--wat"),
        (["--file", "no such file"], 1, "No such file or directory: no such file"),
        (["--file", "/"], 1, "Is a directory: /"),
        (["x\udcff"], 1, "the prompt is not UTF-8 text (byte 1 is 0xff)"),
    ],
)
def test_a_mistake_is_one_line(run_command, small_folder: Path, args, status: int, message: str) -> None:
    default = [] if "--from_pretrained" in args else ["--from_pretrained", small_folder]
    result = run_command("generate", *args, *default)
    assert result.status == status
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and message in line


def test_input_that_is_not_text(run_command, model_options, tmp_path: Path) -> None:
    path = tmp_path / "binary"
    for content, message in ((b"ab\xff\n", "byte 2 is 0xff"), (b"", "is empty")):
        path.write_bytes(content)
        result = run_command("generate", "--file", path, *model_options)
        assert result.status == 1 and message in result.err and len(result.err.splitlines()) == 1
    result = run_command("generate", "-", *model_options, stdin=b"\xff")
    assert result.status == 1 and "standard input is not UTF-8 text" in result.err


def test_a_byte_order_mark_is_not_part_of_the_prompt(run_command, model_options, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_bytes("\ufeffThe cat\n".encode())
    expected = run_command("generate", "The cat", *model_options).out
    assert run_command("generate", "--file", tmp_path / "prompts", *model_options).out == expected


def test_each_long_prompt_of_a_file_is_reported(run_command, model_options, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("the cat " * 60 + "\n" + "the cat " * 60 + "\n")
    assert run_command("generate", "--file", tmp_path / "prompts", *model_options).err.count("warning: ") == 2


def test_an_error_comes_without_the_warnings_before_it(run_command, small_folder: Path) -> None:
    result = run_command("generate", "x", "--from_pretrained", small_folder, "--device", "foo", "--top_k", 5)
    assert result.status == 1 and len(result.err.splitlines()) == 1


def test_damaged_weights_leave_nothing_on_stdout(run_command, small_config, small_tokenizer, tmp_path: Path) -> None:
    import torch

    model = random_model(small_config)
    with torch.no_grad():
        model.ln_f.bias[0] = torch.nan
    model.save_pretrained(tmp_path, tokenizer=small_tokenizer)
    result = run_command("generate", "The cat", "--from_pretrained", tmp_path)
    assert (result.status, result.out) == (1, "") and "NaN" in result.err


def test_a_broken_config_is_not_a_usage_error(run_command, small_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(small_folder, tmp_path / "model")
    (folder / "config.json").write_text("{")
    assert run_command("generate", "x", "--from_pretrained", folder).status == 1


def test_a_folder_without_weights_or_tokenizer(run_command, small_folder, small_model, tmp_path: Path) -> None:
    result = run_command("generate", "x", "--from_pretrained", tmp_path)
    assert result.status == 1 and "has no config.json" in result.err
    small_model.save_pretrained(tmp_path)
    result = run_command("generate", "x", "--from_pretrained", tmp_path)
    assert result.status == 1 and "has no tokenizer files: name a tokenizer, such as gpt2 (--model_name gpt2)" in result.err
    result = run_command("generate", "x", "--from_pretrained", tmp_path, "--model_name", "gpt2")
    assert result.status == 1 and "the tokenizer has 50257 ids and the model 300" in result.err
    options = ["--from_pretrained", tmp_path, "--model_name", small_folder, "--max_tokens", 3]
    assert run_command("generate", "x", *options).status == 0


def test_a_character_model_generates_too(run_command, tmp_path: Path) -> None:
    from gpt_config import GPT2Config

    tokenizer = CharTokenizer.from_texts("hello world")
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    random_model(config).save_pretrained(tmp_path, tokenizer=tokenizer)
    assert run_command("generate", "hello", "--from_pretrained", tmp_path, "--max_tokens", 30).status == 0
    result = run_command("generate", "Hi", "--from_pretrained", tmp_path)
    assert result.status == 1 and "'H' (U+0048) is not among the 8" in result.err


def test_without_a_name_it_is_gpt2_from_the_cache(run_command, small_folder: Path) -> None:
    import huggingface_hub.constants

    result = run_command("generate", "The cat")
    assert "gpt2" in result.err  # nothing is cached yet: an error, or a warning that names the shipped model
    cache_repository(huggingface_hub.constants.HF_HUB_CACHE, "gpt2", small_folder)
    result = run_command("generate", "The cat", "--max_tokens", 12)
    assert (result.status, result.err) == (0, "")
    assert result.out == "The cat" + expected_text(small_folder, "The cat") + "\n"


def test_without_gpt2_it_is_the_shipped_model(run_command) -> None:
    result = run_command("generate", "The cat", "--max_tokens", 12)
    assert result.out == "The cat" + expected_text("gpt2-tiny", "The cat") + "\n"
    (line,) = result.err.splitlines()
    assert "gpt2 is not in the cache and cannot be downloaded: this is gpt2-tiny" in line
    named = run_command("generate", "The cat", "--from_pretrained", "gpt2")
    assert named.status == 1 and "the hub cannot be reached" in named.err
    assert run_command("generate", "The cat", "--from_pretrained", "gpt2-tiny", "--max_tokens", 12).out == result.out


def command(*args: object) -> list[str]:
    return [sys.executable, str(ROOT / "generate.py"), *map(str, args)]


def test_generate_py_is_the_same_command(run_command, model_options, tmp_path: Path) -> None:
    """Run from another folder. Only text is on stdout."""
    result = subprocess.run(command("The cat", *model_options), capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == run_command("generate", "The cat", *model_options).out


def test_generation_never_imports_transformers(model_options) -> None:
    code = (
        "import sys\nfrom gpt2.cli import main\ntry: main()\nexcept SystemExit as e: assert e.code == 0\n"
        "assert 'torch' in sys.modules and not {'transformers', 'tiktoken', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "generate", "x", *model_options], check=True, cwd=ROOT, capture_output=True)


def test_help_needs_no_torch_and_is_fast() -> None:
    before = os.times()
    result = subprocess.run(command("--help"), capture_output=True, text=True)
    after = os.times()
    assert result.returncode == 0 and "--repetition_penalty" in result.stdout
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 1.0  # of a core: 0.2 measured; importing torch takes 1.5


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and pipes")
def test_a_closed_pipe_ends_quietly(model_options) -> None:
    options = [*model_options[:2], "--max_tokens", "5000"]
    process = subprocess.Popen(command("x", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=300) == 1
    process.stderr.close()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and pipes")
def test_ctrl_c_ends_quietly(model_options) -> None:
    options = [*model_options[:2], "--max_tokens", "100000"]
    process = subprocess.Popen(command("x", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (-signal.SIGINT, b"")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and pipes")
@pytest.mark.parametrize("seconds", [0.15, 0.4, 0.7])
def test_ctrl_c_while_torch_is_imported_ends_quietly(model_options, seconds: float) -> None:
    options = [*model_options[:2], "--max_tokens", "1000000"]
    # Without coverage, which catches KeyboardInterrupt while it starts, and continues.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    process = subprocess.Popen(command("x", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (-signal.SIGINT, b"")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell to close streams")
@pytest.mark.parametrize(("redirection", "status"), [("--help >&-", 0), ("- <&-", 1)])
def test_closed_standard_streams_are_no_traceback(redirection: str, status: int, model_options) -> None:
    line = f"{sys.executable} {ROOT / 'generate.py'} {' '.join(model_options)} {redirection}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert result.returncode == status and "Traceback" not in result.stderr and len(result.stderr.splitlines()) <= 1


def test_more_prompts_than_a_batch_holds_come_in_order(run_command, model_options, tmp_path: Path) -> None:
    prompts = [f"The cat {'and the dog ' * (7 * n % 5)}{n}" for n in range(9)]
    (tmp_path / "prompts").write_text("\n".join(prompts))
    arguments = ["generate", "--file", tmp_path / "prompts", *model_options, "--batch_size", "2"]
    result = run_command(*arguments)
    expected = [run_command("generate", prompt, *model_options).out for prompt in prompts]
    assert result.out == "".join(expected)
    assert result.err.splitlines() == [f"== prompt {n} of 9, sample 1 ==" for n in range(1, 10)]
    lines = run_command(*arguments, "--json").out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == prompts


@pytest.mark.parametrize(
    ("dtype", "words"), [("auto", "in "), ("int8", "in int8 weights, float32"), ("bf16", "in bfloat16")]
)
def test_verbose_reports_dtype_device_and_steps(run_command, model_options, dtype: str, words: str) -> None:
    result = run_command("generate", "The cat", *model_options, "--dtype", dtype, "--verbose", "--device", "cpu")
    assert result.status == 0 and result.out.startswith("The cat")
    line, steps = result.err.splitlines()
    assert steps.startswith("steps: prefill 1, ")
    assert line.startswith("computing " + words) and f" on cpu, {thread_report()}" in line
