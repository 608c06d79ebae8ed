"""The example that made the embedded model: reading packages, cutting rows, and a training that learns and saves."""

import importlib.util
import io
import json
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora.formats.checkpoint import EMBEDDED

FOLDER = Path(__file__).parents[2] / "examples" / "pretrain"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus():
    return load("corpus")


@pytest.fixture(scope="module")
def pretrain():
    return load("pretrain")


@pytest.fixture
def data(corpus, tmp_path):
    """A folder as corpus.py writes it, of a text that is easily learned."""
    text = "the cat sat on the mat and the dog sat on the log. " * 400
    tokenizer = corpus.make_tokenizer([text])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text).ids, np.uint16)
    np.savez_compressed(tmp_path / "tokens.npz", train=np.tile(ids, 4), valid=ids[:600])
    return tmp_path


def test_strings_of_a_serialised_r_vector_are_read(corpus):
    lines = ["CHAPTER I", "", "It is a truth", "é"]
    body = b"".join(struct.pack(">Ii", 0x40009, len(line.encode())) + line.encode() for line in lines)
    assert corpus.r_strings(b"X\n\x00\x00\x00\x03" + struct.pack(">Ii", 16, len(lines)) + body) == lines


def test_bible_chapters_lose_their_markup_and_notes(corpus, tmp_path):
    book = (
        '<title>Book</title><chapter osisID="Gen.1" sID="Gen.1"/><w lemma="x">In</w> <w>the</w> beginning'
        '<note placement="foot">or <w>at</w> first</note>, <w>God</w> <w>said</w>: “Let there be light.”'
        '<div sID="g2" type="x-p"/>And <w>there</w> was.<chapter eID="Gen.1"/>'
    ).encode()
    packed = zlib.compress(book)
    files = {"t/ot.bzs": struct.pack("<III", 0, len(packed), len(book)), "t/ot.bzz": packed}
    with tarfile.open(tmp_path / "sword-text-web_1.tgz", "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    assert list(corpus.bible(tmp_path)) == ["In the beginning, God said: “Let there be light.”\nAnd there was."]


def test_a_missing_package_is_named(corpus, tmp_path):
    with pytest.raises(SystemExit, match="has no wordnet-base"):
        list(corpus.wordnet(tmp_path))


def test_digits_are_tokens_of_their_own_and_text_comes_back_as_it_was(corpus):
    tokenizer = corpus.make_tokenizer(["In 2021 there were 2021 of them. " * 50])
    tokens = tokenizer.encode("In 2021, “é”").tokens
    assert [token for token in tokens if any(digit in token for digit in "0123456789")] == ["2", "0", "2", "1"]
    assert tokenizer.decode(tokenizer.encode("In 2021, “é”").ids) == "In 2021, “é”"


def test_rows_are_windows_of_the_stream(pretrain):
    stream = np.arange(1000, dtype=np.uint16)
    batch = next(pretrain.rows(stream, 8, seed=0))
    assert batch.shape == (8, pretrain.LENGTH)
    assert (np.diff(batch, axis=1) == 1).all()
    assert len(set(batch[:, 0])) > 1


def test_pretraining_learns_and_leaves_a_float16_model_that_loads(pretrain, data, tmp_path, monkeypatch, capsys):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(pretrain, "CONFIG", pretrain.CONFIG | small)
    out = tmp_path / "out"
    arguments = ["pretrain.py", data, "--out", out, "--steps", 30, "--batch", 2, "--every", 15, "--lr", 0.02]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    pretrain.main()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 10, 15, 30]
    assert log[-1]["validation_loss"] < 0.6 * log[0]["validation_loss"]
    model = ml.load_model(out / "model")
    assert {tensor.data.dtype for _, tensor in model.network.named_parameters()} == {np.dtype(np.float16)}
    assert model.tokenizer.encode("the cat")
    assert "float16, validation loss" in capsys.readouterr().out


def test_a_budget_of_minutes_ends_the_run_with_the_rate_near_its_floor(pretrain, data, tmp_path, monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(pretrain, "CONFIG", pretrain.CONFIG | small)
    out = tmp_path / "out"
    arguments = ["pretrain.py", data, "--out", out, "--minutes", 0.03, "--batch", 1, "--every", 10_000]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    pretrain.main()
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["seconds"] >= 1.8
    assert last["lr"] < 0.3 * 3e-3


# --- what came of it ----------------------------------------------------------------------------------------------


def test_the_embedded_model_is_small_and_of_the_examples_shape(pretrain):
    folder = EMBEDDED / "mini"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000
    config = json.loads((folder / "config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
    assert {name: config[name] for name in sizes} == {name: pretrain.CONFIG[name] for name in sizes}


def test_the_embedded_model_writes_and_expects_english():
    model = ml.load_model("mini")
    english = model.tokenizer.encode("He went into the house, and sat down at the table with his father and mother.")
    shuffled = np.random.default_rng(0).permutation(english)
    loss, nonsense = (float(model.loss(np.array([tokens]))) for tokens in (english, shuffled))
    assert loss < 4.0 < nonsense
    text = model.generate("She opened the door, and", 40, temperature=0.6, top_p=0.9, seed=0)
    words = [word.strip(",.;:!?\"'()") for word in text.split()]
    known = {"the", "and", "of", "to", "a", "in", "was", "her", "his", "it", "that", "she", "he", "with", "had", "for"}
    assert sum(word in known for word in words) >= 0.25 * len(words)
