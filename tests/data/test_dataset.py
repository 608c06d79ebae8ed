"""Loading: files and folders, the account of dropped and truncated rows, the split, and refused arguments."""

import numpy as np
import pytest

from minilora.data import load_data
from minilora.data.dataset import ROWS_AT_ONCE
from minilora.errors import MiniloraError


@pytest.fixture
def tokenizer(word_tokenizer):
    return word_tokenizer()


def texts(tokenizer, examples) -> list[str]:
    return [tokenizer.decode(example.tokens).removesuffix("<end>") for example in examples]


def test_all_rows_of_a_file_are_training_rows_in_order(write, tokenizer):
    data = load_data(write(*({"text": f"row {n}"} for n in range(5))), tokenizer, 100)
    assert texts(tokenizer, data.train) == [f"row {n}" for n in range(5)]
    assert data.valid == data.test == []


def test_no_row_is_lost_where_rows_go_to_the_tokenizer_in_chunks(write, tokenizer):
    rows = 2 * ROWS_AT_ONCE + 1
    data = load_data(write(*({"text": f"{n % 7} rows"} for n in range(rows))), tokenizer, 100)
    assert texts(tokenizer, data.train) == [f"{n % 7} rows" for n in range(rows)]
    assert data.files["train"].rows == rows


def test_a_folder_gives_each_split_its_file_and_an_absent_one_none(write, tokenizer):
    write({"text": "a train"}, name="train.jsonl")
    path = write({"prompt": "a ", "completion": "test"}, name="test.jsonl").parent
    data = load_data(path, tokenizer, 100)
    assert texts(tokenizer, data.train) == ["a train"]
    assert data.valid == []
    assert texts(tokenizer, data.test) == ["a test"]


def test_other_files_in_the_folder_are_named_in_the_summary(write, tokenizer):
    write({"text": "not read"}, name="validation.jsonl")
    path = write({"text": "a train"}, name="train.jsonl").parent
    assert "not read: validation.jsonl" in load_data(path, tokenizer, 100).summary()


def test_rows_without_a_label_are_dropped_and_counted_by_reason(write, tokenizer):
    path = write(
        {"prompt": "short ", "completion": "kept"},
        {"prompt": "a prompt that fills it ", "completion": "lost"},
        {"prompt": "another prompt that does ", "completion": "lost"},
        {"prompt": "short ", "completion": "cut on the right"},
        {"prompt": "", "completion": ""},
        name="train.jsonl",
    )
    data = load_data(path.parent, tokenizer, 4)
    assert texts(tokenizer, data.train) == ["short kept", "short cut "]
    assert data.dropped == {"train": {"with no label within 4 tokens": 2, "with nothing to predict": 1}}
    assert data.files["train"].truncated == 1
    assert data.summary() == (
        "train: 2 rows, 8 tokens, 4 learned; train.jsonl has 5 rows (prompt+completion); 1 truncated to 4 tokens; "
        "3 dropped: 2 with no label within 4 tokens, 1 with nothing to predict"
    )


def test_no_example_is_longer_than_max_length(write, tokenizer):
    data = load_data(write({"text": "one two three"}, {"text": "one"}), tokenizer, 3)
    assert [len(example.tokens) for example in data.train] == [3, 2]
    assert [example.label_count for example in data.train] == [2, 1]


def test_a_row_as_long_as_max_length_is_not_truncated(write, tokenizer):
    data = load_data(write({"text": "one two"}), tokenizer, 4)
    assert texts(tokenizer, data.train) == ["one two"]
    assert data.summary() == "train: 1 rows, 4 tokens, 3 learned; data.jsonl has 1 rows (text)"


def test_mask_prompt_reaches_the_labels(write, tokenizer):
    path = write({"prompt": "one two ", "completion": "three"})
    assert load_data(path, tokenizer, 100).train[0].label_count == 2
    assert load_data(path, tokenizer, 100, mask_prompt=False).train[0].label_count == 5


def test_keys_that_are_not_used_are_named_in_the_summary(write, tokenizer):
    path = write({"text": "a b", "id": 1}, {"text": "a b", "source": "x"})
    assert "keys not used: id, source" in load_data(path, tokenizer, 100).summary()


def test_a_file_whose_rows_are_all_dropped_is_an_error(write, tokenizer):
    path = write({"prompt": "too long for this", "completion": "a"}, {"prompt": "", "completion": ""})
    with pytest.raises(
        MiniloraError, match=r"all 2 rows were dropped: 1 with no label within 4 tokens, 1 with nothing"
    ):
        load_data(path, tokenizer, 4)


@pytest.mark.parametrize("rows", [(), ("", " ")])
def test_a_file_without_rows_is_an_error(write, tokenizer, rows):
    path = write(*rows)
    with pytest.raises(MiniloraError, match=r"data.jsonl: found no rows"):
        load_data(path, tokenizer, 100)


def test_damage_in_any_split_is_an_error_with_its_file(write, tokenizer):
    write({"text": "a b"}, name="train.jsonl")
    path = write({"text": "a b"}, '{"text"', name="valid.jsonl")
    with pytest.raises(MiniloraError, match=r"valid.jsonl, line 2: malformed JSON"):
        load_data(path.parent, tokenizer, 100)


def test_a_missing_path_is_an_error(tmp_path, tokenizer):
    with pytest.raises(MiniloraError, match=r"no such file or folder: .*nowhere.jsonl"):
        load_data(tmp_path / "nowhere.jsonl", tokenizer, 100)


def test_a_folder_without_the_expected_files_is_an_error_that_names_what_is_there(write, tokenizer):
    path = write({"text": "a b"}, name="data.jsonl").parent
    with pytest.raises(MiniloraError, match=r"found data.jsonl; expected train.jsonl"):
        load_data(path, tokenizer, 100)


def test_a_model_without_a_tokenizer_is_an_error(write):
    with pytest.raises(MiniloraError, match="without a tokenizer"):
        load_data(write({"text": "a b"}), None, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, "max_length is 1"),
        ({"valid_fraction": 1.0}, "valid_fraction is 1.0"),
        ({"valid_fraction": -0.1}, "valid_fraction is -0.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_arguments_are_refused(write, tokenizer, arguments, message):
    with pytest.raises(MiniloraError, match=message):
        load_data(write({"text": "a b"}), tokenizer, **({"max_length": 100} | arguments))


@pytest.fixture
def hundred_rows(write):
    return write(*({"text": f"row {n}"} for n in range(100)))


def test_valid_fraction_parts_the_rows_without_loss_or_repetition(hundred_rows, tokenizer):
    data = load_data(hundred_rows, tokenizer, 100, valid_fraction=0.2, seed=1)
    train, valid = texts(tokenizer, data.train), texts(tokenizer, data.valid)
    assert (len(train), len(valid)) == (80, 20)
    assert sorted(train + valid) == sorted(f"row {n}" for n in range(100))
    numbers = [int(text.removeprefix("row ")) for text in valid]
    assert numbers == sorted(numbers)
    assert max(np.diff(numbers)) > 1
    assert "valid: 20 rows, 80 tokens, 60 learned; taken off the training rows" in data.summary()


def test_the_seed_alone_decides_the_split(hundred_rows, tokenizer):
    first, again, other = (
        texts(tokenizer, load_data(hundred_rows, tokenizer, 100, valid_fraction=0.2, seed=seed).valid)
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_both_parts_of_a_split_have_a_row(write, tokenizer, fraction):
    data = load_data(write({"text": "a b"}, {"text": "c d"}), tokenizer, 100, valid_fraction=fraction)
    assert len(data.train) == len(data.valid) == 1


def test_one_row_cannot_be_split(write, tokenizer):
    with pytest.raises(MiniloraError, match="found one usable row"):
        load_data(write({"text": "a b"}), tokenizer, 100, valid_fraction=0.5)


@pytest.mark.parametrize(
    ("names", "fact"),
    [(("train", "valid"), "has a valid.jsonl already"), (("test",), "has no train.jsonl to take it from")],
)
def test_a_folder_that_leaves_nothing_to_split_refuses_valid_fraction(write, tokenizer, names, fact):
    for name in names:
        path = write({"text": "a b"}, {"text": "c d"}, name=f"{name}.jsonl")
    with pytest.raises(MiniloraError, match=fact):
        load_data(path.parent, tokenizer, 100, valid_fraction=0.5)
