"""Weights that stay in GGUF's blocks: the numbers of the `gguf` package, products of the dense matrix, less memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora import execution, ops
from minilora.backend import to_device
from minilora.errors import MiniloraError
from minilora.formats import gguf_blocks
from minilora.formats.checkpoint import open_checkpoint
from minilora.formats.gguf_blocks import BLOCK, FORMS, BlockWeight, held_in_blocks
from minilora.model import Model
from minilora.models import family_of
from minilora.nn import Weights
from minilora.tensor import Tensor
from tests import texts, tiny

ROOT = Path(__file__).parents[2]
forms = pytest.mark.parametrize("form", FORMS)
seeds = st.integers(0, 2**16)


def random_rows(form: str, out: int, blocks: int, seed: int) -> np.ndarray:
    """Any integers, with scales of either sign and size: (out, bytes of a row)."""
    random, header = np.random.default_rng(seed), FORMS[form].header
    rows = random.integers(0, 256, (out, blocks, FORMS[form].nbytes), np.uint8)
    scales = random.normal(size=(out, blocks, header // 2)) * 10.0 ** random.integers(-4, 2, (out, blocks, 1))
    rows[:, :, :header] = scales.astype(np.float16).view(np.uint8)
    return rows.reshape(out, -1)


def quantised(form: str, array: np.ndarray) -> np.ndarray:
    return gguf.quantize(array, gguf.GGMLQuantizationType[form])


def dequantised(form: str, rows: np.ndarray) -> np.ndarray:
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[form])


def some_weight(form: str, out: int = 70, blocks: int = 3, seed: int = 0, device: str = "cpu"):
    """A BlockWeight and the matrix that it stands for."""
    rows = quantised(form, np.random.default_rng(seed).normal(0, 0.3, (out, BLOCK * blocks)).astype(np.float32))
    return BlockWeight.from_rows(FORMS[form], rows, device), dequantised(form, rows)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of two blocks by 32 rows, so that tiny matrices have many."""
    monkeypatch.setattr(gguf_blocks, "TILE", 2 * BLOCK * 32)
    monkeypatch.setattr(gguf_blocks, "TILE_ON_A_GPU", 2 * BLOCK * 32)


# --- the numbers ------------------------------------------------------------------------------------------------------


@forms
@given(out=st.sampled_from((1, 3, 70)), blocks=st.sampled_from((1, 2, 5)), seed=seeds)
def test_blocks_stand_for_the_values_of_the_gguf_package_bit_for_bit(form, out, blocks, seed, device):
    rows = random_rows(form, out, blocks, seed)
    weight = BlockWeight.from_rows(FORMS[form], rows, device)
    expected = dequantised(form, rows)
    assert weight.shape == expected.shape
    assert np.array_equal(ml.to_numpy(weight.dense()), expected)
    assert np.array_equal(ml.to_numpy(weight.rows()), rows)
    assert weight.nbytes == rows.nbytes


@forms
@given(out=st.sampled_from((1, 3, 70)), seed=seeds, spread=st.sampled_from((0.0, 1e-3, 1.0, 100.0)))
def test_a_matrix_becomes_the_blocks_of_the_gguf_package_bit_for_bit(form, out, seed, spread, device):
    """Rows of zeros, of one value and of one sign among them."""
    random = np.random.default_rng(seed)
    matrix = (random.normal(0, 1, (out, 4 * BLOCK)) * spread + random.integers(-1, 2)).astype(np.float32)
    matrix[0, :BLOCK] = 0
    matrix[-1, BLOCK : 2 * BLOCK] = -0.75
    weight, _ = some_weight(form, out, 4, device=device)
    found = weight.recoded(to_device(matrix, device))
    assert np.array_equal(ml.to_numpy(found.rows()), quantised(form, matrix))
    assert found.form is weight.form


@forms
@pytest.mark.usefixtures("small_tiles")
@given(seed=seeds, count=st.sampled_from((1, 2, 9)), wide=st.sampled_from(("float32", "float64")))
def test_products_and_rows_are_those_of_the_dense_matrix(form, seed, count, wide, device):
    weight, dense = some_weight(form, seed=seed, device=device)
    random, precision = np.random.default_rng(seed), {"float32": 1e-6, "float64": 1e-14}[wide]
    x, g = (random.normal(size=(count, width)).astype(wide) for width in (dense.shape[1], dense.shape[0]))
    y, dx = weight.matmul(to_device(x, device)), weight.matmul_t(to_device(g, device))
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    assert tiny.relative_error(y, x @ dense.T.astype(wide)) < precision
    assert tiny.relative_error(dx, g @ dense.astype(wide)) < precision
    index = random.integers(0, len(dense), (2, 3))
    assert np.array_equal(ml.to_numpy(weight[to_device(index, device)]), dense[index])
    assert np.array_equal(ml.to_numpy(weight[5:40]), dense[5:40])


@forms
@pytest.mark.usefixtures("small_tiles")
def test_gradients_of_lora_over_blocks_are_those_of_finite_differences(form, device):
    """x, A and B through a layer, a table and a head that are all held in blocks; in float64."""
    width = 3 * BLOCK
    layer, _ = some_weight(form, width, 3, 1, device)
    table, _ = some_weight(form, 70, 3, 2, device)
    random = np.random.default_rng(0)
    tokens = to_device(np.array([3, 1, 69, 1]), device)
    labels, weights = to_device(np.array([0, 69, 5, 7]), device), to_device(random.uniform(0.1, 1, 4), device)
    x, A, B = (to_device(random.normal(0, 0.2, shape), device) for shape in ((4, width), (2, width), (width, 2)))

    def loss(x, A, B):
        h = x + ops.embedding(table, tokens=tokens, dtype=np.dtype("float64"))
        h = ops.lora_linear(h, layer, None, A, B, scale=0.5)
        h = ops.linear(h, layer)
        return ops.linear_cross_entropy(h, table, labels=labels, weights=weights)

    ml.gradcheck(loss, [x, A, B])


@forms
def test_a_product_never_makes_the_whole_matrix(form, monkeypatch):
    """Forward and backward of a LoRA layer with two tokens, on a matrix of 16 MiB in float32: tiles of one at most.

    On one thread: each holds a tile of its own.
    """
    monkeypatch.setattr(execution, "cpu_runner", execution.cpu_runner[:1])
    weight, _ = some_weight(form, 4096, 32)
    x, A, B = (Tensor(np.ones(shape, np.float32), requires_grad=True) for shape in ((2, 1024), (2, 1024), (4096, 2)))
    tracemalloc.start()
    try:
        ops.lora_linear(x, Tensor(weight), None, A, B, scale=1.0).backward(np.ones((2, 4096), np.float32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert x.grad is not None
    assert weight.nbytes < 16 << 18 or form == "Q8_0"
    assert peak < (16 << 20) / 2


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=FORMS)
def path(request, write_gguf) -> Path:
    """A tiny Llama with grouped queries, its matrices in blocks of one type."""
    return write_gguf(request.param)


TOKENS = np.random.default_rng(0).integers(0, 300, (2, 9))


def blocks_of(model: ml.Model) -> dict[str, BlockWeight]:
    return {name: p.data for name, p in model.network.named_parameters() if isinstance(p.data, BlockWeight)}


def with_adapter(model: ml.Model, **options) -> ml.Model:
    tiny.add_random_adapter(model, "a", ml.LoraConfig(r=3, alpha=3, **options))
    return model


def test_a_model_in_blocks_computes_what_its_dequantised_copy_does(path):
    """So rows of q and k, which llama.cpp permutes, were put back as blocks."""
    stored, dense = ml.load_model(path, dtype="stored"), ml.load_model(path)
    held = blocks_of(stored)
    assert len(held) == 2 * 7 + 1
    for name, parameter in dense.network.named_parameters():
        if name in held:
            assert np.array_equal(held[name].dense(), parameter.data)
    assert stored.dtype == np.float32
    assert stored.device == "cpu"
    assert tiny.relative_error(stored.logits(TOKENS), dense.logits(TOKENS)) < 1e-5
    assert stored.generate(list(TOKENS[0]), 12, stop=[]) == dense.generate(list(TOKENS[0]), 12, stop=[])


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.3}, {"use_dora": True}, {"target_modules": ["lm_head", "q_proj"]}]
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_training_on_blocks_has_the_gradients_of_training_on_the_dequantised_base(path, options, checkpoint):
    found = []
    for dtype in ("stored", "float32"):
        model = with_adapter(ml.load_model(path, dtype=dtype), **options)
        model.checkpoint = checkpoint
        found.append(tiny.gradients(model, TOKENS))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for key, gradient in found[1][1].items():
        assert tiny.relative_error(found[0][1][key], gradient) < 2e-3, key  # in float32, through steep softmaxes


def test_finite_differences_agree_on_a_model_in_blocks(path):
    checkpoint = open_checkpoint(path)
    family = family_of(checkpoint.config)

    def source(name, shape):
        entry = checkpoint.tensors[name]
        held = held_in_blocks(entry, "cpu")
        return entry.array().astype(np.float64) if held is None else held

    network = family.network(family.read_config(checkpoint.config), Weights(source), np.dtype("float64"))
    model = with_adapter(Model(network, None))
    assert len(blocks_of(model)) == 15
    parameters = model.adapter_parameters("a")
    reports = ml.gradcheck_parameters(
        lambda: model.loss(TOKENS), parameters, groups={"all": list(parameters)}, directions=2, seed=0
    )
    reports["all"].raise_if_wrong()
    assert reports["all"].directions_checked == 2


def test_a_training_run_on_blocks_lowers_the_loss_and_changes_no_byte_of_them(path):
    model = ml.load_model(path, dtype="stored")
    before = {name: weight.rows().tobytes() for name, weight in blocks_of(model).items()}
    model.add_adapter("a", ml.LoraConfig(r=4))
    step = ml.TrainStep(model, ml.AdamW(model.parameters(), lr=0.02))
    losses = [float(step(TOKENS)) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    assert {name: weight.rows().tobytes() for name, weight in blocks_of(model).items()} == before


def test_gpt2_keeps_its_blocks_through_the_transpose(tmp_path):
    config = tiny.gpt2(vocab_size=texts.MERGED, n_embd=64, n_inner=96, n_head=4)
    model = ml.new_model(config, dtype="float32", std=0.3)
    model.tokenizer = texts.merging_tokenizer()
    model.save_gguf(tmp_path / "gpt2.gguf", "q8_0")
    stored, dense = (ml.load_model(tmp_path / "gpt2.gguf", dtype=dtype) for dtype in ("stored", None))
    assert blocks_of(stored)["transformer.h.0.attn.c_attn.weight"].shape == (192, 64)
    tokens = tiny.tokens()
    assert tiny.relative_error(stored.logits(tokens), dense.logits(tokens)) < 1e-5
    stored.save(tmp_path / "saved")
    assert tiny.relative_error(ml.load_model(tmp_path / "saved").logits(tokens), dense.logits(tokens)) < 1e-5


def test_blocks_of_another_type_are_decoded_and_that_is_said(write_gguf):
    path = write_gguf("Q5_0")
    with pytest.warns(UserWarning, match="Q5_0 tensors, which are decoded to float32"):
        stored = ml.load_model(path, dtype="stored")
    assert blocks_of(stored) == {}
    assert np.array_equal(stored.logits(TOKENS), ml.load_model(path).logits(TOKENS))


def test_stored_is_what_a_directory_has_anyway(tmp_path):
    tiny.model("bfloat16").save(tmp_path)
    model = ml.load_model(tmp_path, dtype="stored")
    assert {p.dtype.name for _, p in model.network.named_parameters()} == {"bfloat16"}


def test_a_model_in_blocks_that_cannot_move_is_left_whole(path, monkeypatch):
    model = ml.load_model(path, dtype="stored")
    embedding = model.network.model.embed_tokens.weight
    embedding.data = embedding.data.dense()  # comes before the first matrix in blocks
    moved = []
    monkeypatch.setattr("minilora.model.to_device", lambda array, device: moved.append(array) or array)
    with pytest.raises(MiniloraError, match="stays on the device that it was loaded to"):
        model.to("cpu")
    assert moved == []


def test_blocks_are_not_trained(path):
    with pytest.raises(MiniloraError, match=r"q_proj.weight is stored compressed and cannot be trained"):
        ml.load_model(path, dtype="stored").unfreeze(["q_proj.weight"])


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merging_into_blocks_needs_a_choice_and_changes_nothing_without_one(path):
    model = with_adapter(ml.load_model(path, dtype="stored"))
    before, logits = blocks_of(model), model.logits(TOKENS)
    with pytest.raises(MiniloraError, match=r'q_proj.weight is quantised \(Q.*quantised="dequantise".*"requantise"'):
        model.merge_adapter("a")
    with pytest.raises(MiniloraError, match="quantised is 'round', expected 'dequantise' or 'requantise'"):
        model.merge_adapter("a", quantised="round")
    assert blocks_of(model) == before
    assert model.active_adapters == {"a": 1.0}
    assert np.array_equal(model.logits(TOKENS), logits)


def test_dequantising_merges_exactly_into_the_adapted_layers_alone(path):
    stored = with_adapter(ml.load_model(path, dtype="stored"), target_modules=["q_proj", "up_proj"])
    dense = with_adapter(ml.load_model(path), target_modules=["q_proj", "up_proj"])
    before = blocks_of(stored)
    assert stored.merge_adapter("a", quantised="dequantise") == {}
    assert dense.merge_adapter("a") == {}
    expected = dict(dense.network.named_parameters())
    for name, parameter in stored.network.named_parameters():
        if "q_proj" in name or "up_proj" in name:
            assert np.array_equal(parameter.data, expected[name].data)
        elif name in before:
            assert parameter.data is before[name]
    stored.unmerge_adapter()
    assert blocks_of(stored) == before  # the same objects


def test_requantising_keeps_the_form_and_reports_what_it_lost(path):
    model, dense = (with_adapter(ml.load_model(path, dtype=dtype)) for dtype in ("stored", None))
    before, adapted = blocks_of(model), model.logits(TOKENS)
    bases = {name: p.data.copy() for name, p in dense.network.named_parameters()}
    lost = model.merge_adapter("a", quantised="requantise")
    dense.merge_adapter("a")
    exact, after = dict(dense.network.named_parameters()), blocks_of(model)
    assert list(lost) == [name for name in before if "proj" in name]
    for name, (error, update) in lost.items():
        wanted, base = exact[name].data, bases[name]
        assert after[name].form is before[name].form
        found = after[name].dense()
        assert error == pytest.approx(np.linalg.norm(found - wanted) / np.linalg.norm(wanted), rel=1e-4)
        assert update == pytest.approx(np.linalg.norm(wanted - base) / np.linalg.norm(wanted), rel=1e-4)
        assert 0 < error < (0.01 if after[name].form.bits == 8 else 0.15)
        assert update > 0.1
    assert tiny.relative_error(model.logits(TOKENS), adapted) < (0.1 if after[name].form.bits == 8 else 1.0)
    model.unmerge_adapter()
    assert blocks_of(model) == before


@pytest.mark.parametrize("value", [1e9, np.inf])
def test_a_scale_beyond_float16_is_refused_before_anything_is_replaced(path, value):
    model = with_adapter(ml.load_model(path, dtype="stored"))
    before = blocks_of(model)
    model.adapter_parameters("a")["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].data[0, 0] = value
    with pytest.raises(MiniloraError, match=r"non-finite value into model.layers.1.mlp.down_proj.weight \(Q"):
        model.merge_adapter("a", quantised="requantise")
    assert blocks_of(model) == before


def test_a_directory_of_a_requantised_model_holds_the_values_of_its_blocks(path, tmp_path):
    model = with_adapter(ml.load_model(path, dtype="stored"), target_modules=["lm_head", "v_proj"])
    model.merge_adapter("a", quantised="requantise")
    assert not model.network.head_is_tied
    logits = model.logits(TOKENS)
    model.save(tmp_path / "saved")
    again = ml.load_model(tmp_path / "saved")
    assert {p.dtype.name for _, p in again.network.named_parameters()} == {"float32"}
    assert tiny.relative_error(again.logits(TOKENS), logits) < 1e-5


# --- a real model -----------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
import numpy as np
import minilora as ml
from minilora.memory import memory_bytes
before = memory_bytes()
model = ml.load_model("smollm2", dtype=sys.argv[1])
model.add_adapter("a", ml.LoraConfig(r=8))
loaded = memory_bytes() - before
loss = model.loss(np.arange(64).reshape(2, 32) * 700)
loss.backward()
norms = {k: float(np.linalg.norm(t.grad)) for k, t in model.adapter_parameters("a").items() if "lora_B" in k}
print(json.dumps({"loaded": loaded, "trained": memory_bytes() - before, "loss": float(loss), "norms": norms}))
"""


@pytest.mark.slow
def test_smollm2_in_its_file_s_blocks_takes_a_fraction_of_the_memory_and_trains_alike(smollm2):
    """Two processes, each with one model: its share of memory after loading, and after forward and backward."""
    found = {}
    for dtype in ("float32", "stored"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, dtype], cwd=ROOT, capture_output=True, text=True, timeout=110, check=True
        )
        found[dtype] = json.loads(done.stdout)
    dense, stored = found["float32"], found["stored"]
    assert stored["loss"] == pytest.approx(dense["loss"], rel=1e-5)
    for key, norm in dense["norms"].items():
        assert stored["norms"][key] == pytest.approx(norm, rel=1e-3), key
    assert dense["loaded"] > 4 * 134e6
    assert stored["loaded"] < 0.45 * dense["loaded"]
    assert stored["trained"] < 0.6 * dense["trained"]
