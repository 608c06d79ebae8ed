"""`Tokenizer`: roles of tokens, directories, chat, and text that arrives token by token."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from minilora.errors import MiniloraError
from minilora.formats.tokenizer import Tokenizer, token_ids

SPECIAL = ["<s>", "</s>", "<pad>", "<turn>"]


def byte_backend() -> tokenizers.Tokenizer:
    """Each byte a token, "th" and "the" besides, four special tokens at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "th", "the"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return backend


CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_backend(), CONFIG, "{{ bos_token }}{{ messages[0].content }}", eos_token_ids=[261])


def test_special_tokens_have_their_roles(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, 259, 260)
    assert tokenizer.eos_token_ids == {259, 261}
    assert tokenizer.vocab_size == 262


def test_a_tokenizer_without_roles_has_none():
    bare = Tokenizer(byte_backend(), {})
    assert (bare.bos_token_id, bare.eos_token_id, bare.pad_token_id) == (None, None, None)
    assert bare.eos_token_ids == set()
    assert not bare.has_chat_template


@given(st.text())
def test_every_text_comes_back(text):
    tokenizer = Tokenizer(byte_backend(), CONFIG)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_special_tokens_are_found_in_a_text_and_hidden_on_request(tokenizer):
    ids = tokenizer.encode("the</s>")
    assert ids == [257, 259]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(np.array(ids), skip_special_tokens=False) == "the</s>"


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["list"]])
def test_only_text_is_encoded(tokenizer, text):
    with pytest.raises(MiniloraError, match="expected a text"):
        tokenizer.encode(text)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(MiniloraError, match="half of a surrogate pair"):
        tokenizer.encode(json.loads('"a\\ud800"'))


def test_ignored_labels_are_not_decoded_by_accident(tokenizer):
    with pytest.raises(MiniloraError, match="token id -100, expected at least 0"):
        tokenizer.decode([65, -100])


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([257, 100_000]) == "the"


def test_settings_of_an_earlier_training_are_dropped():
    backend = byte_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert len(Tokenizer(backend, CONFIG).encode("abcdef")) == 6


# ---------------------------------------------------------------- chat


def test_a_chat_is_written_as_the_template_says(tokenizer):
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<s>hi"


def test_without_a_template_a_chat_is_refused():
    with pytest.raises(MiniloraError, match="has no chat template"):
        Tokenizer(byte_backend(), CONFIG).apply_chat_template([{"role": "user", "content": "hi"}])


# ---------------------------------------------------------------- directories


def test_a_saved_tokenizer_is_the_same_when_opened(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    opened = Tokenizer.from_directory(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    text = "the naïve 日本 </s><turn>"
    assert opened.encode(text) == tokenizer.encode(text)
    assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (258, 259, 260)
    assert opened.chat_template == tokenizer.chat_template


def test_a_directory_without_a_tokenizer_gives_none(tmp_path):
    assert Tokenizer.from_directory(tmp_path) is None


def test_what_a_tokenizer_config_says_besides_is_kept(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.from_directory(tmp_path).save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["model_max_length"] == 77


def test_roles_are_read_from_the_special_tokens_map_too(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_directory(tmp_path).eos_token_id == 259


def test_a_template_in_a_file_of_its_own_wins(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_directory(tmp_path).chat_template == "from the file"


def test_of_several_named_templates_the_default_is_used(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"chat_template": named}))
    assert Tokenizer.from_directory(tmp_path).chat_template == "yes"


def test_the_generation_config_s_end_tokens_end_a_generation(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [259, 261]}')
    assert Tokenizer.from_directory(tmp_path).eos_token_ids == {259, 261}


@pytest.mark.parametrize(("value", "ids"), [(None, []), (3, [3]), ([3, 4], [3, 4]), ("3", [])])
def test_end_tokens_are_a_number_a_list_or_null(value, ids):
    assert token_ids(value) == ids


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{", "not a tokenizer that the tokenizers library reads"),
        ("tokenizer.json", b"{}", "not a tokenizer that the tokenizers library reads"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer that the tokenizers library reads"),
        ("tokenizer_config.json", b"[1]", "expected an object"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template is 3, expected a text"),
        ("tokenizer_config.json", b'{"chat_template": [3]}', r"chat_template is \[3\], expected a text"),
        ("generation_config.json", b"\n\n{,}", "line 3: malformed JSON"),
        ("chat_template.jinja", b"\xff", "cannot read"),
    ],
)
def test_a_malformed_file_is_named(tokenizer, tmp_path, file, content, message):
    tokenizer.save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(MiniloraError, match=message) as caught:
        Tokenizer.from_directory(tmp_path)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_names_an_unknown_token_is_refused(tokenizer, tmp_path):
    """The library accepts the file and gives up (a Rust panic) at the first text."""
    tokenizer.save(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    unknown = {"SpecialToken": {"id": "<unknown>", "type_id": 0}}
    file["post_processor"] = {"type": "TemplateProcessing", "single": [unknown], "pair": [], "special_tokens": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(MiniloraError, match=r"tokenizer\.json is not a tokenizer that the tokenizers library reads"):
        Tokenizer.from_directory(tmp_path)


# ---------------------------------------------------------------- streaming


@given(st.text(alphabet=st.sampled_from("the é日🙂\n"), max_size=20))
def test_streamed_text_is_whole_characters_that_add_up(text):
    tokenizer = Tokenizer(byte_backend(), CONFIG)
    stream = tokenizer.stream_decoder()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) == text
    assert stream.flush() == ""


@given(st.lists(st.integers(0, 261), max_size=20))
def test_any_tokens_stream_to_what_they_decode_to(ids):
    """Bytes that never become a character included."""
    tokenizer = Tokenizer(byte_backend(), CONFIG)
    stream = tokenizer.stream_decoder()
    assert "".join(stream.push(token) for token in ids) + stream.flush() == tokenizer.decode(ids)


def test_a_character_comes_with_its_last_byte(tokenizer):
    stream = tokenizer.stream_decoder()
    assert [stream.push(token) for token in tokenizer.encode("é!")] == ["", "é", "!"]


def test_an_incomplete_character_is_given_out_at_the_end(tokenizer):
    stream = tokenizer.stream_decoder()
    assert stream.push(tokenizer.encode("é")[0]) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.flush() == ""


def test_special_tokens_stream_only_on_request(tokenizer):
    ids = tokenizer.encode("a</s>b")
    hidden, shown = tokenizer.stream_decoder(), tokenizer.stream_decoder(skip_special_tokens=False)
    assert [hidden.push(token) for token in ids] == ["a", "", "b"]
    assert [shown.push(token) for token in ids] == ["a", "</s>", "b"]
