"""The plain Python engine against PyTorch in float64: each function, the whole model, generation, files and the command."""

from __future__ import annotations

import ast
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.generation import sampling
from gpt2.reference import python_gpt2 as py
from gpt2.reference import python_layers
from gpt_config import CheckpointError, ConfigError, GenerationConfig, GPT2Config, InputError
from gpt_test.conftest import random_model

ROOT = Path(__file__).resolve().parents[3]
EXACT = {"rtol": 0, "atol": 1e-12}
TINY = GPT2Config(vocab_size=13, n_positions=7, n_embd=6, n_layer=2, n_head=3, n_inner=10, eos_token_id=None, bos_token_id=2)


def matrices(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_tensor(rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def twin(model: GPT2) -> py.Model:
    """The plain Python model with the same weights. Only linear layers are stored as columns."""
    parameters = {}
    for name, parameter in model.named_parameters():
        is_linear = parameter.dim() == 2 and name not in ("wte.weight", "wpe.weight")
        parameters[name] = (parameter.t() if is_linear else parameter).double().tolist()
    return py.Model(model.config, parameters)


@st.composite
def configs(draw: st.DrawFn) -> GPT2Config:
    n_head = draw(st.integers(1, 4))
    return GPT2Config(
        vocab_size=draw(st.integers(2, 30)),
        n_positions=draw(st.integers(1, 9)),
        n_embd=n_head * draw(st.integers(1, 5)),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_inner=draw(st.none() | st.integers(1, 20)),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu_new", "gelu", "relu"])),
        scale_attn_weights=draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=draw(st.booleans()),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
    )


sizes = st.integers(1, 9)


@given(sizes, sizes, sizes, st.integers(0, 99))
def test_matrices(n: int, k: int, m: int, seed: int) -> None:
    a, b, c = matrices(n, k, seed), matrices(k, m, seed + 1), matrices(n, k, seed + 2)
    torch.testing.assert_close(as_tensor(python_layers.matmul(a.tolist(), b.tolist())), a @ b, **EXACT)
    assert python_layers.transpose(a.tolist()) == a.t().tolist()
    assert python_layers.add(a.tolist(), c.tolist()) == (a + c).tolist()
    assert math.isclose(python_layers.dot(a[0].tolist(), c[0].tolist()), float(a[0] @ c[0]), abs_tol=1e-12)


@given(sizes, sizes, sizes, st.integers(0, 99))
def test_functions_of_a_layer(T: int, n_in: int, n_out: int, seed: int) -> None:
    x, W, bias = matrices(T, n_in, seed), matrices(n_in, n_out, seed + 1), matrices(1, n_out, seed + 2)[0]
    out = python_layers.linear(x.tolist(), W.t().tolist(), bias.tolist())
    torch.testing.assert_close(as_tensor(out), x @ W + bias, **EXACT)
    weight, shift = matrices(2, n_in, seed + 3)
    normed = python_layers.layer_norm(x[0].tolist(), weight.tolist(), shift.tolist(), 1e-3)
    torch.testing.assert_close(as_tensor(normed), F.layer_norm(x[0], (n_in,), weight, shift, 1e-3), **EXACT)
    torch.testing.assert_close(as_tensor(python_layers.softmax((9 * x[0]).tolist())), (9 * x[0]).softmax(-1), **EXACT)
    for ours, theirs in (
        (python_layers.gelu, F.gelu(x[0], approximate="tanh")),
        (python_layers.exact_gelu, F.gelu(x[0])),
        (python_layers.relu, x[0].relu()),
    ):
        torch.testing.assert_close(as_tensor([ours(value) for value in x[0].tolist()]), theirs, **EXACT)


def test_softmax_of_huge_numbers() -> None:
    assert python_layers.softmax([1e308, 1e308, -1e308]) == [0.5, 0.5, 0.0]
    assert python_layers.masked_softmax([3.0, 3.0, 700.0], 2) == [0.5, 0.5, 0.0]


@given(sizes, st.integers(0, 5), sizes, st.integers(0, 99))
def test_attention_head(T: int, past: int, D: int, seed: int) -> None:
    """The queries belong to the last T of S tokens. The sizes include T = 1, T = S and T = D."""
    q, k, v = matrices(T, D, seed), matrices(past + T, D, seed + 1), matrices(past + T, D, seed + 2)
    visible = torch.ones(T, past + T, dtype=torch.bool).tril(past)
    theirs = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, scale=0.3)[0]
    torch.testing.assert_close(as_tensor(py.attention_head(q.tolist(), k.tolist(), v.tolist(), 0.3)), theirs, **EXACT)


def test_attention_mlp_and_block_equal_those_of_the_model() -> None:
    model = random_model(TINY, dtype=torch.float64)
    x, parameters = matrices(5, 6, 0), twin(model).layer(1)
    with torch.no_grad():
        theirs = model.h[1].attn(x[None], None, None)[0], model.h[1].mlp(x[None])[0], model.h[1](x[None], None, None)[0]
    ours = (
        py.multi_head_attention(x.tolist(), parameters, TINY, 1),
        py.mlp(x.tolist(), parameters, TINY),
        py.block(x.tolist(), parameters, TINY, 1),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(as_tensor(a), b, **EXACT)


@settings(max_examples=40)
@given(config=configs(), seed=st.integers(0, 99), data=st.data())
def test_logits_equal_pytorch_with_and_without_cache(config: GPT2Config, seed: int, data) -> None:
    """Also in two calls with a cache, split at any place."""
    model = random_model(config, seed, torch.float64)
    length = data.draw(st.integers(1, config.n_positions))
    ids = data.draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=length, max_size=length))
    with torch.no_grad():
        theirs = model(torch.tensor([ids]))[0]
    torch.testing.assert_close(as_tensor(py.forward(twin(model), ids)), theirs, rtol=0, atol=1e-10)
    cut, cache = data.draw(st.integers(0, length)), py.KVCache(config)
    parts = [py.forward(twin(model), part, cache) for part in (ids[:cut], ids[cut:]) if part]
    assert cache.length == length
    torch.testing.assert_close(as_tensor([row for part in parts for row in part]), theirs, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore::gpt_config.GPT2Warning")  # about prompts longer than the context
@pytest.mark.parametrize("n_positions", [1, 7])
def test_greedy_ids_equal_pytorch_past_the_context(n_positions: int) -> None:
    config = GPT2Config(vocab_size=13, n_positions=n_positions, n_embd=6, n_layer=2, n_head=3, eos_token_id=None)
    model = random_model(config, dtype=torch.float64)
    with torch.no_grad():
        model.wpe.weight.mul_(20)  # so that the text depends on where the window begins
    for prompt in ([1], [1, 2, 3], list(range(12))):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=17)[0, len(prompt) :].tolist()
        assert list(py.generate(twin(model), prompt, max_new_tokens=17)) == theirs


def test_sampling_follows_the_seed_and_equals_pytorch() -> None:
    generator = random.Random(1)
    for seed in range(50):
        logits = 5 * matrices(1, 30, seed)
        temperature, uniform = generator.uniform(0.1, 3), generator.random()
        theirs = sampling.logits_to_probs(logits, GenerationConfig(do_sample=True, temperature=temperature))
        ours = py.logits_to_probs(logits[0].tolist(), temperature)
        torch.testing.assert_close(as_tensor(ours), theirs[0], **EXACT)
        assert py.sample(ours, uniform) == sampling.sample(theirs, [uniform]).item()
    assert py.sample([0.0, 1.0, 0.0], math.nextafter(1, 0)) == 1
    assert py.greedy([0.5, 2.0, 2.0]) == 1
    model = twin(random_model(TINY))
    texts = [list(py.generate(model, [1], max_new_tokens=9, temperature=2.0, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_generation_ends_at_the_eot_token_and_stays_in_the_vocabulary() -> None:
    model = random_model(TINY, dtype=torch.float64)
    free = list(py.generate(twin(model), [1], max_new_tokens=9))
    config = GPT2Config(**{**vars(TINY), "eos_token_id": free[4]})
    assert (
        list(py.generate(py.Model(config, twin(model).parameters), [1], max_new_tokens=9)) == free[: free.index(free[4]) + 1]
    )
    assert max(py.generate(twin(model), [1], max_new_tokens=20, temperature=9.0, seed=0, vocab_size=4)) < 4
    from_nothing = list(py.generate(twin(model), [], max_new_tokens=3))
    assert from_nothing == list(py.generate(twin(model), [2], max_new_tokens=3))  # the bos_token_id


def test_bad_input_is_refused() -> None:
    model = twin(random_model(TINY))
    for ids in ([-1], [13]):
        with pytest.raises(InputError, match="from 0 to 12"):
            py.forward(model, ids)
    with pytest.raises(InputError, match="8 tokens are more than the 7"):
        py.forward(model, [1] * 8)
    with pytest.raises(ConfigError, match="temperature"):
        next(py.generate(model, [1], max_new_tokens=1, temperature=-1))
    with pytest.raises(InputError, match="empty"):
        next(py.generate(py.Model(GPT2Config(**{**vars(TINY), "bos_token_id": None}), {}), [], max_new_tokens=1))
    broken = py.Model(TINY, model.parameters | {"ln_f.bias": [math.nan] * 6})
    with pytest.raises(CheckpointError, match="NaN"):
        next(py.generate(broken, [1], max_new_tokens=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_loads_what_pytorch_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(TINY, dtype=torch.float64).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, expected = py.load_model(tmp_path), twin(model)
    assert loaded.config == TINY
    for name, values in expected.parameters.items():
        rows = loaded.parameters[name]
        assert (list(rows) if isinstance(values[0], float) else [list(row) for row in rows]) == values, name
    assert loaded.parameters["wte.weight"][0].itemsize == max(4, dtype.itemsize)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpt2.reference.python_gpt2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_what_pytorch_writes(small_folder: Path, small_tokenizer) -> None:
    model = GPT2.from_pretrained(small_folder, dtype="float64")
    prompt = small_tokenizer.encode("Once upon", return_tensors="pt")
    expected = small_tokenizer.decode(model.generate(prompt, max_new_tokens=9)[0])
    result = run_command("Once upon", "--from_pretrained", str(small_folder), "--max_new_tokens", "9")
    assert (result.stdout, result.stderr, result.returncode) == (expected + "\n", "", 0)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["x", "--from_pretrained", "no/such/folder"], 1, "no/such/folder"),
        (["x", "--temperature", "-1"], 1, "temperature=-1.0"),
        (["x", "--max_new_tokens", "many"], 2, "invalid int value: 'many'"),
        ([], 2, "prompt"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        ended = py.main(arguments)
    except SystemExit as error:
        ended = error.code
    captured = capsys.readouterr()
    assert ended == status and captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1


def test_the_command_in_a_folder_without_tokenizer(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(small_folder / name, tmp_path)
    assert py.main(["x", "--from_pretrained", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    for path in small_folder.iterdir():
        shutil.copy(path, tmp_path)
    assert py.main(["x " * 60, "--from_pretrained", str(tmp_path), "--max_new_tokens", "1"]) == 0
    assert "sees only the last 40" in capsys.readouterr().err


def test_no_function_is_longer_than_thirty_lines() -> None:
    for path in (
        ROOT / "gpt2" / "reference" / name for name in ("python_gpt2.py", "python_layers.py", "safetensors_reader.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 30, f"{path.name}: {node.name}"
                assert ast.get_docstring(node) or node.name.startswith("_") or node.name == "error", node.name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_speed_and_memory_at_the_size_of_gpt2(tmp_path: Path) -> None:
    """A model of 124M parameters needs at most 12 bytes per parameter; at least 26 million multiply-adds per second."""
    config = GPT2Config.preset("gpt2")
    GPT2(config).save_pretrained(tmp_path, tokenizer=None)
    code = (
        "from pathlib import Path\nfrom gpt2.reference import python_gpt2 as py\n"
        f"model = py.load_model({str(tmp_path)!r})\nlist(py.generate(model, [5], max_new_tokens=1))\n"
        # The largest size since the start; getrusage's begins with that of the process which forked, the tests.
        "status = Path('/proc/self/status').read_text().splitlines()\n"
        "print(next(int(line.split()[1]) * 1024 for line in status if line.startswith('VmHWM:')))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1.5e9
    model = py.load_model(tmp_path)
    x, layer = [[0.1] * 768], model.layer(0)
    speeds = []
    for _ in range(5):
        began = time.process_time()
        python_layers.linear(x, layer["mlp.c_fc.weight"], layer["mlp.c_fc.bias"])
        speeds.append(768 * 3072 / (time.process_time() - began))
    assert max(speeds) > 26e6
