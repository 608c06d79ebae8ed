"""Batches: every example once, labels and documents kept apart, little padding, and an order that the seed decides."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import IGNORED, Batch, Example, batch_stream, batches
from minilora.errors import MiniloraError

PAD = 7_777


def example(number: int, length: int, labels: int | None = None) -> Example:
    """Tokens that tell the example apart; its last `labels` tokens carry a label, or all of them."""
    tokens = (1_000_000 + number * 1_000 + np.arange(length)).astype(np.int32)
    return Example(
        tokens, np.where(np.arange(length) >= length - (length if labels is None else labels), tokens, IGNORED)
    )


def examples_of(lengths: list[int]) -> list[Example]:
    return [example(number, length) for number, length in enumerate(lengths)]


def documents(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, labels) of every document in the batch, found by the segments, or by the pad id where there are none."""
    found = []
    for row in range(len(batch.tokens)):
        segments = (batch.tokens[row] != PAD) * 1 if batch.segments is None else batch.segments[row]
        for segment in range(1, segments.max() + 1):
            (positions,) = np.nonzero(segments == segment)
            assert (np.diff(positions) == 1).all()
            found.append((batch.tokens[row, positions], batch.labels[row, positions]))
    return found


def realistic(count: int = 2_000, longest: int = 512) -> list[Example]:
    """Lengths as in instruction data: many short, few long."""
    lengths = np.exp(np.random.default_rng(0).normal(4.3, 0.8, count)).astype(int)
    return examples_of(np.clip(lengths, 2, longest).tolist())


some_examples = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=60).map(
    lambda rows: [example(number, length, labels) for number, (length, labels) in enumerate(rows)]
)
some_options = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 5),
        "packing": st.booleans(),
        "max_length": st.integers(40, 90),
        "shuffle": st.booleans(),
        "pad_multiple": st.sampled_from([1, 8, 90]),
    }
)


@given(some_examples, some_options)
def test_every_example_comes_exactly_once_and_whole(examples, options):
    plan = batches(examples, pad_token_id=PAD, **options)
    found = [document for batch in plan for document in documents(batch)]
    assert len(found) == len(examples)
    by_first_token = {tokens[0]: (tokens, labels) for tokens, labels in found}
    for original in examples:
        tokens, labels = by_first_token[original.tokens[0]]
        assert tokens.tolist() == original.tokens.tolist()
        assert labels[0] == IGNORED  # nothing of its own document stands before it
        assert labels[1:].tolist() == original.labels[1:].tolist()


@given(some_examples, some_options)
def test_batches_have_the_promised_shape_padding_and_counts(examples, options):
    plan = batches(examples, pad_token_id=PAD, **options)
    padding = positions = 0
    for number, batch in enumerate(plan):
        assert batch.tokens.dtype == batch.labels.dtype == np.int64
        assert batch.tokens.shape == batch.labels.shape
        rows, width = batch.tokens.shape
        assert rows <= options["batch_size"]
        assert width <= options["max_length"]
        assert width % options["pad_multiple"] == 0 or width == options["max_length"]
        unused = batch.tokens == PAD
        assert (batch.labels[unused] == IGNORED).all()
        assert width - (~unused).sum(axis=1).max() < options["pad_multiple"]
        if options["packing"]:
            assert batch.segments.dtype == np.int64
            assert (unused == (batch.segments == 0)).all()
        else:
            assert batch.segments is None
        assert batch.padding_share == pytest.approx(unused.mean())
        members = [member for row in plan.example_numbers(number) for member in row]
        assert batch.label_count == sum(examples[member].label_count for member in members)
        assert {examples[m].tokens[0] for m in members} == {tokens[0] for tokens, _ in documents(batch)}
        padding, positions = padding + unused.sum(), positions + unused.size
    assert plan.padding_share == pytest.approx(padding / positions)
    assert sum(len(batch.tokens) < options["batch_size"] for batch in plan) <= 1


@given(some_examples, some_options)
def test_packing_never_needs_more_rows_of_a_fixed_length(examples, options):
    options |= {"pad_multiple": options["max_length"]}
    packed = batches(examples, **(options | {"packing": True}))
    plain = batches(examples, **(options | {"packing": False}))
    assert packed.padding_share <= plain.padding_share


def test_packing_fills_rows_nearly_full_and_beats_length_buckets():
    examples = realistic()
    plain, packed = (batches(examples, 8, packing=packing, max_length=512) for packing in (False, True))
    assert packed.padding_share < 0.01 < plain.padding_share


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([3, 7, 4, 6, 2, 8, 5, 5], 4),
        ([9, 1], 1),
        ([6, 5, 4, 3, 2], 2),  # 4 has to go to the 6, not to the 5, where more space is left
        ([10, 10], 2),
    ],
)
def test_packing_fills_rows_exactly_where_that_can_be_done(lengths, rows):
    plan = batches(examples_of(lengths), 1, packing=True, max_length=10)
    assert len(plan) == rows
    assert plan.padding_share == 0


def test_length_buckets_cut_the_padding_of_a_random_order_to_a_fraction():
    examples = realistic()
    lengths = np.array([len(e.tokens) for e in examples])
    random = np.random.default_rng(0).permutation(lengths).reshape(-1, 8)
    share_of_random_order = 1 - lengths.sum() / (random.max(axis=1) * 8).sum()
    assert share_of_random_order > 0.5
    assert batches(examples, 8).padding_share < 0.15 * share_of_random_order


def test_without_shuffling_the_longest_come_first_whatever_the_seed():
    examples = examples_of([5, 9, 1, 7, 3])
    for seed in (0, 1):
        plan = batches(examples, 2, seed=seed, shuffle=False)
        assert [plan.example_numbers(k) for k in range(3)] == [[[1], [3]], [[0], [4]], [[2]]]


def order_of(examples: list[Example], **options) -> list[list[list[int]]]:
    plan = batches(examples, 8, **options)
    return [plan.example_numbers(k) for k in range(len(plan))]


@pytest.mark.parametrize("packing", [False, True])
def test_seed_and_epoch_decide_the_order_and_nothing_else_does(packing):
    examples = realistic(400)
    options = {"packing": packing, "max_length": 512}
    first = order_of(examples, seed=1, epoch=2, **options)
    assert first == order_of(examples, seed=1, epoch=2, **options)
    assert first != order_of(examples, seed=1, epoch=3, **options)
    assert first != order_of(examples, seed=2, epoch=2, **options)
    assert first != order_of(examples, seed=2, epoch=1, **options)


def test_small_data_sets_too_meet_in_other_batches_each_epoch():
    examples = examples_of(list(range(2, 66)))
    together = [{frozenset(row for (row,) in batch) for batch in order_of(examples, epoch=epoch)} for epoch in (0, 1)]
    assert len(together[0] & together[1]) <= 1


def test_the_order_of_batches_does_not_follow_length():
    widths = [batch.tokens.shape[1] for batch in batches(realistic(), 8)]
    assert 0.3 < np.mean(np.diff(widths) < 0) < 0.7


def same(a: Batch, b: Batch) -> bool:
    return a.tokens.tolist() == b.tokens.tolist() and a.labels.tolist() == b.labels.tolist()


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_resumed_anywhere_goes_on_as_the_whole_one_does(packing):
    examples = examples_of([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
    options = {"batch_size": 2, "seed": 3, "packing": packing, "max_length": 10}
    size = len(batches(examples, **options))
    whole = list(islice(batch_stream(examples, **options), 3 * size))
    assert [(epoch, index) for epoch, index, _ in whole] == [(e, k) for e in range(3) for k in range(size)]
    assert all(same(batch, batches(examples, epoch=epoch, **options)[index]) for epoch, index, batch in whole)
    for done, (epoch, index, _) in enumerate(whole, start=1):
        resumed = islice(batch_stream(examples, start=(epoch, index + 1), **options), 3 * size - done)
        for (e, k, batch), (e_again, k_again, again) in zip(whole[done:], resumed, strict=True):
            assert (e, k) == (e_again, k_again)
            assert same(batch, again)


def test_a_stream_passes_its_options_on():
    examples = examples_of([3, 5])
    options = {"packing": True, "max_length": 20, "shuffle": False, "pad_multiple": 6, "pad_token_id": PAD}
    (_, _, batch), _ = islice(batch_stream(examples, 2, **options), 2)
    assert batch.tokens.tolist() == batches(examples, 2, **options)[0].tokens.tolist()
    assert batch.tokens.shape == (1, 12)
    assert (batch.tokens[0, 8:] == PAD).all()
    assert batch.segments[0].tolist() == [1] * 5 + [2] * 3 + [0] * 4


@pytest.mark.parametrize("index", [-1, 7])
def test_a_stream_cannot_start_at_a_batch_that_is_not_there(index):
    with pytest.raises(MiniloraError, match=rf"found batch {index} to start at, but epoch 4 has 6 batches"):
        next(batch_stream(examples_of([2] * 12), 2, start=(4, index)))


def test_any_batch_is_had_by_its_number_as_in_a_list():
    plan = batches(realistic(50), 8)
    everything = list(plan)
    assert len(plan) == len(everything) == 7
    assert all(same(plan[k], everything[k]) for k in (3, 0, 6, -1))
    with pytest.raises(IndexError):
        plan[7]


def test_the_summary_tells_batches_rows_tokens_and_padding():
    examples = examples_of([8, 4, 4, 4])
    assert batches(examples, 2, shuffle=False).summary() == "2 batches, 4 rows, 20 tokens, padding 16.7%"
    packed = batches(examples, 2, packing=True, max_length=8, shuffle=False)
    assert packed.summary() == "2 batches, 3 packed rows, 20 tokens, padding 0.0%"


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "found no examples"),
        ([3, 0], {}, "example 1 has no tokens"),
        ([3, 11], {"max_length": 10}, "example 1 has 11 tokens, more than max_length 10"),
        ([3, 11], {"max_length": 10, "packing": True}, "example 1 has 11 tokens, more than max_length 10"),
        ([3], {"packing": True}, "packing without max_length"),
        ([3], {"batch_size": 0}, "batch_size is 0"),
        ([3], {"pad_multiple": 0}, "pad_multiple is 0"),
        ([3], {"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_put_into_batches_is_refused(lengths, options, message):
    with pytest.raises(MiniloraError, match=message):
        batches(examples_of(lengths), **({"batch_size": 2} | options))
