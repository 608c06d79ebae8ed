"""K adapters trained at once on one base, against K runs of their own: gradients, whole trainings, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.tensor import observe
from tests import tiny

ROUNDING = 1e-12
NAMES = ("a", "b", "c")
# All different: rank, scale, layers, dropout. "a" has the head, whose loss runs in chunks with dropout of its own.
CONFIGS = {
    "a": ml.LoraConfig(r=2, alpha=4, dropout=0.3, target_modules=["lm_head", "q_proj", "down_proj"]),
    "b": ml.LoraConfig(r=5, alpha=5, dropout=0.0),
    "c": ml.LoraConfig(r=3, alpha=9, use_rslora=True, dropout=0.5, target_modules=["v_proj", "up_proj"]),
}
OPTIMISERS = {
    "a": {"lr": 0.02, "weight_decay": 0.1},
    "b": {"lr": 0.005, "betas": (0.8, 0.99)},
    "c": {"lr": 0.03, "eps": 1e-6},
}
CLIPS = {"a": 0.5, "b": None, "c": 2.0}


def base(names=NAMES, random=True) -> ml.Model:
    """The network with these adapters: the same ones whichever others there are."""
    network = tiny.model()
    for name in names:
        network.add_adapter(name, CONFIGS[name], seed=ord(name))
        for key, tensor in network.adapter_parameters(name).items():
            if random and "lora_B" in key:
                tensor.data[...] = np.random.default_rng(ord(name)).normal(0, 0.3, tensor.shape)
    return network


def micro_batches(step: int) -> list[ml.MicroBatch]:
    """Two micro-batches of a step, of different sizes: adapters with several rows, with none, with no label."""
    random = np.random.default_rng(step)
    found = []
    for number, time in enumerate((7, 5)):
        rows = [[None, *NAMES][k] for k in random.integers(0, 4, 5)]
        if step % 3 == 0:
            rows = ["b" if name == "c" else name for name in rows]  # "c" has no row in this step
        tokens, labels = tiny.labelled(5, time, seed=100 * step + number)
        if step % 3 == 1:
            labels[[name == "a" for name in rows]] = -100  # and here "a" has rows and no label
        found.append(ml.MicroBatch(tokens, labels, None, rows))
    return found


def own_part(batches: list[ml.MicroBatch], name: str) -> list[ml.MicroBatch]:
    """What a run of one adapter alone sees: its rows, where they have a label."""
    found = []
    for tokens, labels, _, rows in batches:
        mine = [row for row, owner in enumerate(rows) if owner == name]
        if (labels[mine, 1:] >= 0).any():
            found.append(ml.MicroBatch(tokens[mine], labels[mine]))
    return found


def arrays(network: ml.Model, name: str) -> dict[str, np.ndarray]:
    return {key: tensor.data.copy() for key, tensor in network.adapter_parameters(name).items()}


STEPS = 12


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_trainings_side_by_side_are_the_trainings_of_each_alone(checkpoint, chunk, monkeypatch):
    """Parameters, moments, step counts, losses, norms after 12 steps: accumulation, clipping, dropout and absences."""
    if chunk is not None:
        monkeypatch.setattr(ml.ops.loss, "CHUNK_ENTRIES", chunk * tiny.VOCABULARY)
    together = base()
    together.checkpoint = checkpoint
    optimisers = {name: ml.AdamW(together.adapter_parameters(name), **OPTIMISERS[name]) for name in NAMES}
    step = ml.TrainStep(together, optimisers, max_grad_norm=CLIPS)
    record: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    for number in range(STEPS):
        losses = step.gradients(micro_batches(number))
        step.update()
        assert set(step.grad_norm) == set(losses)
        for name, loss in losses.items():
            record[name].append((float(loss), float(step.grad_norm[name])))
    for name in NAMES:
        alone = base([name])
        start = arrays(alone, name)
        optimiser = ml.AdamW(alone.adapter_parameters(name), **OPTIMISERS[name])
        own = ml.TrainStep(alone, optimiser, max_grad_norm=CLIPS[name])
        expected = []
        for number in range(STEPS):
            if batches := own_part(micro_batches(number), name):
                loss = own.gradients(batches)
                own.update()
                expected.append((float(loss), float(own.grad_norm)))
        assert 5 < len(expected) < STEPS or name == "b"
        np.testing.assert_allclose(record[name], expected, rtol=ROUNDING)
        assert optimisers[name].steps == optimiser.steps
        assert set(optimiser.steps.values()) == {len(expected)}
        found = arrays(together, name)
        for key, array in arrays(alone, name).items():
            assert tiny.relative_error(array, start[key]) > 1e-3  # it has been trained
            assert tiny.relative_error(found[key], array) < ROUNDING, key
            for mine, theirs in zip(optimisers[name].moments[key], optimiser.moments[key], strict=True):
                assert tiny.relative_error(mine, theirs) < ROUNDING, key


def test_an_adapter_without_a_label_in_a_step_takes_none_whatever_optimises_it():
    """Adam would go on by its momentum on a gradient of zeros."""
    tokens, labels = tiny.labelled(3, 6)
    unlabelled = labels.copy()
    unlabelled[0] = -100
    for single in (True, False):
        network = base()
        network.set_adapter(rows=NAMES)
        parameters = network.parameters() if single else None
        optimiser = ml.AdamW(parameters) if single else {n: ml.AdamW(network.adapter_parameters(n)) for n in NAMES}
        step = ml.TrainStep(network, optimiser)
        step(tokens, labels, rows=NAMES)
        before = {name: arrays(network, name) for name in NAMES}
        step(tokens, unlabelled, rows=NAMES)  # "a" is there without a label
        step(tokens, unlabelled)  # the same rows, which are selected still
        step(tokens[1:], labels[1:], rows=NAMES[1:])  # and here it is not there
        for name in NAMES:
            changed = [not np.array_equal(before[name][k], array) for k, array in arrays(network, name).items()]
            assert all(changed) if name != "a" else not any(changed)


def test_the_frozen_weights_are_passed_once_for_all_adapters():
    """A primitive with W per layer, however many adapters the rows have: 14 layers and the head."""
    counts = []
    for rows in (["b"] * 6, ["a", "b", "c", "a", None, "b"]):
        network = base()
        network.set_adapter(rows=rows)
        calls: list[str] = []
        with observe(lambda name, outputs, recorded, calls=calls: calls.append(name)):
            network.logits(tiny.tokens(6, 5))
        counts.append(sum(name in ("linear", "lora_linear", "lora_rows") for name in calls))
    assert counts == [15, 15]


def test_losses_by_adapter_add_up_to_the_loss_of_the_batch():
    network = base()
    tokens, labels = tiny.labelled(4, 6)
    network.set_adapter(rows=["c", None, "b", "c"])
    losses = {name: float(loss) for name, loss in network.losses(tokens, labels).items()}
    assert set(losses) == {"b", "c"}
    network.training_pass = 0  # the same masks again
    assert float(network.loss(tokens, labels)) == pytest.approx(sum(losses.values()), rel=1e-14)
    network.set_adapter("b")
    alone = network.losses(tokens[2:3], labels[2:3])
    assert float(alone[""]) == pytest.approx(losses["b"], rel=1e-12)


def test_generation_by_rows_right_after_a_training_pass_has_no_dropout():
    network = base()
    network.set_adapter(rows=["a", "c"])
    before = network.logits(tiny.tokens())
    network.loss(tiny.tokens()).backward()
    from minilora.generate import generate_batch

    first = generate_batch(network, list(tiny.tokens()), 6, stop=[])
    assert first == generate_batch(network, list(tiny.tokens()), 6, stop=[])
    assert np.array_equal(network.logits(tiny.tokens()), before)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m, o: ml.TrainStep(m, {}), "found no optimiser"),
        (
            lambda m, o: ml.TrainStep(m, {"a": o["b"], "b": o["a"]}),
            "optimiser of adapter 'a' has .* no parameter of that",
        ),
        (lambda m, o: ml.TrainStep(m, {"d": o["a"]}), "no adapter 'd'"),
        (lambda m, o: ml.TrainStep(m, o, max_grad_norm={"d": 1.0}), "max_grad_norm names 'd'"),
        (lambda m, o: ml.TrainStep(m, o)(tiny.tokens()), r"one adapter for all rows .* expected rows=\[...\]"),
        (lambda m, o: ml.TrainStep(m, {"a": o["a"]})(tiny.tokens(), rows=["a", "b"]), "rows names the adapter 'b'"),
        (lambda m, o: ml.TrainStep(m, o)(tiny.tokens(), rows=["a"]), "names 1 rows, and the batch has 2"),
        (lambda m, o: ml.TrainStep(m, o)(tiny.tokens(), rows=[None, None]), "no label to train on"),
    ],
)
def test_what_does_not_fit_is_named_and_trains_nothing(act, message):
    network = base()
    network.set_adapter("a")
    optimisers = {name: ml.AdamW(network.adapter_parameters(name)) for name in NAMES}
    before = {name: arrays(network, name) for name in NAMES}
    with pytest.raises(MiniloraError, match=message):
        act(network, optimisers)
    for name in NAMES:
        assert all(np.array_equal(before[name][key], array) for key, array in arrays(network, name).items())


def test_micro_batches_have_rows_all_or_none():
    network = base()
    step = ml.TrainStep(network, ml.AdamW(network.adapter_parameters("a")))
    tokens = np.ones((2, 6), int)
    for batches in ([(tokens,), (tokens, None, None, ["a", "b"])], [(tokens, None, None, ["a", "b"]), (tokens,)]):
        with pytest.raises(MiniloraError, match=r"micro-batches with rows and others without, expected rows"):
            step.gradients(batches)


def test_dropout_in_any_micro_batch_keeps_a_step_from_being_recorded(monkeypatch):
    network = tiny.model()
    network.add_adapter("drops", ml.LoraConfig(r=2, dropout=0.5))
    network.add_adapter("plain", ml.LoraConfig(r=2))
    step = ml.TrainStep(network, {name: ml.AdamW(network.adapter_parameters(name)) for name in ("drops", "plain")})
    monkeypatch.setattr(ml.Model, "device", property(lambda self: "cpu, said to be another"))
    recorded = []
    monkeypatch.setattr(step, "_recorded", lambda *_: recorded.append("recorded") or {})
    monkeypatch.setattr(step, "_forward_and_backward", lambda *_: recorded.append("launched") or {})
    monkeypatch.setattr("minilora.inputs.Batch.on", lambda self, device: self)
    tokens = np.ones((1, 6), int)
    for names in (["drops", "plain"], ["plain", "drops"], ["plain", "plain"]):
        step.gradients([(tokens, None, None, [name]) for name in names])
    assert recorded == ["launched", "launched", "recorded"]
