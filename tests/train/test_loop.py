"""The loop takes the steps that one would write by hand, on every row, and measures what it says."""

import json
import math

import numpy as np
import pytest

import minilora as ml
from minilora.data import batches
from minilora.errors import MiniloraError
from minilora.train import evaluate, loop
from tests import tiny
from tests.train import made


def test_training_takes_the_steps_of_a_loop_written_by_hand():
    rows = made.examples(24)
    trained, by_hand = made.model(dropout=0.1), made.model(dropout=0.1)
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    result = made.train(trained, rows, steps=8, schedule="linear", warmup=2, max_grad_norm=0.3, seed=7, **options)

    optimiser = ml.AdamW(by_hand.parameters(), lr=1e-2, **options)
    step = ml.TrainStep(by_hand, optimiser, max_grad_norm=0.3)
    factor = ml.schedule("linear", 8, 2)
    plans = [batch for epoch in (0, 1) for batch in batches(rows, 4, seed=7, epoch=epoch)]
    losses = []
    for number, batch in enumerate(plans[:8]):
        optimiser.lr = 1e-2 * factor(number)
        losses.append(float(step(batch.tokens, batch.labels)))
    assert [record["loss"] for record in result.history if "loss" in record] == losses
    made.assert_same(made.values(trained), made.values(by_hand))


def test_accumulated_batches_weigh_every_label_token_the_same():
    rows = made.examples(8)
    network = made.model("float64")
    result = made.train(network, rows, steps=1, batch_size=2, accumulate=4, max_grad_norm=None)

    one_batch = made.model("float64")
    (batch,) = batches(rows, 8)
    loss = one_batch.loss(batch.tokens, batch.labels)
    loss.backward()
    norm = float(ml.optim.global_norm(one_batch.parameters()))
    assert result.loss == pytest.approx(float(loss), rel=1e-12)
    assert result.history[-1]["grad_norm"] == pytest.approx(norm, rel=1e-9)
    means = [float(made.model("float64").loss(part.tokens, part.labels)) for part in batches(rows, 2)]
    assert abs(np.mean(means) / float(loss) - 1) > 1e-4  # a mean of means is something else


def test_every_row_comes_once_per_epoch_and_a_step_stays_within_one(monkeypatch):
    rows = made.examples(22)
    seen = []
    gradients = ml.TrainStep.gradients

    def spy(step, parts):
        seen.append([row[row > 0].tolist() for part in parts for row in part.tokens])
        return gradients(step, parts)

    monkeypatch.setattr(ml.TrainStep, "gradients", spy)
    result = made.train(made.model(), rows, steps=None, epochs=2, batch_size=4, accumulate=4)
    assert (result.steps, result.epochs, len(seen)) == (4, 2.0, 4)  # 6 batches an epoch: 4, then 2
    expected = sorted(row.tokens.tolist() for row in rows)
    for epoch in (seen[:2], seen[2:]):
        assert sorted(row for step in epoch for row in step) == expected
    assert [record["epoch"] for record in result.history if "loss" in record] == pytest.approx(
        [4 / 6, 1, 10 / 6, 2], abs=1e-5
    )
    assert result.tokens == 2 * sum(len(row.tokens) for row in rows)


def test_training_learns_and_leaves_the_base_bit_for_bit():
    network = made.model()
    base = {name: np.array(tensor.data) for name, tensor in network.network.named_parameters()}
    result = made.train(network, made.examples(64), steps=40, batch_size=8, lr=2e-2)
    losses = [record["loss"] for record in result.history if "loss" in record]
    assert losses[-1] < 0.75 * losses[0]
    assert losses[0] == pytest.approx(math.log(tiny.VOCABULARY), rel=0.1)
    made.assert_same({name: tensor.data for name, tensor in network.network.named_parameters()}, base)


def test_packing_trains_on_the_same_tokens_in_fewer_rows():
    rows = made.examples(24)
    apart, packed = made.model("float64"), made.model("float64")
    loss = made.train(apart, rows, steps=1, batch_size=24).loss
    result = made.train(packed, rows, steps=1, batch_size=24, packing=True, max_length=40)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert result.tokens == sum(len(row.tokens) for row in rows)


def test_checkpointing_changes_no_number_and_is_put_back():
    plain, recomputed = made.model(), made.model()
    made.train(plain)
    made.train(recomputed, checkpoint=True)
    made.assert_same(made.values(recomputed), made.values(plain))
    assert not recomputed.checkpoint


def test_the_validation_loss_weighs_tokens_not_batches():
    network = made.model("float64")
    rows = made.examples(11, seed=3)
    (whole,) = batches(rows, 11)
    exact = float(network.loss(whole.tokens, whole.labels))
    assert evaluate(network, rows, batch_size=3) == pytest.approx(exact, rel=1e-12)
    assert evaluate(network, rows, batch_size=3, packing=True, max_length=40) == pytest.approx(exact, rel=1e-12)
    means = [float(network.loss(part.tokens, part.labels)) for part in batches(rows, 3, shuffle=False)]
    assert abs(np.mean(means) / exact - 1) > 1e-4


def test_validation_measures_without_dropout_and_leaves_training_as_it_was():
    rows = made.examples(24)
    with_validation, without = made.model(dropout=0.3), made.model(dropout=0.3)
    result = made.train(with_validation, rows, eval_every=2, call={"valid": rows})
    made.train(without, rows)
    made.assert_same(made.values(with_validation), made.values(without))
    assert result.validation_loss == evaluate(with_validation, rows, 4)


def test_validation_comes_before_the_first_step_every_so_many_and_at_the_end():
    rows = made.examples(24)
    result = made.train(made.model(), rows, steps=5, eval_every=2, call={"valid": made.examples(6, seed=1)})
    assert [record["step"] for record in result.history if "validation_loss" in record] == [0, 2, 4, 5]
    result = made.train(made.model(), rows, steps=5, call={"valid": made.examples(6, seed=1)})
    assert [record["step"] for record in result.history if "validation_loss" in record] == [5]


def test_the_adapter_with_the_lowest_validation_loss_is_kept(monkeypatch, tmp_path):
    measured = iter([9.0, 3.0, 1.0, 2.0])  # before the first step, then after each
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: next(measured))
    network, at_step = made.model(), {}
    monkeypatch.setattr(
        loop.Folder, "record", lambda folder, metrics: at_step.update({metrics["step"]: made.values(network)})
    )
    result = made.train(network, steps=3, eval_every=1, out=tmp_path / "run", call={"valid": made.examples(4, seed=1)})
    assert (result.best_step, result.best_validation_loss, result.validation_loss) == (2, 1.0, 2.0)
    for step, folder in ((2, result.paths["best"]), (3, result.paths["adapter"])):
        loaded = made.model()
        loaded.load_adapter("b", folder)
        made.assert_same(made.values(loaded), at_step[step])


def test_a_loaded_adapter_goes_on_from_its_values_and_without_the_check_of_new_ones(tmp_path, capsys):
    first = made.model()
    made.train(first, steps=3)
    first.save_adapter("a", tmp_path / "first")
    second = made.model()
    second.delete_adapter("a")
    second.load_adapter("mine", tmp_path / "first")
    before = made.values(second)
    made.train(second, steps=2, out=tmp_path / "second")
    loaded = made.model()
    loaded.load_adapter("again", tmp_path / "second")
    made.assert_same(made.values(loaded), made.values(second))
    assert all((before[name] != value).any() for name, value in made.values(second).items())
    assert capsys.readouterr().err == ""


def test_unfrozen_base_parameters_are_trained_and_saved_as_a_model(tmp_path):
    network = ml.new_model(tiny.llama(), seed=0, std=0.1)
    names = network.unfreeze(["down_proj.weight", "norm.weight"])
    result = made.train(network, steps=6, save_every=3, out=tmp_path / "run")
    assert "adapter" not in result.paths
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    loaded = ml.load_model(result.paths["model"])
    np.testing.assert_array_equal(loaded.logits(tiny.tokens()), network.logits(tiny.tokens()))
    fresh = dict(ml.new_model(tiny.llama(), seed=0, std=0.1).network.named_parameters())
    changed = {name for name, tensor in network.network.named_parameters() if (tensor.data != fresh[name].data).any()}
    assert changed == set(names)


def test_nothing_to_train_and_several_adapters_to_save_are_errors(tmp_path):
    network = made.model()
    network.set_adapter(None)
    with pytest.raises(MiniloraError, match="no trained parameter"):
        made.train(network)
    network.add_adapter("b")
    network.set_adapter({"a": 0.5, "b": 0.5})
    with pytest.raises(MiniloraError, match=r"2 adapters are selected \(a, b\)"):
        made.train(network, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert made.train(network).steps == 5  # in memory their sum can be trained


def test_a_record_of_every_step_is_on_the_disk(tmp_path):
    result = made.train(
        made.model(), steps=4, warmup=1, schedule="constant", eval_every=4, out=tmp_path / "run",
        call={"valid": made.examples(4, seed=1)},
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records == result.history
    keys = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory"}
    assert [set(record) - keys for record in records] == [{"validation_loss"}, set(), set(), set(), {"validation_loss"}]
    assert [record["lr"] for record in records[1:]] == [5e-3, 1e-2, 1e-2, 1e-2]
    assert all(set(record) >= keys for record in records[1:])
    assert records[-1]["tokens"] == result.tokens
