"""PEFT directories: what is written reads back, what is not supported is refused by the name of its key."""

import errno
import json

import ml_dtypes
import numpy as np
import pytest

from minilora.errors import MiniloraError
from minilora.formats.peft import CONFIG_FILE, TENSOR_FILE, read_adapter, write_adapter
from minilora.formats.safetensors import save_tensors
from minilora.lora.config import LoraConfig

PREFIX = "base_model.model.model.layers."
TENSORS = {
    f"{PREFIX}{layer}.self_attn.{name}.lora_{side}.weight": np.full(shape, layer, np.float32)
    for layer in range(2)
    for name in ("q_proj", "v_proj")
    for side, shape in (("A", (2, 4)), ("B", (6, 2)))
}
CONFIG = LoraConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def adapter(tmp_path):
    write_adapter(tmp_path / "adapter", CONFIG, TENSORS, base_model="org/base")
    return tmp_path / "adapter"


def written(adapter):
    return json.loads((adapter / CONFIG_FILE).read_text())


def change(adapter, **changes):
    (adapter / CONFIG_FILE).write_text(json.dumps(written(adapter) | changes))


def test_an_adapter_comes_back_as_it_was_written(adapter):
    config, tensors = read_adapter(adapter)
    assert config == CONFIG
    assert list(tensors) == sorted(TENSORS)
    for key, tensor in TENSORS.items():
        np.testing.assert_array_equal(tensors[key], tensor)
        assert tensors[key].flags.writeable


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, alpha=1.5, dropout=0.25, target_modules=r".*\.(q|v)_proj", use_rslora=True, init="gaussian"),
        LoraConfig(target_modules=["q_proj"], exclude_modules=["1.self_attn.q_proj"], layers_to_transform=[0]),
        LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 2.5}, use_dora=True),
        LoraConfig(target_modules=["q_proj"], bias="lora_only", modules_to_save=["lm_head"], exclude_modules=".*0.*"),
    ],
)
def test_every_field_comes_back(tmp_path, config):
    write_adapter(tmp_path, config, TENSORS, base_model="b")
    assert read_adapter(tmp_path)[0] == config


def test_dtypes_are_kept(tmp_path):
    tensors = {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in TENSORS.items()}
    write_adapter(tmp_path, CONFIG, tensors, base_model="b")
    assert {tensor.dtype.name for tensor in read_adapter(tmp_path)[1].values()} == {"bfloat16"}


def test_all_linear_is_written_as_names(tmp_path):
    write_adapter(tmp_path, LoraConfig(r=2), TENSORS, base_model="b")
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
    assert written(tmp_path)["target_modules"] == names
    write_adapter(tmp_path, LoraConfig(r=2), TENSORS, base_model="b", module_names=["q_proj", "v_proj"])
    assert written(tmp_path)["target_modules"] == ["q_proj", "v_proj"]


def test_the_base_its_layout_and_a_whole_alpha_are_noted(tmp_path):
    write_adapter(tmp_path, CONFIG.with_changes(alpha=4.0), TENSORS, base_model="org/base", fan_in_fan_out=True)
    assert '"lora_alpha": 4,' in (tmp_path / CONFIG_FILE).read_text()
    config = written(tmp_path)
    assert (config["base_model_name_or_path"], config["fan_in_fan_out"]) == ("org/base", True)
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)


def test_other_files_in_the_directory_are_left_alone(adapter):
    (adapter / "metrics.jsonl").write_text("{}")
    write_adapter(adapter, CONFIG, TENSORS, base_model="b")
    assert sorted(path.name for path in adapter.iterdir()) == [CONFIG_FILE, TENSOR_FILE, "metrics.jsonl"]


def test_a_full_disk_keeps_the_old_adapter_whole(adapter, monkeypatch):
    from minilora.formats import safetensors

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    monkeypatch.setattr(safetensors.safetensors.numpy, "save_file", fail)
    with pytest.raises(MiniloraError, match="disk is full"):
        write_adapter(adapter, CONFIG.with_changes(r=7), {}, base_model="b")
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


# ---------------------------------------------------------------- what PEFT may ask for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3", expected "LORA"'),
        ({"peft_type": None}, 'peft_type is "None", expected "LORA"'),
        ({"task_type": "SEQ_CLS"}, 'task_type is "SEQ_CLS"'),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"megatron_config": {"a": 1}}, "megatron_config is"),
        ({"megatron_core": "other.core"}, None),
        ({"use_qalora": True}, "use_qalora is True, which is not supported"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"target_parameters": ["w"]}, "target_parameters is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"a_key_of_the_future": {"on": True}}, "a_key_of_the_future is {'on': True}, which is not supported"),
        ({"a_key_of_the_future": False, "another": None, "third": [], "fourth": ""}, None),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": 3}, "init_lora_weights is 3"),
        ({"init_lora_weights": "orthogonal"}, None),
        ({"init_lora_weights": False}, None),
        ({"layers_pattern": "blocks"}, "layers_pattern is 'blocks'"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all', expected a list of layer numbers"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": []}, "target_modules is missing"),
        ({"target_modules": [1]}, r"target_modules is \[1\], expected a list of module names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": None}, None),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_dropout": 2}, "dropout is 2"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
        ({"rank_pattern": {"q_proj": "a"}}, "rank_pattern"),
        ({"use_dora": "yes"}, "use_dora is 'yes'"),
        ({"bias": "some"}, "bias is 'some'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(adapter, changes, message):
    change(adapter, **changes)
    if message is None:
        read_adapter(adapter)
        return
    with pytest.raises(MiniloraError, match=message) as caught:
        read_adapter(adapter)
    assert "\n" not in str(caught.value)


def test_an_old_config_with_few_keys_gets_peft_s_defaults(adapter):
    (adapter / CONFIG_FILE).write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": 1}')
    assert read_adapter(adapter)[0] == LoraConfig(r=8, alpha=8, target_modules=["q_proj"], layers_to_transform=[1])


# ---------------------------------------------------------------- bad directories


def test_a_model_or_nothing_in_place_of_an_adapter_is_explained(tmp_path):
    with pytest.raises(MiniloraError, match=r"no such file or folder: .*gone; expected an adapter: a directory"):
        read_adapter(tmp_path / "gone")
    with pytest.raises(MiniloraError, match=r"is no adapter: expected a directory with adapter_config\.json"):
        read_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MiniloraError, match="is a model, not an adapter"):
        read_adapter(tmp_path)


def test_a_pickle_is_refused(adapter):
    (adapter / TENSOR_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(MiniloraError, match=r"adapter_model\.bin, a pickle that could run code"):
        read_adapter(adapter)


def test_missing_or_truncated_tensors_are_named(adapter):
    whole = (adapter / TENSOR_FILE).read_bytes()
    for length in range(0, len(whole), 37):
        (adapter / TENSOR_FILE).write_bytes(whole[:length])
        with pytest.raises(MiniloraError, match=r"adapter_model\.safetensors"):
            read_adapter(adapter)
    (adapter / TENSOR_FILE).unlink()
    with pytest.raises(MiniloraError, match=r"adapter_model\.safetensors"):
        read_adapter(adapter)


def test_a_malformed_config_names_its_line(adapter):
    (adapter / CONFIG_FILE).write_text('{\n"peft_type": LORA}')
    with pytest.raises(MiniloraError, match=r"adapter_config\.json, line 2: malformed JSON"):
        read_adapter(adapter)


def test_keys_of_another_program_are_refused(adapter):
    save_tensors(adapter / TENSOR_FILE, {"layers.0.q_proj.lora_a": np.zeros(2)})
    with pytest.raises(MiniloraError, match=r"key layers\.0\.q_proj\.lora_a, expected it to start with base_model"):
        read_adapter(adapter)
