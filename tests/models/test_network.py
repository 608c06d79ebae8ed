"""The whole network on tiny models: segments, positions, the KV cache, the loss and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

import minilora as ml
from minilora import ops
from minilora.errors import MiniloraError
from minilora.inputs import IGNORED, segment_positions, shifted_labels
from minilora.models import KVCache
from minilora.models.parts import Context
from minilora.tensor import no_grad, observe
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.model()


# --- attention over the past only -------------------------------------------------------------------------------------


def test_an_earlier_token_reaches_every_later_position(model):
    tokens = tiny.tokens(1, 9)
    changed = tokens.copy()
    changed[0, 0] += 1
    assert (model.logits(tokens) != model.logits(changed)).any(axis=-1).all()


def test_rows_of_a_batch_do_not_see_each_other(model):
    tokens = tiny.tokens(3, 6)
    whole = model.logits(tokens)
    for row in range(3):
        np.testing.assert_allclose(model.logits(tokens[row : row + 1])[0], whole[row], rtol=1e-12, atol=1e-12)


# --- segments ---------------------------------------------------------------------------------------------------------


def test_positions_restart_where_the_segment_changes():
    segments = np.array([[1, 1, 2, 2, 2, 0], [0, 3, 3, 0, 0, 4]])
    assert segment_positions(segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 1, 0]]


def test_a_segment_predicts_within_itself_and_padding_predicts_nothing():
    labels = np.array([[10, 11, 12, 13, 14, 15, 16, 17]])
    segments = np.array([[0, 0, 1, 1, 2, 2, 0, 0]])
    assert shifted_labels(labels, None).tolist() == [[11, 12, 13, 14, 15, 16, 17, IGNORED]]
    assert shifted_labels(labels, segments)[0, [2, 4]].tolist() == [13, 15]
    assert (shifted_labels(labels, segments)[0, [0, 1, 3, 5, 6, 7]] == IGNORED).all()


def test_the_network_sees_the_positions_that_restart(monkeypatch):
    """Rotary angles are relative, so that the logits alone do not tell."""
    network, seen = tiny.model(), []
    embed = network.network.embed
    monkeypatch.setattr(
        network.network, "embed", lambda tokens, positions: seen.append(positions) or embed(tokens, positions)
    )
    network.logits(tiny.tokens(1, 6), np.array([[1, 1, 2, 2, 2, 0]]))
    network.logits(tiny.tokens(1, 6))
    assert [positions.tolist() for positions in seen] == [[[0, 1, 0, 1, 2, 0]], [[0, 1, 2, 3, 4, 5]]]


def test_rotary_tables_reach_as_far_as_the_shape_allows_whatever_the_segments(model):
    """A recorded step reads the table that it was recorded with, also where a later batch has longer segments."""
    lengths = []
    for sizes in ([4] * 6, [24]):
        segments = np.repeat(np.arange(1, len(sizes) + 1), sizes)[None]
        model.network.batch(np.zeros((1, 24), int), segments)
        lengths.append(model.network.rotary.length)
    assert lengths[0] == lengths[1] >= 24


def test_packed_segments_have_the_logits_of_separate_sequences(model):
    lengths = (4, 1, 6)
    sequences = [tiny.tokens(1, length, seed=length) for length in lengths]
    packed = np.concatenate([np.zeros((1, 2), int), *sequences], axis=1)
    segments = np.repeat([0, 5, 2, 9], (2, *lengths))[None]  # the numbers need no order
    logits = model.logits(packed, segments)
    start = 2
    for sequence in sequences:
        stop = start + sequence.size
        np.testing.assert_allclose(logits[:, start:stop], model.logits(sequence), rtol=1e-11, atol=1e-11)
        start = stop


# --- the KV cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(1,) * 10, (4, 1, 1, 3, 1), (10,), (9, 1)])
def test_logits_through_the_cache_are_those_of_one_pass(model, pieces):
    tokens = tiny.tokens(2, 10)
    cache = KVCache(2, capacity=12)
    found, start = [], 0
    with no_grad():
        for piece in pieces:
            found.append(model.network.logits(tokens[:, start : start + piece], cache=cache).data)
            start += piece
            assert cache.length == start
    np.testing.assert_allclose(np.concatenate(found, axis=1), model.logits(tokens), rtol=1e-11, atol=1e-11)


def test_a_truncated_cache_goes_on_from_there(model):
    tokens, other = tiny.tokens(1, 8), tiny.tokens(1, 8, seed=1)
    other[:, :3] = tokens[:, :3]
    cache = KVCache(2, capacity=8)
    with no_grad():
        model.network.logits(tokens, cache=cache)
        cache.truncate(3)
        logits = model.network.logits(other[:, 3:], cache=cache).data
    np.testing.assert_allclose(logits, model.logits(other)[:, 3:], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("more", [1, 2])
def test_a_cache_that_is_full_says_so(model, more):
    """A single position too many would otherwise be broadcast into nothing, and lost without a word."""
    cache = KVCache(2, capacity=5)
    with no_grad():
        model.network.logits(tiny.tokens(1, 5), cache=cache)
        with pytest.raises(ValueError, match=f"holds 5 positions, and {5 + more}"):
            model.network.logits(tiny.tokens(1, more), cache=cache)


def test_the_last_position_alone_has_the_same_logits(model):
    tokens = tiny.tokens(2, 7)
    with no_grad():
        last = model.network.logits(tokens, last=True).data
    np.testing.assert_allclose(last, model.logits(tokens)[:, -1:], rtol=1e-12, atol=1e-12)


# --- the loss ---------------------------------------------------------------------------------------------------------


def written_out(logits, targets):
    """The mean of −ln softmax(logits)[target] over targets that are not ignored, a position at a time."""
    losses = []
    for row, target in zip(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), strict=True):
        if target != IGNORED:
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])
    return np.mean(losses)


@pytest.mark.parametrize("head", ["plain", "adapted"])
def test_the_loss_is_the_cross_entropy_of_the_logits(head):
    network = tiny.adapted(ml.LoraConfig(r=2, target_modules=["lm_head" if head == "adapted" else "q_proj"]))
    tokens, labels = tiny.labelled(3, 8)
    expected = written_out(network.logits(tokens), shifted_labels(labels, None))
    assert float(network.loss(tokens, labels)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("head", ["plain", "adapted"])
def test_the_chunks_of_the_head_change_the_loss_and_gradients_only_in_rounding(head, monkeypatch):
    network = tiny.adapted(ml.LoraConfig(r=2, target_modules=["lm_head" if head == "adapted" else "q_proj", "v_proj"]))
    batch = tiny.labelled(3, 8)
    loss, gradients = tiny.gradients(network, *batch)
    monkeypatch.setattr(ops.loss, "CHUNK_ENTRIES", 3 * tiny.VOCABULARY)
    again, chunked = tiny.gradients(network, *batch)
    assert again == pytest.approx(loss, rel=1e-13)
    for key, gradient in gradients.items():
        assert tiny.relative_error(chunked[key], gradient) < 1e-12, key


@pytest.mark.parametrize("head", ["plain", "adapted"])
def test_logits_of_all_labelled_tokens_are_never_held_at_once(head, monkeypatch):
    monkeypatch.setattr(ops.loss, "CHUNK_ENTRIES", 4 * tiny.VOCABULARY)
    network = tiny.adapted(ml.LoraConfig(r=2, target_modules=["lm_head" if head == "adapted" else "q_proj"]))
    rows = []
    with observe(lambda name, outputs, recorded: rows.extend(array.shape for array in outputs)):
        tiny.gradients(network, tiny.tokens(3, 8))
    assert max((shape[0] for shape in rows if shape and shape[-1] == tiny.VOCABULARY), default=0) <= 4


def test_the_head_runs_on_labelled_positions_only():
    network = tiny.adapted()
    tokens, labels = tiny.labelled(3, 8)
    normed = []
    with observe(lambda name, outputs, recorded: normed.append((name, outputs[0].shape))):
        network.loss(tokens, labels)
    assert [shape for name, shape in normed if name == "rms_norm"][-1] == (network.label_count(tokens, labels), 24)


def test_the_loss_of_float32_weights_is_a_float32_scalar():
    loss = tiny.model("float32").loss(tiny.tokens())
    assert loss.dtype == np.float32
    assert loss.shape == ()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "labels", "message"),
    [
        ([1, 2, 3], None, r"integers of shape \(B, T\), found int64 of shape \(3,\)"),
        ([[1.0, 2.0]], None, "found float64"),
        ([[]], None, "shape"),
        ([[1, 61]], None, "token ids must lie in 0 … 60, found 0 … 61"),
        ([[1, -1]], None, "token ids must lie in 0 … 60"),
        ([[1, 2]], [[1, 99]], "label ids must lie in 0 … 60"),
        ([[1, 2]], [[1, -7]], "label ids must lie in 0 … 60, found -7 … 0"),
        ([[1, 2]], [[1, 2, 3]], r"labels must be integers of the tokens' shape \(1, 2\)"),
        ([[1, 2, 3]], [[5, -100, -100]], "the batch has no label"),  # the first is predicted by nobody
        ([[1] * 65], None, "65 tokens, over the model's context of 64"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(model, tokens, labels, message):
    with pytest.raises(MiniloraError, match=message):
        model.loss(np.array(tokens), None if labels is None else np.array(labels))


@pytest.mark.parametrize("normaliser", [0, -3, float("inf"), {"a": 3}])
def test_a_normaliser_that_is_no_count_is_named(model, normaliser):
    with pytest.raises(MiniloraError, match="normaliser"):
        model.loss(tiny.tokens(), normaliser=normaliser)


def test_a_model_saved_and_loaded_is_the_same_model(tmp_path):
    for tied in (True, False):
        network = tiny.model("float32", tie_word_embeddings=tied)
        network.save(tmp_path / str(tied))
        again = ml.load_model(tmp_path / str(tied))
        assert again.config == network.config
        assert again.tokenizer is None
        assert np.array_equal(again.logits(tiny.tokens()), network.logits(tiny.tokens()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_blocks_under_one_checkpoint_have_the_gradients_of_the_plain_pass(family):
    """A block that runs again may leave its result out where the model says that nobody reads it, and only there."""
    model = ml.new_model(tiny.FAMILIES[family], dtype="float64", std=0.3)
    tiny.add_random_adapter(model, "a")
    network, tokens = model.network, np.random.default_rng(0).integers(3, 50, (2, 7))
    batch = network.batch(tokens)
    x = network.embed(batch.tokens, batch.positions)

    def blocks(x):
        cos, sin = (None, None) if network.rotary is None else network.rotary.at(batch.positions)
        for block in network.blocks:
            x = block(x, Context(cos=cos, sin=sin))
        return x

    def gradients(y):
        (y * y).sum().backward()
        found = {key: parameter.grad for key, parameter in model.parameters().items()}
        for parameter in model.parameters().values():
            parameter.grad = None
        return found

    expected = gradients(blocks(x))
    trained = [parameter for block in network.blocks for parameter in block.trained()]
    for key, gradient in gradients(ml.checkpoint(blocks, x, parameters=trained)).items():
        assert np.array_equal(gradient, expected[key]), key
