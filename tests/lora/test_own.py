"""What an adapter trains whole (modules_to_save, bias): the copies are its own, and the base stays exactly the base."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.formats.safetensors import open_safetensors
from minilora.ops import CompressedWeight
from minilora.tensor import observe
from tests import tiny

TOKENS = tiny.tokens(2, 7)
PREFIX = "base_model.model."


def config(targets=("c_attn",), **fields):
    return ml.LoraConfig(r=2, alpha=4, target_modules=list(targets), **fields)


LLAMA = config(["q_proj", "up_proj"], modules_to_save=["lm_head", "norm", "layers.0.mlp"])
GPT2 = config(modules_to_save=["wte", "wpe", "ln_f", "h.1.mlp"], bias="all")
EVERYTHING = config(["q_proj"], modules_to_save=["embed_tokens", "lm_head", "mlp", "norm"])


def gpt2(dtype="float64", seed=0):
    return ml.new_model(tiny.gpt2(), seed=seed, dtype=dtype, std=0.3)


def both(**options):
    return [(tiny.model(**options), LLAMA), (gpt2(**options), GPT2)]


def bits(model):
    return {name: ml.to_numpy(p.data).tobytes() for name, p in model.network.named_parameters()}


def train(model, steps=3):
    step = ml.TrainStep(model, ml.AdamW(model.parameters(), lr=1e-2))
    return [float(step(TOKENS)) for _ in range(steps)]


@pytest.mark.parametrize("which", [0, 1])
def test_a_new_adapter_changes_no_bit_of_the_logits(which):
    model, lora = both()[which]
    base = model.logits(TOKENS)
    model.add_adapter("a", lora)
    assert np.array_equal(model.logits(TOKENS), base)


def test_an_adapter_has_just_the_parameters_that_its_configuration_names():
    model = gpt2()
    model.add_adapter("a", config(modules_to_save=["ln_f", "0.mlp"], bias="lora_only", layers_to_transform=[1]))
    own = [key.removeprefix(PREFIX) for key in model.adapter_parameters("a") if ".lora_" not in key]
    assert own == [
        "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias", "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.0.mlp.c_proj.bias", "transformer.h.1.attn.c_attn.base_layer.bias", "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    ]  # fmt: skip
    model.add_adapter("b", config(["mlp.c_fc"], bias="all"))
    biases = {key for key in model.adapter_parameters("b") if key.endswith("bias")}
    assert len(biases) == sum(name.endswith("bias") for name, _ in model.network.named_parameters()) == 2 * 6 + 1
    assert {key for key in biases if ".base_layer." in key} == {
        f"{PREFIX}transformer.h.{layer}.mlp.c_fc.base_layer.bias" for layer in (0, 1)
    }


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_gradients_are_those_of_finite_differences(which, checkpoint):
    model, lora = both()[which]
    model.add_adapter("a", lora)
    random = np.random.default_rng(1)
    for tensor in model.adapter_parameters("a").values():
        tensor.data = tensor.data + random.normal(0, 0.1, tensor.shape)
    model.checkpoint = checkpoint
    reports = ml.gradcheck_model(model, TOKENS, adapter="a", entries=3, directions=2)
    for report in reports.values():
        report.raise_if_wrong()
    checked = sum(report.directions_checked for report in reports.values())
    assert checked == 2 * len(reports)


def test_it_is_saved_in_the_layout_of_checkpoints_and_loaded_again_bit_for_bit(tmp_path):
    """GPT-2's linear weights are (in, out) in files."""
    model, again = gpt2(), gpt2()
    tiny.add_random_adapter(model, "a", config(modules_to_save=["mlp.c_fc", "ln_f"], bias="all"))
    model.save_adapter("a", tmp_path)
    stored = open_safetensors(tmp_path / "adapter_model.safetensors")
    assert stored[f"{PREFIX}transformer.h.0.mlp.c_fc.weight"].shape == (24, 40)
    assert model.adapter_parameters("a")[f"{PREFIX}transformer.h.0.mlp.c_fc.weight"].shape == (40, 24)
    again.load_adapter("b", tmp_path, trainable=False)
    assert np.array_equal(again.logits(TOKENS), model.logits(TOKENS))
    assert again.parameters() == {}
    assert again.adapters["b"] == model.adapters["a"].with_changes(target_modules=["c_attn"], init="kaiming")


@pytest.mark.parametrize("which", [0, 1])
def test_training_changes_no_bit_of_the_base_and_the_bare_base_computes_as_before(which):
    model, lora = both(dtype="float32")[which]
    before, base = bits(model), model.logits(TOKENS)
    model.add_adapter("a", lora)
    start = {key: tensor.data.copy() for key, tensor in model.adapter_parameters("a").items()}
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(not np.array_equal(t.data, start[key]) for key, t in model.adapter_parameters("a").items())
    assert bits(model) == before
    assert not np.array_equal(model.logits(TOKENS), base)
    model.set_adapter(None)
    assert np.array_equal(model.logits(TOKENS), base)
    assert all(parameter.grad is None for _, parameter in model.network.named_parameters())


@pytest.mark.parametrize("which", [0, 1])
def test_generating_goes_through_the_copies_too(which):
    model, lora = both()[which]
    base = model.generate(TOKENS[0], max_new_tokens=12, stop=[])
    tiny.add_random_adapter(model, "a", lora)
    tokens = list(TOKENS[0])
    for _ in range(12):
        tokens.append(int(model.logits([tokens])[0, -1].argmax()))
    found = model.generate(TOKENS[0], max_new_tokens=12, stop=[])
    assert found == tokens[len(TOKENS[0]) :]
    assert found != base


def test_two_adapters_have_copies_of_the_same_parameter_side_by_side():
    model, alone = gpt2(), gpt2()
    model.add_adapter("a", GPT2)
    train(model)
    first = model.logits(TOKENS)
    model.add_adapter("b", GPT2)
    model.set_adapter("b")
    losses = train(model)
    alone.add_adapter("b", GPT2)
    assert losses == train(alone)  # nothing of a's training is in b's
    model.set_adapter("a")
    assert np.array_equal(model.logits(TOKENS), first)
    model.delete_adapter("b")
    assert np.array_equal(model.logits(TOKENS), first)
    model.delete_adapter("a")
    assert np.array_equal(model.logits(TOKENS), gpt2().logits(TOKENS))
    assert not any(module.own for _, module in model.network.named_modules())


def test_switching_copies_nothing_and_touches_no_parameter_of_the_base():
    model = tiny.model()
    model.add_adapter("a", EVERYTHING)
    model.add_adapter("b", config(["q_proj"]))
    tensors = [id(tensor) for _, tensor in model.network.named_parameters()]
    model.set_adapter("a")
    tracemalloc.start()
    begun = time.perf_counter()
    for _ in range(100):
        for which in ("b", None, "a"):
            model.set_adapter(which)
    seconds = (time.perf_counter() - begun) / 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < model.network.lm_head.weight.data.nbytes  # one of the matrices that are trained whole
    assert seconds < 1e-3
    assert [id(tensor) for _, tensor in model.network.named_parameters()] == tensors


def test_backward_through_checkpoints_has_the_parameters_of_its_forward_pass():
    """Also where another adapter is selected before backward runs the blocks again."""
    model, lora = both()[0]
    model.add_adapter("a", lora)
    expected = tiny.gradients(model, TOKENS)[1]
    model.add_adapter("b", config(["q_proj"]))
    tiny.add_random_adapter(model, "c", lora)
    model.checkpoint = True
    model.set_adapter("a")
    for parameter in model.parameters().values():
        parameter.grad = None
    loss = model.loss(TOKENS)
    model.set_adapter("c")
    loss.backward()
    model.set_adapter("a")
    for key, parameter in model.parameters().items():
        assert tiny.relative_error(parameter.grad, expected[key]) < 1e-12, key


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", [["down_proj", "q_proj"], ["q_proj", "v_proj"]])
def test_a_block_that_runs_again_leaves_its_last_product_out(use_dora, targets):
    """Nobody reads a recomputed block's result. DoRA's magnitude has a gradient that reads it: there it is computed."""
    model = tiny.adapted(config(targets, use_dora=use_dora))
    expected = tiny.gradients(model, TOKENS)[1]
    model.checkpoint = True
    for parameter in model.parameters().values():
        parameter.grad = None
    loss, left_out = model.loss(TOKENS), []
    with observe(lambda name, outputs, recorded: left_out.append(not any(outputs[0].strides))):
        loss.backward()
    reads_it = use_dora and "down_proj" in targets
    assert left_out.count(True) == (0 if reads_it else len(model.network.blocks))
    for key, parameter in model.parameters().items():
        assert tiny.relative_error(parameter.grad, expected[key]) < 1e-12, key


def test_a_block_whose_norms_alone_are_trained_is_checkpointed():
    """Nothing below it needs a gradient: only its own Tensors say that there is something to make again."""
    model = tiny.adapted(config(["lm_head"], modules_to_save=["layers.0.input_layernorm"]))
    expected = tiny.gradients(model, TOKENS)[1]
    model.checkpoint = True
    for parameter in model.parameters().values():
        parameter.grad = None
    loss, again = model.loss(TOKENS), []
    with observe(lambda name, outputs, recorded: again.append(name)):
        loss.backward()
    assert again.count("attention") == 2  # in both blocks
    for key, parameter in model.parameters().items():
        assert np.linalg.norm(parameter.grad) > 0
        assert tiny.relative_error(parameter.grad, expected[key]) < 1e-12, key


def test_copies_of_a_half_precision_base_are_trained_in_float32():
    model = tiny.model("bfloat16")
    model.add_adapter("a", EVERYTHING)
    assert {tensor.dtype.name for tensor in model.adapter_parameters("a").values()} == {"float32"}
    losses = train(model)
    assert losses[-1] < losses[0]


def test_unfrozen_parameters_of_the_base_stay_the_base_s():
    model = tiny.model()
    model.unfreeze(["lm_head.weight", "model.norm.weight"])
    model.add_adapter("a", config(["q_proj"], modules_to_save=["lm_head"]))
    found = model.parameters()
    assert {"lm_head.weight", f"{PREFIX}lm_head.weight"} <= found.keys()
    model.loss(TOKENS).backward()
    assert found["lm_head.weight"].grad is None  # the adapter's own is in its place
    assert found[f"{PREFIX}lm_head.weight"].grad is not None
    assert found["model.norm.weight"].grad is not None


def test_a_compressed_weight_is_trained_whole_in_a_dense_copy():
    class Doubled(CompressedWeight):
        """W = 2 · stored."""

        def __init__(self, stored):
            self.stored, self.shape, self.dtype = stored, stored.shape, stored.dtype

        def matmul(self, x):
            return x @ (2 * self.stored).T

        def matmul_t(self, g):
            return g @ (2 * self.stored)

        def dense(self):
            return 2 * self.stored

    model, plain = tiny.model(), tiny.model()
    weight = model.network.model.layers[0].mlp.up_proj.weight
    weight.data = Doubled(weight.data / 2)
    lora = config(["q_proj"], modules_to_save=["up_proj"])
    model.add_adapter("a", lora)
    plain.add_adapter("a", lora)
    assert train(model) == pytest.approx(train(plain), rel=1e-12)
    assert isinstance(weight.data, Doubled)


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("which", [0, 1])
def test_merging_puts_the_copies_into_the_base_and_unmerging_restores_it_bit_for_bit(which, dtype):
    model, lora = both(dtype=dtype)[which]
    before = bits(model)
    tiny.add_random_adapter(model, "a", lora)
    adapted = model.logits(TOKENS)
    for _ in range(3):
        model.merge_adapter("a")
        assert {p.dtype.name for _, p in model.network.named_parameters()} == {dtype}
        tolerance = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.1}[dtype]
        assert tiny.relative_error(model.logits(TOKENS), adapted) < tolerance
        changed = {name for name, data in bits(model).items() if before.get(name) != data}
        assert {key.removeprefix(PREFIX) for key in model.adapter_parameters("a") if ".lora_" not in key} <= {
            name.replace(".c_attn.bias", ".c_attn.base_layer.bias") for name in changed
        }
        model.unmerge_adapter()
        assert bits(model) == before
    model.set_adapter("a")
    assert np.array_equal(model.logits(TOKENS), adapted)


def test_training_after_a_merge_leaves_what_was_merged():
    model, lora = both()[0]
    tiny.add_random_adapter(model, "a", lora)
    model.merge_adapter("a")
    merged = model.logits(TOKENS)
    model.adapter_parameters("a")[f"{PREFIX}lm_head.weight"].data[...] = 0.0
    assert np.array_equal(model.logits(TOKENS), merged)


def test_a_copy_that_is_not_finite_in_the_base_s_dtype_is_not_merged():
    model = tiny.model("float16")
    before = bits(model)
    model.add_adapter("a", config(["q_proj"], modules_to_save=["model.norm"]))
    model.adapter_parameters("a")[f"{PREFIX}model.norm.weight"].data[3] = 1e6
    with pytest.raises(MiniloraError, match=r"non-finite value into model\.norm\.weight .*nothing was merged"):
        model.merge_adapter("a")
    assert bits(model) == before


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            lambda m: m.set_adapter({"a": 0.5}),
            r"'a' has parameters of its own \(lm_head\.weight\), which cannot be wei",
        ),
        (lambda m: m.set_adapter({"a": 1.0, "b": 1.0}), "'a' has parameters of its own"),
        (
            lambda m: m.set_adapter(rows=["b", "a"]),
            "cannot be selected by row: select or merge it alone, with weight 1",
        ),
        (lambda m: m.merge_adapter({"b": 1.0, "a": 1.0}), "cannot be weighted"),
        (lambda m: m.combine_adapters("c", {"a": 1.0, "b": 1.0}), "has parameters of its own"),
        (lambda m: m.add_adapter("c", config(["q_proj"], modules_to_save=["nrm"])), "modules_to_save 'nrm' matches no"),
        (
            lambda m: m.add_adapter("c", config(["lm_head"], modules_to_save=["lm_head"])),
            "less .* modules_to_save is em",
        ),
        (
            lambda m: m.add_adapter("c", config(["q_proj"], modules_to_save="lm_head")),
            "modules_to_save is 'lm_head', exp",
        ),
        (
            lambda m: m.add_adapter("c", config(["q_proj"], modules_to_save=[""])),
            r"modules_to_save is \[''\], expected",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(action, message):
    model = tiny.model()
    tiny.add_random_adapter(model, "b", config(["q_proj"]))
    tiny.add_random_adapter(model, "a", config(["q_proj"], modules_to_save=["lm_head"]))
    before, logits = bits(model), model.logits(TOKENS)
    with pytest.raises(MiniloraError, match=message) as caught:
        action(model)
    assert "\n" not in str(caught.value)
    assert bits(model) == before
    assert set(model.adapters) == {"a", "b"}
    assert np.array_equal(model.logits(TOKENS), logits)


def test_weight_one_is_the_adapter_itself():
    model = tiny.model()
    tiny.add_random_adapter(model, "a", config(["q_proj"], modules_to_save=["lm_head"]))
    adapted = model.logits(TOKENS)
    model.set_adapter({"a": 1})
    assert np.array_equal(model.logits(TOKENS), adapted)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values.pop(f"{PREFIX}lm_head.weight"), "has no tensor .*lm_head.weight"),
        (
            lambda values: values.update({f"{PREFIX}lm_head.weight": np.zeros((3, 3))}),
            r"lm_head.weight has shape \(3, 3",
        ),
        (lambda values: values.update({f"{PREFIX}model.norm.bias": np.zeros(24)}), "1 tensors that fit no layer"),
        (lambda values: values.update({f"{PREFIX}model.norm.weight": np.zeros(24)}), "1 tensors that fit no layer"),
        (
            lambda values: values.update({f"{PREFIX}lm_head.modules_to_save.weight": np.zeros((61, 24))}),
            "first .*lm_head.modules_to_save.weight",  # no repetition of lm_head.weight
        ),
        (
            lambda values: values.update({f"{PREFIX}model.embed_tokens.base_layer.weight": np.zeros((61, 24))}),
            "first .*embed_tokens.base_layer.weight",  # another base's
        ),
    ],
)
def test_a_file_that_does_not_fit_one_to_one_is_refused_by_its_key(spoil, message):
    model = tiny.model()
    model.add_adapter("a", config(["q_proj"], modules_to_save=["lm_head"]))
    lora, values = model._adapters.saved("a")
    values = dict(values)
    spoil(values)
    with pytest.raises(MiniloraError, match=message):
        model._adapters.add("b", lora, values=values)
    assert set(model.adapters) == {"a"}
    assert model.network.lm_head.own.tensors.keys() == {"a"}
