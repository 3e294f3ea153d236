"""The import rules of CONTRIBUTING.md, section "Floors": imports point to the same floor or a lower one.

The imports are read from the source, so the tests import no module for this.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("gpt_config", "gpt_encoder", "gpt2")

# Third-party packages that each package may import. All may import the standard library and the packages below them.
THIRD_PARTY = {
    "gpt_config": set(),
    "gpt_encoder": {"regex"},
    "gpt2": {"torch", "safetensors", "click", "numpy", "tqdm", "huggingface_hub"},
}
# Other imports that are allowed in single files, inside a function, or in a module that only one command imports.
ON_DEMAND = {
    ("gpt_config/locate.py", "huggingface_hub"),
    ("gpt_encoder/interface.py", "torch"),
    ("gpt2/adapters/targets.py", "regex"),
    ("gpt2/data/arrow.py", "pyarrow"),
    ("gpt2/data/source.py", "compression"),  # of the standard library from Python 3.14
    ("gpt2/data/source.py", "zstandard"),
    ("gpt2/formats/ctranslate2.py", "ctranslate2"),
    ("gpt2/formats/ctranslate2.py", "transformers"),
    ("gpt2/formats/gguf.py", "gguf"),
    ("gpt2/formats/gguf_file.py", "gguf"),
    ("gpt2/formats/onnx.py", "onnx"),
    ("gpt2/formats/onnx.py", "onnxruntime"),
    ("gpt2/formats/onnx_graph.py", "onnx"),
    ("gpt2/generation/chat_template.py", "jinja2"),  # torch requires it
    ("gpt2/benchmark/peers.py", "ctranslate2"),
    ("gpt2/benchmark/peers.py", "llama_cpp"),
    ("gpt2/benchmark/peers.py", "transformers"),
    ("gpt2/benchmark/report.py", "matplotlib"),
    ("gpt2/benchmark/codecs.py", "tiktoken"),
    ("gpt2/benchmark/codecs.py", "tiktoken_ext"),
    ("gpt2/benchmark/codecs.py", "tokenizers"),
    ("gpt2/evaluation/lm_eval_adapter.py", "lm_eval"),
    ("gpt2/inspection/pictures.py", "matplotlib"),
    ("gpt2/cli/serve.py", "prometheus_client"),
    ("gpt2/cli/serve.py", "starlette"),
    ("gpt2/cli/serve.py", "uvicorn"),
    ("gpt2/serving/app.py", "starlette"),
    ("gpt2/serving/gate.py", "starlette"),
    ("gpt2/serving/metrics.py", "prometheus_client"),
    ("gpt2/serving/server.py", "uvicorn"),
    ("gpt2/training/progress.py", "matplotlib"),
    ("gpt2/training/run_logs.py", "wandb"),
    ("gpt2/verification/components.py", "transformers"),
    ("gpt2/verification/folder.py", "transformers"),
    ("gpt2/verification/tokenizers.py", "tiktoken"),
    ("gpt2/verification/tokenizers.py", "tiktoken_ext"),
    ("gpt2/verification/whole.py", "transformers"),
}
# The floor of each module, as in CONTRIBUTING.md. The rule also holds for imports inside functions and for type checkers.
FLOOR_OF = {
    **dict.fromkeys(("gpt_config", "gpt2.positions", "gpt2.dropout"), 1),
    **dict.fromkeys(("gpt_encoder", "gpt2.kv_cache", "gpt2.device"), 2),
    "gpt2.model": 3,
    **dict.fromkeys(("gpt2.quantization", "gpt2.inspection"), 4),
    **dict.fromkeys(("gpt2.weights", "gpt2.fast", "gpt2.data"), 5),
    **dict.fromkeys(("gpt2.generation", "gpt2.adapters", "gpt2.formats", "gpt2.reference"), 6),
    **dict.fromkeys(("gpt2", "gpt2.pretrained", "gpt2.serving", "gpt2.evaluation", "gpt2.training"), 7),
    **dict.fromkeys(("gpt2.finetuning", "gpt2.verification", "gpt2.benchmark"), 8),
    "gpt2.cli": 9,
    **dict.fromkeys(("gpt2.__main__", "generate"), 10),
}
NAMES_THAT_SAY_NOTHING = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """For every import statement at any depth: (top-level package, whether it is under `if TYPE_CHECKING`)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and isinstance(test.test, ast.Name) and test.test.id == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], id(node) in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.append(((node.module or "").split(".")[0], id(node) in typing_only))
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_imports_point_down_only(package: str) -> None:
    below = set(FLOORS[: FLOORS.index(package) + 1])
    assert sources(package), f"no sources in {package}"
    for path in sources(package):
        name = str(path.relative_to(ROOT))
        for imported, typing_only in imports_of(path):
            if imported in sys.stdlib_module_names or imported in below or (name, imported) in ON_DEMAND:
                continue
            if typing_only and imported == "torch":
                continue
            if name.startswith("gpt_encoder/arrays/") and imported == "numpy":
                continue  # the tokenizer imports this package only for long texts
            assert imported in THIRD_PARTY[package], f"{name} imports {imported}"


# Third-party packages that each reference implementation may import. Of gpt2 itself, they import only the modules of
# gpt2.weights that find and check files.
REFERENCE = {
    "python_gpt2.py": set(),
    "python_layers.py": set(),
    "safetensors_reader.py": set(),
    "classroom.py": {"numpy"},
    "numpy_generation.py": {"numpy"},
    "numpy_gpt2.py": {"numpy"},
    "numpy_kv_cache.py": {"numpy"},
    "numpy_layers.py": {"numpy"},
    "numpy_model.py": {"numpy", "safetensors"},
    "numpy_optimizers.py": {"numpy"},
    "numpy_sampling.py": {"numpy"},
    "numpy_training.py": {"numpy"},
}


@pytest.mark.parametrize("name", sorted(path.name for path in sources("gpt2/reference") if path.name != "__init__.py"))
def test_reference_implementations_share_no_arithmetic_with_gpt2(name: str) -> None:
    tree = ast.parse((ROOT / "gpt2" / "reference" / name).read_text(encoding="utf-8"))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for module in modules:
        top = module.split(".")[0]
        below = top in sys.stdlib_module_names or top in ("gpt_config", "gpt_encoder")
        own = module in ("gpt2.weights.folder", "gpt2.weights.safetensors_header") or module.startswith("gpt2.reference")
        assert below or own or top in REFERENCE[name], f"{name} imports {module}"


def modules() -> dict[str, Path]:
    """The paths of all modules of the project by their dotted names."""
    found = {"generate": ROOT / "generate.py"}
    for package in FLOORS:
        for path in sources(package):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the project that a file imports: at the top, inside functions, and for type checkers."""
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                targets.add(deeper if deeper in known else node.module)
    return targets & known.keys()


def floor_of(module: str) -> int:
    while module not in FLOOR_OF:
        module, dot, _ = module.rpartition(".")
        assert dot, "a module is not in FLOOR_OF"
    return FLOOR_OF[module]


def test_no_import_points_up() -> None:
    known = modules()
    upward = [
        f"{name} (floor {floor_of(name)}) imports {target} (floor {floor_of(target)})"
        for name, path in known.items()
        for target in imported_modules(path, known)
        if floor_of(target) > floor_of(name)
    ]
    assert not upward


def circles_in(edges: dict[str, set[str]]) -> list[str]:
    """The modules in import cycles, and those on a path from one cycle to another; empty if there are no cycles."""
    while edges:
        imported = set().union(*edges.values())
        kept = {name for name, targets in edges.items() if targets & edges.keys() and name in imported}
        if kept == edges.keys():
            break
        edges = {name: edges[name] & kept for name in kept}
    return sorted(edges)


def test_there_are_no_import_cycles() -> None:
    known = modules()
    assert not circles_in({name: imported_modules(path, known) - {name} for name, path in known.items()})


def test_gpt2_has_at_most_8_files_at_the_top() -> None:
    assert len(list((ROOT / "gpt2").glob("*.py"))) <= 8


def test_no_file_has_a_meaningless_name() -> None:
    assert not [path for package in FLOORS for path in sources(package) if path.name in NAMES_THAT_SAY_NOTHING]


@pytest.mark.parametrize("package", FLOORS)
def test_every_module_has_a_docstring(package: str) -> None:
    for path in sources(package):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def test_model_py_has_fewer_than_240_lines() -> None:
    assert len((ROOT / "gpt2" / "model.py").read_text(encoding="utf-8").splitlines()) < 240


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import gpt_config", {"torch", "regex", "huggingface_hub", "urllib.request"}),
        ("import gpt_encoder; gpt_encoder.GPT2Tokenizer.from_pretrained('gpt2').encode('x')",
         {"torch", "numpy", "transformers", "tiktoken", "tokenizers", "huggingface_hub"}),
        ("import gpt2", {"torch", "regex"}),
        ("import gpt2.cli.group, gpt2.cli.generate, gpt2.cli.tokenize, gpt2.cli.benchmark", {"torch", "transformers"}),
        ("import gpt2; gpt2.GPT2; gpt2.complete", {"transformers", "tiktoken"}),
        ("import gpt2.reference.python_gpt2", {"torch", "numpy", "safetensors", "huggingface_hub"}),
        ("import gpt2.reference.numpy_training, gpt2.reference.numpy_generation, gpt2.reference.classroom", {"torch"}),
    ],
)  # fmt: skip
def test_imports_that_must_not_happen(statement: str, absent: set[str]) -> None:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not absent & set(result.stdout.split())
