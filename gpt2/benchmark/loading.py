"""Section load: the time from starting a process to the first token, with the files in the page cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

from gpt2.benchmark.bench import Bench
from gpt2.benchmark.engines import generating_engines, prepare_engine
from gpt2.benchmark.measure import Contender, take_turns
from gpt2.benchmark.results import Entrant, Quantity, Row, timed_rows
from gpt2.benchmark.settings import OURS
from gpt2.benchmark.subject import prompt_rows

_SETTING = "start a process, load, first token"

# The shortest program of each peer. Ours is the command `gpt2 generate`, which also parses options and tokenizes; the
# program of transformers tokenizes too, and the other two receive ids or token strings. Arguments: path of the model, dtype,
# threads, prompt as text, as ids, as token strings, device.
_PROGRAMS = {
    "transformers": """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error()
path, dtype, threads, prompt, ids, strings, device = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
given = tokenizer(prompt, return_tensors="pt").to(device)
made = model.generate(**given, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, given["input_ids"].shape[1]:]
tokenizer.decode(made)
print(json.dumps({"ids": made.tolist()}))
""",
    "ctranslate2": """
import json, sys
import ctranslate2
path, dtype, threads, prompt, ids, strings, device = sys.argv[1:]
generator = ctranslate2.Generator(path, compute_type=dtype, inter_threads=1, intra_threads=int(threads))
made = generator.generate_batch([json.loads(strings)], max_length=1, include_prompt_in_result=False, end_token=[])
print(json.dumps({"ids": made[0].sequences_ids[0]}))
""",
    "llama-cpp-python": """
import json, sys
from llama_cpp import Llama
path, dtype, threads, prompt, ids, strings, device = sys.argv[1:]
llama = Llama(path, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
print(json.dumps({"ids": [int(next(llama.generate(json.loads(ids), temp=0.0)))]}))
""",
}


def loading(bench: Bench) -> None:
    """Start a process for each engine and dtype once per round; each generates one token."""
    bench.say("load: comparing the first token")
    entrants, runs = [], []
    expected: list[int] | None = None
    for dtype in bench.settings.dtypes:
        for name in generating_engines(bench.settings.peers):
            try:
                run = _start(bench, name, dtype)
                found = json.loads(run())["ids"]
            except Exception as error:  # an error in another library must not stop the benchmark
                bench.results.leave_out("load", name, dtype, error)
                continue
            expected = found if expected is None else expected
            entrant = _judge(name, dtype, found, expected)
            if entrant.agrees is False:
                bench.results.rows.append(Row("load", _SETTING, None, entrant, "s", None))
            else:
                entrants.append(entrant)
                runs.append(run)
    bench.say(f"load: {bench.settings.rounds} rounds")
    times = take_turns([Contender(run) for run in runs], bench.settings.rounds, warm_ups=0)
    bench.results.rows += timed_rows(Quantity("load", _SETTING, None, "s"), entrants, times)


def _judge(name: str, dtype: str, found: list[int], expected: list[int]) -> Entrant:
    """Compare the first token with `expected`, that of the first engine, which is ours."""
    if dtype != "float32" or found == expected:
        return Entrant(name, dtype, True if dtype == "float32" else None)
    return Entrant(name, dtype, False, f"its first token is {found}, not {expected}: not timed")


def _start(bench: Bench, name: str, dtype: str) -> Callable[[], str]:
    path = prepare_engine(name, bench.subject, dtype)
    threads, device = bench.settings.threads, bench.settings.device
    [ids] = prompt_rows(bench.subject, bench.texts.prompts, [bench.settings.prompt_tokens])
    prompt = bench.subject.tokenizer.decode(ids)
    if name == OURS:
        options = ["--from_pretrained", str(path), "--dtype", dtype, "--device", device, "--max_tokens", "1", "--json"]
        return partial(bench.parts.run_python, ["-m", "gpt2", "generate", *options, "--", prompt], threads)
    strings = json.dumps(_names(bench, name, ids))
    return partial(
        bench.parts.run_python,
        ["-c", _PROGRAMS[name], str(path), dtype, str(threads), prompt, json.dumps(ids), strings, device],
        threads,
    )


def _names(bench: Bench, name: str, ids: list[int]) -> list[str]:
    if name != "ctranslate2":
        return []
    names = bench.subject.token_strings
    return [names[token] for token in ids]
