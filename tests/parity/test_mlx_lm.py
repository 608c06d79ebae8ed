"""mlx-lm itself, on MLX's CPU build: adapters written here compute the same there, and its own the same here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora.formats import mlx
from minilora.formats.safetensors import open_safetensors, save_tensors
from tests import tiny
from tests.formats.test_mlx import CONFIGS, of_family, write

_REASON = "mlx-lm is not installed (pip install 'minilora[parity]')"
mx = pytest.importorskip("mlx.core", reason=_REASON)
utils = pytest.importorskip("mlx_lm.utils", reason=_REASON)
tuner = pytest.importorskip("mlx_lm.tuner.utils", reason=_REASON)
tree_flatten = pytest.importorskip("mlx.utils").tree_flatten

pytestmark = pytest.mark.parity

# What mlx-lm asks for in a config, and what its networks have: a top-level rope_theta (its Llama and Qwen2 do not look
# into rope_parameters), heads of hidden_size / heads values, no window, a tied GPT-2 four times as wide inside.
PLAIN = {"hidden_size": 32, "rope_theta": 10000.0, "rope_parameters": None, "use_sliding_window": False}
CHANGES = {
    "llama": PLAIN,
    "mistral": PLAIN | {"sliding_window": None},
    "qwen2": PLAIN,
    "qwen3": PLAIN,
    "gpt2": {"n_inner": 96, "n_ctx": 64, "layer_norm_epsilon": 1e-5},
}


@pytest.fixture(autouse=True)
def on_the_cpu():
    mx.set_default_device(mx.cpu)


def base(family: str, path: Path, **changes) -> ml.Model:
    """A tiny model, saved at `path` as mlx-lm reads it."""
    model = ml.new_model(tiny.FAMILIES[family] | CHANGES[family] | changes, std=0.3)
    model.save(path)
    if family == "gpt2":  # mlx-lm reads OpenAI's names, which have no prefix
        file = path / "model.safetensors"
        tensors = {
            name.removeprefix("transformer."): np.array(entry.array()) for name, entry in open_safetensors(file).items()
        }
        save_tensors(file, tensors)
    return model


def logits(path: Path, tokens: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    """mlx-lm's: (B, T) -> (B, T, V)."""
    network, _ = utils.load_model(path)
    if adapter is not None:
        network = utils.load_adapters(network, str(adapter))
        network.eval()
    return np.array(network(mx.array(tokens)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_adapter_computes_the_same_in_mlx_lm(tmp_path, family, config):
    model, tokens = base(family, tmp_path / "base"), tiny.tokens()
    assert tiny.relative_error(logits(tmp_path / "base", tokens), model.logits(tokens)) < 1e-5
    tiny.add_random_adapter(model, "a", of_family(family, config))
    write(model, tmp_path / "a")
    found = logits(tmp_path / "base", tokens, tmp_path / "a")
    assert tiny.relative_error(found, model.logits(tokens)) < 2e-5
    model.set_adapter(None)
    assert tiny.relative_error(found, model.logits(tokens)) > 0.01


@pytest.mark.parametrize(
    "targets",
    [
        ["embed_tokens", "lm_head", "q_proj"],
        ["0.self_attn.q_proj", "1.mlp.up_proj"],
        ["1.self_attn.v_proj"],
        ["lm_head"],
    ],
)
def test_any_choice_of_layers_computes_the_same_in_mlx_lm(tmp_path, targets):
    model, tokens = base("llama", tmp_path / "base"), tiny.tokens()
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=6, target_modules=targets))
    write(model, tmp_path / "a")
    found = logits(tmp_path / "base", tokens, tmp_path / "a")
    assert tiny.relative_error(found, model.logits(tokens)) < 2e-5


def test_gpt2_s_position_table_computes_the_same_in_mlx_lm(tmp_path):
    model, tokens = base("gpt2", tmp_path / "base"), tiny.tokens()
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=6, target_modules=["wpe", "c_fc"]))
    write(model, tmp_path / "a")
    found = logits(tmp_path / "base", tokens, tmp_path / "a")
    assert tiny.relative_error(found, model.logits(tokens)) < 2e-5


def mlx_adapter(base_path: Path, out: Path, layers: int, parameters: dict, dora: bool = False) -> None:
    """An adapter that mlx-lm makes, with random B, saved the way its trainer saves."""
    network, _ = utils.load_model(base_path)
    network.freeze()
    tuner.linear_to_lora_layers(network, layers, parameters, use_dora=dora)
    random = np.random.default_rng(0)
    weights = {
        name: mx.array(random.normal(0, 0.3, value.shape).astype(np.float32))
        for name, value in tree_flatten(network.trainable_parameters())
    }
    out.mkdir()
    mx.save_safetensors(str(out / "adapters.safetensors"), weights)
    settings = {"fine_tune_type": "dora" if dora else "lora", "num_layers": layers, "lora_parameters": parameters}
    utils.save_config(settings | {"model": str(base_path), "batch_size": 4}, out / "adapter_config.json")


@pytest.mark.parametrize(
    ("layers", "keys", "tied", "dora"),
    [
        (16, None, False, False),  # more than there are: all linear layers of all blocks
        (16, None, False, True),
        (1, ["self_attn.q_proj", "self_attn.v_proj"], True, False),
        (1, ["self_attn.q_proj", "self_attn.v_proj"], True, True),
        (-1, ["mlp.down_proj", "lm_head"], False, False),
        (-1, ["mlp.down_proj", "lm_head"], False, True),
        (2, ["self_attn.o_proj", "model.embed_tokens"], False, False),
        (2, ["self_attn.o_proj", "model.embed_tokens"], True, False),
    ],
)
def test_an_adapter_that_mlx_lm_made_computes_the_same_here(tmp_path, layers, keys, tied, dora):
    model, tokens = base("llama", tmp_path / "base", tie_word_embeddings=tied), tiny.tokens()
    parameters = {"rank": 4, "scale": 5.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    mlx_adapter(tmp_path / "base", tmp_path / "a", layers, parameters, dora)
    model.load_adapter("a", tmp_path / "a")
    found = logits(tmp_path / "base", tokens, tmp_path / "a")
    assert tiny.relative_error(model.logits(tokens), found) < 2e-5
    assert tiny.relative_error(logits(tmp_path / "base", tokens), found) > 0.01


def test_an_adapter_trained_by_mlx_lm_on_gpt2_computes_the_same_here(tmp_path):
    """GPT-2's network has another name there."""
    model, tokens = base("gpt2", tmp_path / "base"), tiny.tokens()
    mlx_adapter(tmp_path / "base", tmp_path / "a", 1, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    model.load_adapter("a", tmp_path / "a")
    found = logits(tmp_path / "base", tokens, tmp_path / "a")
    assert tiny.relative_error(model.logits(tokens), found) < 2e-5


def test_a_scale_that_is_taken_for_alpha_would_be_noticed(tmp_path, monkeypatch):
    model, tokens = base("llama", tmp_path / "base"), tiny.tokens()
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=6))
    monkeypatch.setattr(mlx, "most_common", lambda scales: scales[0] * 3)  # alpha itself
    monkeypatch.setattr(mlx.Update, "scaled_to", lambda update, scale: update)
    write(model, tmp_path / "a")
    assert tiny.relative_error(logits(tmp_path / "base", tokens, tmp_path / "a"), model.logits(tokens)) > 0.1


@pytest.mark.slow
def test_smollm2_and_its_adapter_say_the_same_in_mlx_lm(tmp_path, smollm2_adapter):
    """Loaded by mlx_lm.load as users do: base directory, tokenizer and adapter. Thirty layers in float32."""
    from mlx_lm import generate, load

    model = ml.load_model("smollm2")
    model.save(tmp_path / "base")
    model.load_adapter("a", smollm2_adapter)
    write(model, tmp_path / "a")
    network, tokenizer = load(str(tmp_path / "base"), adapter_path=str(tmp_path / "a"))
    tokens = np.array([model.tokenizer.encode("The capital of France is Paris, and its river is the Seine.")])
    assert tokenizer.encode("The capital of France is Paris, and its river is the Seine.") == tokens[0].tolist()
    found = np.array(network(mx.array(tokens)))
    assert tiny.relative_error(found, model.logits(tokens)) < 1e-4
    prompt = "The capital of France is"
    completion = generate(network, tokenizer, prompt, max_tokens=10)
    assert completion == model.generate(prompt, 10).lstrip()  # mlx-lm leaves a space at the beginning out
