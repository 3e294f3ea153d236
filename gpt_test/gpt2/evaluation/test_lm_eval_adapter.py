"""lm-evaluation-harness computes the same metrics with this package as with its own `hf` model, offline.

Slow, because importing lm_eval takes half a minute. Needs `pip install '.[eval]' accelerate`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2 import GPT2, complete
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import TRAINING_TEXT

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]

CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{text[:60]}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n", STOP], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> Path:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install '.[eval]')")
    pytest.importorskip("accelerate", reason="accelerate is not installed, which lm_eval's own hf model needs")
    for name in ("HF_DATASETS_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = TRAINING_TEXT.split()
    queries = [" ".join(words[n : n + 1 + 3 * (n % 7)]) for n in range(0, 40, 3)]
    queries += ["", "The cat ", "é🦙 \n", " ".join(words * 3)]  # empty, ending in whitespace, longer than all positions
    choices = [
        {"query": q, "choices": [words[n], f"{words[n]} {words[n + 1]}", words[n + 2] * 3, "the"], "answer": n % 4}
        for n, q in enumerate(queries)
    ]
    texts = ["The cat went down to the water.", TRAINING_TEXT, " ".join(words[:17]), "a", f"The cat<|endoftext|>{words[3]}"]
    rolling = [{"text": text, "target": " the" if n else "x"} for n, text in enumerate(texts)]
    for name, rows in (("choices", choices), ("rolling", rolling)):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    stop = complete(small_model, small_tokenizer, texts[0][:60], max_new_tokens=12)[0].text[4:6]  # one that occurs
    for name, yaml in (("choices", CHOICES), ("rolling", ROLLING), ("generate", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(yaml.replace("FOLDER", str(tmp_path)).replace("STOP", json.dumps(stop)))
    return tmp_path


def evaluated(model: str, folder: Path, tasks: Path, batch_size: int) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import gpt2.evaluation.lm_eval_adapter  # noqa: F401 (registers the model)

    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=["local_choices", "local_rolling", "local_generate"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_metrics_and_every_answer_equal_those_of_the_hf_model(tasks: Path, small_folder: Path, batch_size: int) -> None:
    ours = evaluated("gpt2-from-scratch", small_folder, tasks, batch_size)
    theirs = evaluated("hf", small_folder, tasks, batch_size)
    for task, figures in theirs["results"].items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, abs=1e-4, rel=1e-4), (task, name)
    lengths: list[int] = []
    for task, samples in theirs["samples"].items():
        for mine, other in zip(ours["samples"][task], samples, strict=True):
            if task == "local_generate":
                assert mine["resps"] == other["resps"]
                lengths.append(len(mine["resps"][0][0]))
            elif task == "local_rolling":
                assert mine["resps"][0][0] == pytest.approx(other["resps"][0][0], abs=1e-3, rel=1e-5)
            else:
                for [my_answer], [other_answer] in zip(mine["resps"], other["resps"], strict=True):
                    assert float(my_answer[0]) == pytest.approx(float(other_answer[0]), abs=1e-4)
                    assert my_answer[1] == other_answer[1]
    assert min(lengths) <= 4 < max(lengths), "a stop string ended one text, and others continued"


def test_each_token_is_predicted_once_with_the_windows_of_lm_eval(
    tasks: Path, small_folder: Path, small_model: GPT2, small_tokenizer: GPT2Tokenizer
) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from gpt2.evaluation.windows import windows

    for n in (1, 39, 40, 41, 80, 99):
        ids = list(range(n))
        theirs = list(map(make_disjoint_window, get_rolling_token_windows(ids, -1, 40, 1)))
        mine = [(w.ids[: -w.n_scored], w.ids[-w.n_scored :]) for w in windows([-1, *ids], 40, 40)]
        assert mine == theirs and [token for _, part in mine for token in part] == ids


def test_the_command_line_of_lm_eval_knows_the_model(tasks: Path, small_folder: Path) -> None:
    command = [
        sys.executable, "-m", "gpt2.evaluation.lm_eval_adapter", "--model", "gpt2-from-scratch", "--model_args",
        f"pretrained={small_folder}", "--tasks", "local_choices", "--include_path", str(tasks), "--device", "cpu",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "local_choices" in result.stdout, result.stderr
    command[command.index(f"pretrained={small_folder}")] = f"pretrained={tasks / 'nowhere'}"
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: there is no folder")
