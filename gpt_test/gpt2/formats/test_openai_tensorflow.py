"""TensorFlow checkpoints: one that TensorFlow wrote is read bit by bit, and damaged numbers are found by their checksum."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt2.formats.crc32c import crc32c, masked_crc32c
from gpt2.formats.openai_tensorflow import published_name, read, variable_name
from gpt2.formats.tensor_bundle import part_key, read_index, read_tensor, write_bundle
from gpt_config import CheckpointError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import TRAINING_TEXT
from gpt_test.gpt2.formats.openai_checkpoint import make

CHECKPOINT = Path(make.__file__).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "run1"))


def test_the_numbers_of_tensorflow_are_read_bit_by_bit(small_tokenizer: GPT2Tokenizer) -> None:
    config, tensors, tokenizer = read(CHECKPOINT)
    expected = {published_name(name): make.numbers(name, shape) for name, shape in make.shapes().items()}
    assert tensors.keys() == expected.keys()  # neither Adam's variables nor the step
    for name, values in expected.items():
        found = tensors[name].numpy()
        assert found.dtype == np.float32 and np.array_equal(found, values.reshape(found.shape)), name
    assert tensors["h.0.attn.c_attn.weight"].shape == (12, 36)
    assert (config.n_head, config.n_positions, config.activation_function) == (2, 16, "gelu_new")
    assert config.eos_token_id == small_tokenizer.eot_token_id
    assert tokenizer is not None and tokenizer.encode(TRAINING_TEXT) == small_tokenizer.encode(TRAINING_TEXT)


def test_tensors_in_parts_and_in_several_data_files_are_joined() -> None:
    """As TensorFlow's partitioners and `Saver(sharded=True)` write them."""
    bundle = read_index(CHECKPOINT / "partitioned" / "model-7")
    assert bundle.n_shards == 2 and {entry.shard for entry in bundle.parts.values()} == {0, 1}
    assert bundle.entries.keys() == make.shapes().keys() and len(bundle.parts) == 40
    assert {len(entry.parts) for entry in bundle.entries.values()} == {2, 3}
    for name, shape in make.shapes().items():
        assert np.array_equal(read_tensor(bundle, name), make.numbers(name, shape)), name


def test_parts_that_do_not_make_a_tensor_are_named() -> None:
    whole = read_index(CHECKPOINT / "partitioned" / "model-7")
    entry = whole.entries["model/wte"]
    first, second = entry.parts
    for parts, message in (
        ((first,), "has parts of another size"), ((first, first), "has parts that overlap"),
        ((first, second[:1]), "has a part with other dimensions"), ((first, ((151, 149), (0, -1))), "lacks a part"),
        ((first, ((150, 151), (0, -1))), "has a part outside of its shape"),
        ((first, ((1 << 60, 1), (0, -1))), "has a part outside of its shape"),
    ):  # fmt: skip
        bundle = whole._replace(entries={"model/wte": entry._replace(parts=parts)})
        with pytest.raises(CheckpointError, match=f"'model/wte' .*{message}"):
            read_tensor(bundle, "model/wte")


def test_keys_of_parts_are_tensorflows() -> None:
    """The expected bytes are from files that TensorFlow wrote; larger numbers are from the rules of OrderedCode."""
    assert part_key("model/wte", ((0, 150), (0, -1))) == b"\0model/wte\0\1\1\2\x80\xc0\x96\x80\x7f"
    assert part_key("a\0", ((63, 64), (8191, 8192))) == b"\0a\0\xff\0\1\1\2\xbf\xc0\x40\xdf\xff\xe0\x20\0"


@pytest.mark.parametrize("name", ["", "checkpoint", "model-7", "model-7.index", "model-7.data-00000-of-00001"])
def test_a_checkpoint_is_found_by_its_folder_and_by_each_of_its_files(name: str, folder: Path) -> None:
    assert read(folder / name).config.n_embd == 12


def test_the_newest_checkpoint_of_a_folder_is_read(folder: Path) -> None:
    for path in folder.glob("model-7.*"):
        shutil.copy(path, folder / path.name.replace("7", "8", 1))
    (folder / "model-7.data-00000-of-00001").unlink()
    with pytest.raises(CheckpointError, match="copy all files of the checkpoint"):
        read(folder)
    (folder / "checkpoint").write_text('model_checkpoint_path: "/home/someone/run1/model-8"\n')
    assert read(folder).config.n_embd == 12
    (folder / "checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"contains 2 checkpoints, such as model-7\.index: name one"):
        read(folder)


def test_damage_is_found_by_checksums(folder: Path) -> None:
    data = folder / "model-7.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[700] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="has another checksum than the index says: copy the file again"):
        read(folder)
    index = folder / "model-7.index"
    content = bytearray(index.read_bytes())
    content[100] ^= 1
    index.write_bytes(content)
    with pytest.raises(CheckpointError, match="the checksum of a block is wrong"):
        read(folder)


def test_what_is_missing_beside_a_checkpoint_is_named(folder: Path) -> None:
    (folder / "hparams.json").write_text(json.dumps({"n_vocab": 300}))
    with pytest.raises(CheckpointError, match=r"hparams\.json is damaged: it needs n_vocab, n_ctx"):
        read(folder)
    (folder / "hparams.json").unlink()
    with pytest.raises(CheckpointError, match="does not say how many heads"):
        read(folder)
    with pytest.raises(CheckpointError, match="is not a TensorFlow checkpoint: it needs a file"):
        read(folder / "vocab.bpe")


def test_a_written_checkpoint_has_the_form_of_tensorflows(tmp_path: Path) -> None:
    """The data file has the bytes that TensorFlow wrote for the same variables; the index describes the same entries."""
    values = {name: make.numbers(name, shape) for name, shape in make.shapes().items()}
    write_bundle(tmp_path / "model", values)
    ours, theirs = read_index(tmp_path / "model"), read_index(CHECKPOINT / "model-7")
    assert list(ours.entries) == [name for name in theirs.entries if name in values]
    for name, entry in ours.entries.items():
        assert entry._replace(offset=0) == theirs.entries[name]._replace(offset=0)
        assert np.array_equal(read_tensor(ours, name), values[name])


def test_names_are_translated_both_ways() -> None:
    for name in ("wte.weight", "wpe.weight", "h.10.ln_1.bias", "h.3.attn.c_proj.weight", "h.3.mlp.c_fc.bias", "ln_f.weight"):
        assert published_name(variable_name(name)) == name
    assert published_name("model/h0/ln_1/g/Adam_1") is None


def test_checksums_are_those_of_the_standard() -> None:
    """The values are from RFC 3720, appendix B.4."""
    assert crc32c(b"\x00" * 32) == 0x8A9136AA and crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"6789", crc32c(b"12345")) == crc32c(b"123456789") == 0xE3069283
    assert masked_crc32c(b"") == 0xA282EAD8


def test_long_input_has_the_checksum_of_its_parts() -> None:
    content = np.random.default_rng(0).integers(0, 256, (1 << 21) + 77, dtype=np.uint8).tobytes()
    by_parts = 0
    for at in range(0, len(content), 100_000):
        by_parts = crc32c(content[at : at + 100_000], by_parts)
    assert crc32c(content) == by_parts
    assert crc32c(content[5:], crc32c(content[:5])) == by_parts
