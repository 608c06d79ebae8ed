"""The variants of LoRA against PEFT's: values, gradients, dropout, training, merging, and files both ways."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

import minilora as ml
from minilora.formats.peft import CONFIG_FILE
from minilora.lora.variants.lora_plus import lora_plus
from tests import tiny
from tests.parity.reference import (
    peft,
    peft_config,
    peft_parameters,
    reference_logits,
    reference_model,
    token_losses,
    torch,
)
from tests.parity.test_training import train_here, train_there

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOKENS = tiny.tokens(2, 11)
FAMILIES = {
    "llama": tiny.llama(attention_bias=True),
    "gpt2": tiny.gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
}
families = pytest.mark.parametrize("family", FAMILIES)
FIELDS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "lora_fa": {"variant": "lora_fa"},
}
variants = pytest.mark.parametrize("name", FIELDS)


def config(**fields):
    return ml.LoraConfig(**({"r": 3, "alpha": 7} | fields))


def theirs_of(path, settings, dtype="float64"):
    """PEFT's model with a new adapter of the same settings."""
    same = peft_config(settings)
    same.use_dora = settings.use_dora
    same.init_lora_weights = True if settings.init == "kaiming" else settings.init
    model = peft.get_peft_model(reference_model(path, dtype), same)
    if settings.variant == "lora_fa":
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad = False
    return model


def lora_tensors(model):
    """PEFT's Tensors by our keys, the frozen A of LoRA-FA too."""
    return {
        name.replace(".default", "").replace("vector.weight", "vector"): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def pair(path, settings, dtype="float64", start=False):
    """One base with one adapter of the same values, here and in PEFT: A as drawn and B zero (`start`), or all moved."""
    ours, theirs = ml.load_model(path, dtype=dtype), theirs_of(path, settings, dtype)
    ours.add_adapter("a", settings)
    mine, other = ours.adapter_parameters("a"), lora_tensors(theirs)
    assert set(mine) == set(other)
    random = np.random.default_rng(0)
    for key, tensor in mine.items():
        assert tensor.shape == tuple(other[key].shape), key
        assert tensor.requires_grad == other[key].requires_grad, key
        if key.endswith("magnitude_vector"):
            assert tiny.relative_error(tensor, other[key].detach()) < (1e-14 if dtype == "float64" else 1e-6)
            tensor.data *= 1 if start else random.uniform(0.5, 1.5, tensor.shape)
        elif not (start and "lora_B" in key):
            tensor.data[...] = random.normal(0, 0.3, tensor.shape)
        with torch.no_grad():
            other[key].copy_(torch.from_numpy(tensor.data))
    return ours, theirs


def torch_gradients(model, tokens, labels):
    loss = token_losses(model, tokens, labels) / int((labels[:, 1:] != -100).sum())
    loss.backward()
    return loss.item(), {key: tensor.grad for key, tensor in lora_tensors(model).items() if tensor.grad is not None}


def same_gradients(ours, theirs, bound=1e-11):
    batch = tiny.labelled(2, 9)
    loss, gradients = tiny.gradients(ours, *batch)
    expected_loss, expected = torch_gradients(theirs, *batch)
    assert loss == pytest.approx(expected_loss, rel=bound)
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert tiny.relative_error(gradients[key], gradient) < bound, key


# --- values, gradients, training --------------------------------------------------------------------------------------


@variants
@families
def test_values_and_gradients_are_those_of_peft(family, name, checkpoint, float64_transformers):
    ours, theirs = pair(checkpoint(FAMILIES[family]), config(**FIELDS[name]))
    assert tiny.relative_error(ours.logits(TOKENS), reference_logits(theirs, TOKENS)) < 1e-12
    same_gradients(ours, theirs)


class OurMask(torch.nn.Module):
    """Drops what the adapter here drops in its first training pass."""

    def __init__(self, slot, layer):
        super().__init__()
        self.probability, self.seed = layer.dropout, (layer.seed, slot.number, 1, 0)

    def forward(self, x):
        ones = ml.Tensor(np.ones(tuple(x.shape)))
        return x * torch.from_numpy(ml.ops.dropout(ones, probability=self.probability, seed=self.seed).data)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}])
@families
def test_gradients_under_dropout_are_those_of_peft_for_the_same_masks(family, fields, checkpoint, float64_transformers):
    """DoRA too: what is dropped is the input of the whole change, m / n ⊙ V − W, and not that of the base."""
    ours, theirs = pair(checkpoint(FAMILIES[family]), config(dropout=0.4, **fields))
    theirs.train()
    modules = dict(theirs.base_model.model.named_modules())
    for path, slot in ours._adapters.slots("a").items():
        modules[path].lora_dropout["default"] = OurMask(slot, slot.layers["a"])
    same_gradients(ours, theirs)


@variants
@families
def test_twenty_steps_have_the_losses_of_torch(family, name, checkpoint, float64_transformers):
    ours, theirs = pair(checkpoint(FAMILIES[family]), config(**FIELDS[name]), start=True)
    losses, norms = train_here(ours)
    expected, expected_norms = train_there(theirs)
    assert losses == pytest.approx(expected, rel=1e-10)
    assert norms == pytest.approx(expected_norms, rel=1e-9)
    assert losses[-4] < 0.9 * losses[0]
    for key, tensor in ours.adapter_parameters("a").items():
        assert tiny.relative_error(tensor.data, lora_tensors(theirs)[key].detach()) < 1e-8, key


@families
def test_twenty_float32_steps_of_dora_have_the_losses_of_torch(family, checkpoint):
    ours, theirs = pair(checkpoint(FAMILIES[family], "float32"), config(use_dora=True), "float32", start=True)
    assert train_here(ours)[0] == pytest.approx(train_there(theirs)[0], rel=1e-4)


# --- files and merged weights -----------------------------------------------------------------------------------------


@variants
@families
def test_an_adapter_saved_here_has_the_same_logits_in_peft(family, name, checkpoint, tmp_path, float64_transformers):
    path = checkpoint(FAMILIES[family])
    ours, _ = pair(path, config(**FIELDS[name]))
    ours.save_adapter("a", tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference_model(path), tmp_path / "adapter").eval()
    assert tiny.relative_error(reference_logits(theirs, TOKENS), ours.logits(TOKENS)) < 1e-12


@variants
@families
def test_an_adapter_saved_by_peft_has_the_same_logits_here(family, name, checkpoint, tmp_path, float64_transformers):
    path = checkpoint(FAMILIES[family])
    _, theirs = pair(path, config(**FIELDS[name]))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ml.load_model(path)
    ours.load_adapter("a", tmp_path / "adapter")
    assert tiny.relative_error(ours.logits(TOKENS), reference_logits(theirs, TOKENS)) < 1e-12
    if "dora" in name:
        assert ours.adapters["a"].use_dora


@families
def test_merged_dora_weights_are_those_that_peft_merges(family, checkpoint, float64_transformers):
    ours, theirs = pair(checkpoint(FAMILIES[family]), config(use_dora=True))
    ours.merge_adapter("a")
    linears, merged = ours._adapters.linears, dict(theirs.merge_and_unload().named_modules())
    for path in ours._adapters.layers("a"):
        expected = merged[path].weight.detach().numpy()
        expected = expected.T if linears[path].conv1d else expected
        assert tiny.relative_error(linears[path].weight, expected) < 1e-13, path


# --- PiSSA: PEFT computes it in float32 only --------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def pissa(request, checkpoint):
    """The path of a base, and PiSSA from it in PEFT and here."""
    path = checkpoint(FAMILIES[request.param], "float32")
    settings = config(init="pissa", use_rslora=request.param == "gpt2")
    ours = ml.load_model(path)
    ours.add_adapter("a", settings)
    return path, ours, theirs_of(path, settings, "float32")


def move(theirs):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in peft_parameters(theirs).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs.eval()


def test_pissa_starts_from_the_same_product_as_in_peft(pissa):
    path, ours, theirs = pissa
    other = lora_tensors(theirs)
    for name, layer in ours._adapters.layers("a").items():
        A, B = (other[f"base_model.model.{name}.lora_{part}.weight"].detach().numpy() for part in "AB")
        assert tiny.relative_error(layer.lora_B.data @ layer.lora_A.data, B @ A) < 1e-4
    base = reference_logits(reference_model(path, "float32"), TOKENS)
    assert tiny.relative_error(reference_logits(theirs.eval(), TOKENS), base) < 1e-4
    assert tiny.relative_error(ours.logits(TOKENS), base) < 1e-5


def test_twenty_steps_of_pissa_have_the_losses_of_torch(pissa):
    """Singular vectors of the other sign change neither a loss nor a norm, in Adam neither."""
    _, ours, theirs = pissa
    losses, norms = train_here(ours)
    expected, expected_norms = train_there(theirs)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert norms == pytest.approx(expected_norms, rel=2e-2)
    assert losses[-4] < 0.9 * losses[0]


def test_pissa_gradients_are_those_of_peft(pissa):
    _, ours, theirs = pissa
    same_start(ours, theirs)
    same_gradients(ours, theirs, bound=2e-4)


def same_start(ours, theirs):
    """Give the layers here the signs that PEFT's singular vectors have."""
    other = lora_tensors(theirs)
    for name, layer in ours._adapters.layers("a").items():
        sign = np.sign((other[f"base_model.model.{name}.lora_A.weight"].detach().numpy() * layer.start_A).sum(axis=1))
        layer.lora_A.data *= sign[:, None]
        layer.lora_B.data *= sign


def test_pissa_saved_here_fits_the_base_as_it_is_in_peft(pissa, tmp_path):
    path, ours, _ = pissa
    for tensor in ours.adapter_parameters("a").values():
        tensor.data += np.random.default_rng(1).normal(0, 0.1, tensor.shape).astype(np.float32)
    ours.save_adapter("a", tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(reference_model(path, "float32"), tmp_path / "adapter").eval()
    assert tiny.relative_error(reference_logits(theirs, TOKENS), ours.logits(TOKENS)) < 1e-5


def test_pissa_saved_by_peft_as_it_is_has_the_same_logits_here(pissa, tmp_path):
    """Its config says "pissa": PEFT takes the principal part out of the base again when it loads it, and so do we."""
    path, _, theirs = pissa
    expected = reference_logits(move(theirs), TOKENS)
    theirs.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["init_lora_weights"] == "pissa"
    ours = ml.load_model(path)
    ours.load_adapter("a", tmp_path / "adapter")
    assert tiny.relative_error(ours.logits(TOKENS), expected) < 1e-4
    ours.save_adapter("a", tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / CONFIG_FILE).read_text())["init_lora_weights"] is True
    again = peft.PeftModel.from_pretrained(reference_model(path, "float32"), tmp_path / "plain").eval()
    assert tiny.relative_error(reference_logits(again, TOKENS), expected) < 1e-4


def test_pissa_that_peft_converted_to_plain_lora_has_the_same_logits_here(pissa, tmp_path):
    path, ours, theirs = pissa
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it, before the first values are saved
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    expected = reference_logits(move(theirs), TOKENS)
    mine = {key: tensor.detach().numpy().copy() for key, tensor in lora_tensors(theirs).items()}
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = ml.load_model(path)
    plain.load_adapter("a", tmp_path / "plain")
    assert tiny.relative_error(plain.logits(TOKENS), expected) < 1e-4
    for key, tensor in ours.adapter_parameters("a").items():
        tensor.data[...] = mine[key]
    saved, values = ours._adapters.saved("a")
    assert (saved.r, saved.alpha) == (plain.adapters["a"].r, pytest.approx(plain.adapters["a"].alpha))
    assert {key: array.shape for key, array in values.items()} == {
        key: tensor.shape for key, tensor in plain.adapter_parameters("a").items()
    }
    assert tiny.relative_error(ours.logits(TOKENS), expected) < 1e-4


def test_random_directions_of_another_program_are_refused(pissa, tmp_path):
    path, _, theirs = pissa
    theirs.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps(written | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ml.MiniloraError, match=r"is 'pissa_niter_4', .* path_initial_model_for_weight_conversion"):
        ml.load_model(path).load_adapter("a", tmp_path / "adapter")


# --- LoRA+ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_plus_is_peft_s_optimiser(fields, decay, checkpoint, float64_transformers):
    ours, theirs = pair(checkpoint(FAMILIES["llama"]), config(**fields), start=True)
    mine = ours.parameters()
    optimiser = ml.AdamW(mine, lr=2e-3, weight_decay=decay, lr_scale=lora_plus(mine, 8.0))
    reference = importlib.import_module("peft.optimizers").create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=decay
    )
    for step in range(20):
        batch = tiny.labelled(2, 9, seed=step % 3)
        optimiser.zero_grad()
        loss = ours.loss(*batch)
        loss.backward()
        optimiser.step()
        reference.zero_grad()
        expected, _ = torch_gradients(theirs, *batch)
        reference.step()
        assert float(loss) == pytest.approx(expected, rel=1e-10), step
    for key, tensor in mine.items():
        assert tiny.relative_error(tensor.data, lora_tensors(theirs)[key].detach()) < 1e-9, key
