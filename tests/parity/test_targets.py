"""Embeddings and heads as targets, tied and not, and what an adapter trains whole, against PEFT: gradients, training,
files both ways, merging.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

import minilora as ml
from minilora.formats.peft import TENSOR_FILE
from minilora.formats.safetensors import open_safetensors
from tests import tiny
from tests.parity.reference import (
    in_files,
    peft,
    peft_config,
    peft_pair,
    peft_parameters,
    reference_logits,
    reference_model,
    token_losses,
    torch,
)
from tests.parity.test_training import train_here, train_there

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::UserWarning")]

LLAMA, TIED, GPT2, QWEN2 = tiny.llama(), tiny.llama(tie_word_embeddings=True), tiny.gpt2(), tiny.qwen2()


def config(targets, **fields):
    return ml.LoraConfig(r=3, alpha=6, target_modules=targets, **fields)


CASES = {
    "embedding and head": (LLAMA, config(["embed_tokens", "lm_head", "q_proj"])),
    "embedding, by an expression": (LLAMA, config(r".*(embed_tokens|up_proj)", rank_pattern={"embed_tokens": 5})),
    "rslora on an embedding": (
        LLAMA, config(["embed_tokens", "v_proj"], use_rslora=True, alpha_pattern={"embed_tokens": 2})
    ),
    "dropout beside an embedding": (TIED, config(["embed_tokens"], dropout=0.3)),  # PEFT drops nothing there
    "tied, embedding": (TIED, config(["embed_tokens", "q_proj"])),
    "tied, head": (TIED, config(["lm_head", "q_proj"])),
    "tied, both": (TIED, config(["lm_head", "embed_tokens"])),
    "tied, head trained whole": (TIED, config(["q_proj"], modules_to_save=["lm_head"])),
    "tied, embedding trained whole": (TIED, config(["q_proj"], modules_to_save=["embed_tokens"])),
    "tied, both trained whole": (TIED, config(["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "tied, head trained whole, embedding adapted": (TIED, config(["embed_tokens"], modules_to_save=["lm_head"])),
    "norms by an ending without a dot": (LLAMA, config(["q_proj"], modules_to_save=["norm"])),
    "a whole MLP, one of whose layers is a target": (LLAMA, config(["q_proj", "up_proj"], modules_to_save=["mlp"])),
    "the head a target and trained whole": (LLAMA, config(["q_proj", "lm_head"], modules_to_save=["lm_head"])),
    "a module in full outside the layers": (LLAMA, config(["q_proj", "lm_head"], layers_to_transform=[0])),
    "an embedding in full outside the layers": (
        TIED, config(["q_proj", "model.embed_tokens"], layers_to_transform=[1])
    ),
    "an embedding by suffix outside the layers": (TIED, config(["q_proj", "embed_tokens"], layers_to_transform=[1])),
    "all biases": (GPT2, config(["c_attn"], bias="all")),
    "the biases of adapted layers": (GPT2, config(["c_attn", "mlp.c_proj"], bias="lora_only")),
    "all biases, where some layers have none": (QWEN2, config(["q_proj", "o_proj"], bias="all")),
    "the biases of adapted layers, where some have none": (QWEN2, config(["q_proj", "o_proj"], bias="lora_only")),
    "biases where there are none": (LLAMA, config(["q_proj"], bias="all")),
    "Conv1D layers, norms and embedding trained whole": (
        GPT2, config(["c_attn"], modules_to_save=["wte", "ln_f", "attn.c_proj"])
    ),
    "trained whole and all biases": (GPT2, config(["c_attn"], modules_to_save=["ln_f", "mlp.c_fc"], bias="all")),
    "token and position tables": (GPT2, config(["c_attn", "wte", "wpe"])),
    "GPT-2's tied head and table": (GPT2, config(["lm_head", "wte"])),
    "GPT-2's own head": (tiny.gpt2(tie_word_embeddings=False), config(["lm_head", "wte"], bias="all")),
}  # fmt: skip
TOKENS = tiny.tokens(2, 11)
each_case = pytest.mark.parametrize("case", CASES)


def torch_gradients(model, tokens, labels):
    loss = token_losses(model, tokens, labels) / int((labels[:, 1:] != -100).sum())
    loss.backward()
    return loss.item(), {key: parameter.grad.numpy() for key, parameter in peft_parameters(model).items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@each_case
def test_loss_and_gradients_are_those_of_torch(case, checkpointing, checkpoint, float64_transformers):
    model, lora = CASES[case]
    ours, theirs = peft_pair(checkpoint(model), lora)
    ours.checkpoint = checkpointing
    tokens, labels = tiny.labelled(2, 9)
    expected_loss, expected = torch_gradients(theirs.eval(), tokens, labels)
    loss, found = tiny.gradients(ours, tokens, labels) if not lora.dropout else _without_dropout(ours, tokens, labels)
    assert loss == pytest.approx(expected_loss, rel=1e-11)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert np.linalg.norm(gradient) > 0, key
        assert tiny.relative_error(in_files(ours, key, found[key]), gradient) < 1e-9, key


def changed_tables(model):
    """The keys of adapter "a" that change the head or the embedding of tokens."""
    return [key for key in model.adapter_parameters("a") if set(key.split(".")) & {"lm_head", "embed_tokens", "wte"}]


def _without_dropout(model, *batch):
    """An embedding's adapter has none to switch off: the training pass itself is the comparison."""
    assert all(layer.dropout == 0 for layer in model._adapters.layers("a").values())
    return tiny.gradients(model, *batch)


@each_case
def test_twenty_steps_have_the_losses_of_torch(case, checkpoint, float64_transformers):
    model, lora = CASES[case]
    ours, theirs = peft_pair(checkpoint(model), lora, zero_B=True)
    losses, norms = train_here(ours)
    expected, expected_norms = train_there(theirs.eval())
    assert losses == pytest.approx(expected, rel=1e-9)
    assert norms == pytest.approx(expected_norms, rel=1e-8)
    assert losses[-4] < 0.95 * losses[0]  # the same batch as at first
    final = peft_parameters(theirs)
    for key, tensor in ours.adapter_parameters("a").items():
        assert tiny.relative_error(in_files(ours, key, tensor.data), final[key].detach()) < 1e-7, key


@each_case
def test_an_adapter_saved_here_has_the_same_logits_in_peft(case, checkpoint, tmp_path, float64_transformers):
    model, lora = CASES[case]
    path = checkpoint(model)
    ours = ml.load_model(path)
    base = ours.logits(TOKENS)
    tiny.add_random_adapter(ours, "a", lora)
    assert tiny.relative_error(ours.logits(TOKENS), base) > 1e-2
    ours.save_adapter("a", tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(reference_model(path), tmp_path / "adapter").eval()
    assert not [str(w.message) for w in caught if "missing" in str(w.message).lower() or "unexpected" in str(w.message)]
    assert tiny.relative_error(reference_logits(theirs, TOKENS), ours.logits(TOKENS)) < 1e-10
    again = ml.load_model(path)
    again.load_adapter("a", tmp_path / "adapter")
    assert np.array_equal(again.logits(TOKENS), ours.logits(TOKENS))
    assert again.adapter_parameters("a").keys() == ours.adapter_parameters("a").keys()


@each_case
def test_an_adapter_saved_by_peft_has_the_same_logits_here(case, checkpoint, tmp_path, float64_transformers):
    model, lora = CASES[case]
    path = checkpoint(model)
    _, theirs = peft_pair(path, lora)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    ours = ml.load_model(path)
    ours.load_adapter("a", tmp_path / "adapter")
    assert tiny.relative_error(ours.logits(TOKENS), reference_logits(theirs, TOKENS)) < 1e-10
    assert ours.parameters().keys() == peft_parameters(theirs).keys()
    # and training goes on with the same gradients
    tokens, labels = tiny.labelled(2, 9)
    _, found = tiny.gradients(ours, tokens, labels)
    _, expected = torch_gradients(theirs, tokens, labels)
    for key, gradient in expected.items():
        assert tiny.relative_error(in_files(ours, key, found[key]), gradient) < 1e-9, key


@each_case
def test_files_have_the_keys_and_shapes_of_peft(case, checkpoint, tmp_path):
    model, lora = CASES[case]
    ours, theirs = peft_pair(checkpoint(model, "float32"), lora, "float32")
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_adapter("a", tmp_path / "ours")
    found, expected = (
        {name: entry.shape for name, entry in open_safetensors(tmp_path / who / TENSOR_FILE).items()}
        for who in ("ours", "theirs")
    )
    repeated = {name for name in expected if ".original_module." in name or ".modules_to_save." in name}
    repeated |= {name for name in expected if name.endswith(".base_layer.weight")}  # the base's, beside an embedding
    assert found == {name: shape for name, shape in expected.items() if name not in repeated}
    wanted, written = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    assert wanted.keys() == written.keys()
    for key in ("bias", "modules_to_save", "ensure_weight_tying", "fan_in_fan_out", "use_rslora", "r", "rank_pattern"):
        assert written[key] == wanted[key], key


@each_case
def test_a_merged_model_has_the_same_logits_in_transformers(case, checkpoint, tmp_path, float64_transformers):
    model, lora = CASES[case]
    path = checkpoint(model)
    ours = ml.load_model(path)
    tied = ours.network.head_is_tied
    tiny.add_random_adapter(ours, "a", lora)
    adapted = ours.logits(TOKENS)
    ours.merge_adapter("a")
    assert tiny.relative_error(ours.logits(TOKENS), adapted) < 1e-12
    ours.save(tmp_path / "merged")
    theirs = reference_model(tmp_path / "merged")
    assert tiny.relative_error(reference_logits(theirs, TOKENS), adapted) < 1e-10
    assert tiny.relative_error(ml.load_model(tmp_path / "merged").logits(TOKENS), ours.logits(TOKENS)) < 1e-13
    stays_tied = tied and not changed_tables(ours)
    assert theirs.config.tie_word_embeddings == ours.network.head_is_tied == stays_tied
    ours.unmerge_adapter()
    assert ours.network.head_is_tied == tied


@each_case
def test_merged_parameters_are_those_that_peft_merges(case, checkpoint, float64_transformers):
    model, lora = CASES[case]
    ours, theirs = peft_pair(checkpoint(model), lora)
    if ours.network.head_is_tied and any(".lora_" in key for key in changed_tables(ours)):
        pytest.skip("PEFT merges ΔW into the matrix that head and embedding share, and warns of it: another function")
    ours.merge_adapter("a")
    merged = dict(theirs.merge_and_unload().named_parameters())
    modules = dict(ours.network.named_modules())
    for name, tensor in ours.network.named_parameters():
        conv1d = name.endswith(".weight") and getattr(modules[name.removesuffix(".weight")], "conv1d", False)
        found = tensor.data.T if conv1d else tensor.data
        assert tiny.relative_error(found, merged[name].detach()) < 1e-12, name


def test_peft_s_tied_adapters_are_refused_by_name(checkpoint, tmp_path):
    """PEFT ties them by letting two parameters share memory and updates it twice a step: that is no gradient's step."""
    theirs = peft.get_peft_model(
        reference_model(checkpoint(TIED, "float32"), "float32"),
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
    )
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ml.load_model(checkpoint(TIED, "float32"))
    with pytest.raises(ml.MiniloraError, match="ensure_weight_tying is True, which is not supported"):
        ours.load_adapter("a", tmp_path / "adapter")
    assert not ours.adapters


def test_a_new_adapter_starts_as_peft_s_does(checkpoint):
    """A of an embedding zero and B normal, what is trained whole a copy: the logits are exactly the base's."""
    path = checkpoint(TIED, "float32")
    lora = ml.LoraConfig(r=16, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head", "norm"])
    ours = ml.load_model(path)
    base = ours.logits(TOKENS)
    ours.add_adapter("a", lora)
    assert np.array_equal(ours.logits(TOKENS), base)
    start = {key: tensor.data for key, tensor in ours.adapter_parameters("a").items()}
    torch.manual_seed(0)
    theirs = peft_parameters(peft.get_peft_model(reference_model(path, "float32"), peft_config(lora)))
    for key, parameter in theirs.items():
        spread, expected = float(start[key].std()), float(parameter.detach().std(correction=0))
        assert spread == pytest.approx(expected, rel=0.15), key
        assert bool(start[key].any()) == bool(parameter.any())
