"""`minilora generate`: it says what `model.generate` says, from whatever the prompt is read."""

from __future__ import annotations

import json

import numpy as np
import pytest

import minilora as ml
from minilora.generate import end_tokens
from tests import texts


def test_a_text_is_continued(run, base):
    expected = ml.load_model(base).generate("once", 10)
    assert run("generate", "--model", base, "--prompt", "once", "--max-new-tokens", 10) == (0, f"{expected}\n", "")


def test_each_adapter_continues_it_in_turn(run, base, adapter):
    model = ml.load_model(base)
    bare = model.generate("once", 10)
    model.load_adapter("a", adapter)
    expected = model.generate("once", 10)
    assert expected != bare
    arguments = ["generate", "--model", base, "--prompt", "once", "--max-new-tokens", 10, "--adapter", adapter]
    assert run(*arguments) == (0, f"{expected}\n", "")
    status, shown, notes = run(*arguments, "--adapter", adapter)
    assert (status, shown) == (0, f"{expected}\n{expected}\n")
    assert notes == f"--- {adapter}\n" * 2


def test_a_message_is_answered_after_a_system_message(run, base):
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    model = ml.load_model(base)
    arguments = ["generate", "--model", base, "--max-new-tokens", 10, "--chat", "hi"]
    assert run(*arguments)[1] == model.generate(turns[1:], 10) + "\n"
    assert run(*arguments, "--system", "be kind")[1] == model.generate(turns, 10) + "\n"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_conversation_is_read_from_a_file(run, base, tmp_path, wrapped):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
    ]
    file = tmp_path / "messages.json"
    file.write_text(json.dumps({"messages": turns} if wrapped else turns))
    expected = ml.load_model(base).generate(turns, 10)
    assert run("generate", "--model", base, "--messages", file, "--max-new-tokens", 10)[1] == expected + "\n"


@pytest.mark.parametrize(("option", "ending"), [("--prompt", "\n"), ("--chat", "\r\n"), ("--prompt", "")])
def test_a_prompt_is_read_from_stdin_without_its_last_line_break(run, base, option, ending):
    arguments = ["generate", "--model", base, "--max-new-tokens", 10, option]
    assert run(*arguments, "-", input=f" two\nlines {ending}") == run(*arguments, " two\nlines ")


def test_stdin_that_is_not_utf_8_is_an_error(run, base):
    status, _, errors = run("generate", "--model", base, "--prompt", "-", input=b"ab\xff")
    assert (status, errors) == (1, "error: stdin: byte 3 is not UTF-8; expected text in UTF-8\n")


def test_a_seed_gives_the_same_text_again(run, base):
    arguments = ["generate", "--model", base, "--prompt", "once", "--temperature", 1.2, "--top-p", 0.9, "--top-k", 50]
    first, again, other = [run(*arguments, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert first == again != other
    model = ml.load_model(base)
    assert first.rstrip("\n") == model.generate("once", temperature=1.2, top_p=0.9, top_k=50, seed=1).rstrip("\n")


def test_sampling_options_of_a_greedy_run_are_said_to_change_nothing(run, base):
    arguments = ["generate", "--model", base, "--prompt", "once", "--max-new-tokens", 3]
    assert "change nothing" in run(*arguments, "--top-p", 0.9)[2]
    assert "change nothing" not in run(*arguments, "--top-p", 0.9, "--temperature", 1)[2]


def test_a_stop_text_ends_it_besides_the_end_tokens(run, base, monkeypatch):
    asked = {}

    def generate(model, prompt, max_new_tokens, **options):
        asked.update(options)
        return "text"

    monkeypatch.setattr(ml.Model, "generate", generate)
    arguments = ["generate", "--model", base, "--prompt", "once"]
    ends = end_tokens(ml.load_model(base))
    assert ends == [texts.END]
    for more, stop in [
        ([], ends),
        (["--stop", "x", "--stop", "\n\n"], [*ends, "x", "\n\n"]),
        (["--ignore-end"], []),
        (["--ignore-end", "--stop", "x"], ["x"]),
    ]:
        assert run(*arguments, *more)[0] == 0
        assert asked["stop"] == stop


def test_the_text_is_written_as_it_comes(run, base, monkeypatch):
    from minilora.cli import generate

    pieces = []
    monkeypatch.setattr(generate, "write_out", pieces.append)
    run("generate", "--model", base, "--prompt", "once", "--max-new-tokens", 10)
    assert len(pieces) == 11
    assert "".join(pieces) == ml.load_model(base).generate("once", 10) + "\n"


def test_json_has_prompt_and_completions(run, base, adapter):
    status, shown, _ = run(
        "generate", "--model", base, "--chat", "hi", "--adapter", adapter, "--max-new-tokens", 5, "--json"
    )
    model = ml.load_model(base)
    model.load_adapter("a", adapter)
    prompt = [{"role": "user", "content": "hi"}]
    assert status == 0
    assert json.loads(shown) == {
        "model": str(base),
        "prompt": prompt,
        "completions": [{"adapter": str(adapter), "completion": model.generate(prompt, 5)}],
    }


@pytest.mark.parametrize(
    "options",
    [[], ["--prompt", "a", "--chat", "b"], ["--prompt", "a", "--messages", "m"], ["--prompt", "a", "--system", "b"]],
)
def test_exactly_one_prompt_is_expected(run, base, options):
    assert run("generate", "--model", base, *options)[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--max-new-tokens", 300], "over the model's context of 256"),
        (["--prompt", "a" * 200], "200 tokens and max_new_tokens 128 make 328, over the model's context of 256"),
        (["--prompt", "a", "--temperature", "-1"], "error: --temperature is -1.0"),
        (["--prompt", "a", "--top-p", 2], "error: --top-p is 2.0"),
        (["--prompt", "a", "--stop", ""], "error: --stop has ''"),
        (["--prompt", "a", "--device", "tpu"], "device is 'tpu', expected cpu, cuda"),
        (["--prompt", "a", "--dtype", "int8"], "dtype is 'int8', expected one of float64"),
        (["--messages", "absent.json"], "cannot read absent.json: No such file or directory"),
    ],
)
def test_bad_options_are_one_line(run, base, options, message):
    status, shown, errors = run("generate", "--model", base, *options)
    assert (status, shown) == (1, "")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("text", ["[]", "3", '{"text": "x"}', '["hi"]', "[{}", '[{"content": "x"}]'])
def test_a_malformed_conversation_is_one_line(run, base, tmp_path, text):
    file = tmp_path / "messages.json"
    file.write_text(text)
    status, shown, errors = run("generate", "--model", base, "--messages", file)
    assert (status, shown) == (1, "")
    assert errors.count("\n") == 1


@pytest.fixture(scope="module")
def commanding(base, tmp_path_factory):
    """A model that says byte 0 over and over: all its logits are 0."""
    model = ml.load_model(base)
    model.network.lm_head.weight.data = np.zeros_like(model.network.lm_head.weight.data)
    path = tmp_path_factory.mktemp("commanding") / "model"
    model.save(path)
    return path


def test_what_could_command_a_terminal_is_written_out_there_and_raw_elsewhere(run, in_terminal, commanding):
    arguments = ["generate", "--model", commanding, "--prompt", "a", "--max-new-tokens", 3]
    assert in_terminal(*arguments) == (0, "\\x00\\x00\\x00\r\n")
    assert run(*arguments) == (0, "\0\0\0\n", "")
    assert json.loads(run(*arguments, "--json")[1])["completions"][0]["completion"] == "\0\0\0"
