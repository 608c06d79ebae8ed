"""Settings come from a TOML file, and a run's own file gives them back."""

import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.train.settings import (
    KEYS,
    adapter_settings,
    described,
    lora_config,
    parse_targets,
    read_settings,
    settings_text,
    train_config,
)
from tests.train import made

RUN = ml.TrainConfig(
    out='a "quoted" out\\put é', steps=7, lr=3e-5, betas=(0.5, 0.75), max_grad_norm=None, warmup=2, packing=True,
    mask_prompt=False, eval_every=3, seed=9,
)  # fmt: skip
LORA = ml.LoraConfig(
    r=4, alpha=0.5, target_modules=["q_proj", "mlp.up_proj"], exclude_modules=r".*\.0\..*", layers_to_transform=[1],
    rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*": 3.5}, use_rslora=True, init="gaussian",
)  # fmt: skip


@pytest.mark.parametrize(("run", "lora"), [(RUN, LORA), (ml.TrainConfig(), ml.LoraConfig())])
def test_what_is_written_reads_back_as_the_same_run(tmp_path, run, lora):
    everything = {field: getattr(run, field) for field in KEYS if hasattr(run, field)} | adapter_settings(lora)
    (tmp_path / "run.toml").write_text(settings_text(everything), encoding="utf-8")
    read = read_settings(tmp_path / "run.toml")
    assert train_config(read) == run
    assert lora_config(read) == lora


def test_a_run_in_memory_describes_its_model_and_adapter(tmp_path):
    network = made.model(target_modules=["v_proj"], dropout=0.25)
    made.train(network, out=tmp_path / "run", accumulate=2)
    read = read_settings(tmp_path / "run" / "minilora.toml")
    assert lora_config(read) == network.adapters["a"]
    assert train_config(read) == ml.TrainConfig(
        out=str(tmp_path / "run"), steps=5, batch_size=4, lr=1e-2, accumulate=2, max_length=64
    )
    assert read["model"] == "a random llama"
    assert "data" not in read
    assert described(network, "rows.jsonl")["data"] == "rows.jsonl"


def test_dashes_and_underscores_are_the_same_key(tmp_path):
    (tmp_path / "a.toml").write_text("batch-size = 3\nmax_length = 5\n")
    assert read_settings(tmp_path / "a.toml") == {"batch_size": 3, "max_length": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 3", "has the key 'batchsize', which is no setting: did you mean 'batch_size'"),
        ("xyzzy = 3", "has the key 'xyzzy', which is no setting: known are model, data"),
        ("batch-size = 3\nbatch_size = 3", "twice, with - and with _"),
        ("lr = x", "is not TOML: .*line 1"),
        ("[train]\nlr = 1", "has the key 'train'"),
        ("device = 0", "has device = 0, expected a text in quotes"),
    ],
)
def test_a_key_or_line_that_cannot_be_meant_is_named(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(MiniloraError, match=message):
        read_settings(tmp_path / "a.toml")


def test_a_missing_file_is_an_error_and_a_wrong_type_names_the_setting(tmp_path):
    with pytest.raises(MiniloraError, match=r"cannot read .*none\.toml: No such file"):
        read_settings(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text('lr = "fast"')
    with pytest.raises(MiniloraError, match="lr is 'fast', expected a number"):
        train_config(read_settings(tmp_path / "a.toml"))


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, self_attn.v_proj", ["q_proj", "self_attn.v_proj"]),
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("model.layers.[01].mlp.up_proj", "model.layers.[01].mlp.up_proj"),
    ],
)
def test_targets_are_endings_unless_they_have_a_character_that_no_name_has(text, targets):
    assert parse_targets(text) == targets
