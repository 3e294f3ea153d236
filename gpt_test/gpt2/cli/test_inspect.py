"""`gpt2 inspect`: what it prints, the files it writes, and its errors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.inspection import ablate_heads, intervene, overview
from gpt2.inspection.pictures import draw_attribution, draw_head, save_pictures
from gpt_config.errors import InputError
from gpt_encoder import GPT2Tokenizer

TEXT = "the cat by the cat"


def test_the_terminal_view(run_command, small_folder: Path, small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    result = run_command("inspect", TEXT, "--from_pretrained", small_folder)
    assert result.status == 0 and result.err == ""
    shown = overview(small_model, TEXT, tokenizer=small_tokenizer)
    best = shown.guesses[-1][0]
    assert f"{len(shown.ids)} tokens, loss {shown.loss:.3f} nats" in result.out
    assert re.search(rf"^{re.escape(repr(best.label))} +{best.probability:.1%}  █{{24}}$", result.out, re.MULTILINE)
    assert all(f"layer {layer}" in result.out for layer in range(2))
    (head, *_) = shown.notable_heads()["induction"]
    assert f"(induction)  {head.layer}.{head.head} {head.score:.2f}" in result.out
    only_lens = run_command("inspect", "-", "--from_pretrained", small_folder, "--lens", stdin=TEXT.encode()).out
    assert "layer 1" in only_lens and "induction" not in only_lens and "█" not in only_lens


def test_ablation_patching_and_attribution(
    run_command, small_folder: Path, small_model: GPT2, small_tokenizer: GPT2Tokenizer
) -> None:
    options = ("--from_pretrained", small_folder, "--ablate", "1.2", "--ablate", "0.0", "--attribute", "--json", "-")
    values = json.loads(run_command("inspect", TEXT, *options, "--patch", "the cat by the boat").out)
    with intervene(small_model, ablate_heads([(1, 2), (0, 0)])):
        ids = torch.tensor([values["ids"]])
        log_probs = small_model(ids)[0].log_softmax(-1)
        other = small_tokenizer.encode("the cat by the boat", return_tensors="pt")
        other_log_prob, target = small_model(other)[0, -1].log_softmax(-1).max(-1)
    assert values["change"] == "without head 1.2, 0.0"
    expected = -log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]] / math.log(2)
    assert values["bits"][1:] == pytest.approx(expected.tolist(), abs=1e-4)
    patching, attribution = values["patching"], values["attribution"]
    assert patching["target"]["id"] == target and patching["other"] == pytest.approx(other_log_prob.item(), abs=1e-4)
    # The stream before layer 0 at the last token decides the rest: the tokens before it are equal.
    assert patching["changes"][0][-1] == pytest.approx(patching["other"] - patching["before"], abs=1e-4)
    assert sum(attribution["scores"]) == pytest.approx(attribution["total"], abs=0.05)
    assert attribution["target"]["id"] == int(log_probs[-1].argmax())
    printed = run_command("inspect", TEXT, *options[:-2], "--patch", "the cat by the boat").out
    assert "unchanged" in printed and "Tokens that matter" in printed and "Patching" in printed and "->" in printed


def test_files(run_command, small_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -r requirements-dev.txt)")
    out = tmp_path / "new"
    files = ("--html", out / "page.html", "--png", out / "png", "--json", out / "all.json")
    result = run_command("inspect", "a $cat$ of <b>", "--from_pretrained", small_folder, *files, "--attribute")
    assert result.status == 0, result.err
    assert (out / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((out / "all.json").read_text())["pieces"][0] == "a"
    names = {path.name for path in (out / "png").iterdir()}
    assert names == {f"{name}.png" for name in ("surprisal", "next", "parts", "heads", "head", "lens", "attribution")}
    assert {path.read_bytes()[:4] for path in (out / "png").iterdir()} == {b"\x89PNG"}
    assert {path.name for path in out.iterdir()} == {"page.html", "png", "all.json"}  # no temporary folder is left


def test_pictures_in_python(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -r requirements-dev.txt)")
    shown = overview(small_model, TEXT, tokenizer=small_tokenizer)
    drawn = draw_head(shown, 1, 2).axes[0].images[0].get_array()
    assert torch.equal(torch.tensor(drawn.tolist()), shown.patterns[1, 2])
    with pytest.raises(InputError, match=r"no head 2\.0: the model has 2 layers of 3 heads"):
        draw_head(shown, 2, 0)
    with pytest.raises(InputError, match="attribute=True"):
        draw_attribution(shown)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write"):
        save_pictures(shown, tmp_path / "file")


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["", ], 1, "the text is empty"),
        (["x", "--ablate", "5"], 2, "LAYER.HEAD"),
        (["x", "--ablate", "2.0"], 1, "there is no head 2.0"),
        (["x", "--patch", "x x x"], 1, "patch between texts of one length"),
        (["x", "--html", "."], 1, "is a folder"),
        (["x", "--png", __file__], 1, "is a file"),
        (["x" * 50], 1, "the model takes 1 to 40"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(run_command, small_folder: Path, args: list[str], status: int, message: str) -> None:
    result = run_command("inspect", *args, "--from_pretrained", small_folder)
    assert result.status == status and message in result.err and len(result.err.splitlines()) == 1
    assert result.out == ""


def test_control_characters_do_not_reach_the_terminal(run_command, small_folder: Path) -> None:
    assert "\x1b" not in run_command("inspect", "a\x1b[2J", "--from_pretrained", small_folder, "--attribute").out
