"""Tokenizers rebuilt from GGUF metadata: words split as the named rule says, merges applied, roles kept."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.errors import MiniloraError
from minilora.formats.gguf_tokenizer import tokenizer_from_gguf

PATH = Path("tiny.gguf")


def tokens(metadata, text):
    tokenizer = tokenizer_from_gguf(PATH, metadata)
    return [metadata["tokenizer.ggml.tokens"][number] for number in tokenizer.encode(text)]


DIGITS = ["1 2", "12 3", "123 4", "Ġ 12"]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "1234", ["1234"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1234", ["<s>", "123", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("default", "1234", ["123", "4"]),
        ("gpt-2", "a 12", ["a", "Ġ12"]),
        ("smollm", "a 12", ["a", "Ġ", "1", "2"]),
        ("llama-bpe", "a 12", ["<s>", "a", "Ġ", "12"]),
    ],
)
def test_digits_are_split_as_the_model_s_rule_says(byte_bpe, pre, text, expected):
    assert tokens(byte_bpe(DIGITS, pre), text) == expected


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        # GPT-2 knows contractions in lower case only and never joins a sign with a word or a line break.
        ("gpt-2", "A'LL", ["A", "'", "LL"]),
        ("llama-bpe", "A'LL", ["<s>", "A", "'LL"]),
        ("gpt-2", ".a", [".", "a"]),
        ("llama-bpe", ".a", ["<s>", ".a"]),
        ("gpt-2", ".\n", [".", "Ċ"]),
        ("qwen2", ".\n", [".Ċ"]),
        # The last of several spaces goes to the word behind them.
        ("gpt-2", "  a", ["Ġ", "Ġa"]),
        ("smollm", "   ", ["ĠĠ", "Ġ"]),
    ],
)
def test_words_are_split_as_the_model_s_rule_says(byte_bpe, pre, text, expected):
    merges = ["L L", "' LL", ". a", ". Ċ", "Ġ a", "Ġ Ġ"]
    assert tokens(byte_bpe(merges, pre), text) == expected


def test_qwen_composes_characters_first(byte_bpe):
    decomposed, composed = "e\N{COMBINING ACUTE ACCENT}", "é"
    assert tokens(byte_bpe(["Ã ©"], "qwen2"), decomposed) == tokens(byte_bpe(["Ã ©"], "qwen2"), composed) == ["Ã©"]


def test_llama_3_takes_a_whole_word_that_no_merge_leads_to(byte_bpe):
    assert tokens(byte_bpe([], "llama-bpe", words=("abc",)), "abc") == ["<s>", "abc"]
    assert tokens(byte_bpe([], "gpt-2", words=("abc",)), "abc") == ["a", "b", "c"]


@given(st.text())
def test_every_text_comes_back(byte_bpe, text):
    for pre in ("gpt-2", "smollm", "llama-bpe", "default"):
        tokenizer = tokenizer_from_gguf(PATH, byte_bpe(["t h", "th e"], pre))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_begin_token_is_added_where_the_file_or_its_kind_says_so(byte_bpe):
    def first_and_last(pre, **more):
        encoded = tokens(byte_bpe([], pre, **more), "abc")
        return encoded[0], encoded[-1]

    assert first_and_last("gpt-2") == ("a", "c")
    assert first_and_last("gpt-2", **{"ggml.add_bos_token": True}) == ("<s>", "c")
    assert first_and_last("llama-bpe", **{"ggml.add_bos_token": False}) == ("a", "c")
    assert first_and_last("gpt-2", **{"ggml.add_eos_token": True}) == ("a", "</s>")


def test_control_tokens_are_special_and_user_defined_ones_are_not(byte_bpe):
    metadata = byte_bpe([], words=("<code>",))
    metadata["tokenizer.ggml.token_type"][-1] = 4
    assert tokens(metadata, "a<code></s>") == ["a", "<code>", "</s>"]
    tokenizer = tokenizer_from_gguf(PATH, metadata)
    assert tokenizer.decode(tokenizer.encode("a<code></s>")) == "a<code>"


def test_roles_end_tokens_and_template_come_from_the_metadata(byte_bpe):
    more = {"ggml.padding_token_id": 2, "ggml.eot_token_id": 2, "chat_template": "{{ bos_token }}!"}
    tokenizer = tokenizer_from_gguf(PATH, byte_bpe([], **more))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.eos_token_ids == {1, 2}
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}]) == "<s>!"


def test_a_saved_tokenizer_reads_the_same(byte_bpe, tmp_path):
    from minilora.formats.tokenizer import Tokenizer

    tokenizer = tokenizer_from_gguf(PATH, byte_bpe(["t h"], "llama-bpe"))
    tokenizer.save(tmp_path)
    text = "the 1234 naïve </s>"
    assert Tokenizer.from_directory(tmp_path).encode(text) == tokenizer.encode(text)


# ---------------------------------------------------------------- SentencePiece


def sentencepiece(pieces, prefix=True):
    """Bytes and single characters score lowest; `pieces` score the better the earlier they stand."""
    characters = "▁abcdé"
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = ["<unk>", "<s>", "</s>", *byte_tokens, *pieces, *characters]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(characters))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces) + len(characters))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def merge_by_score(metadata, text):
    """SentencePiece's BPE by its definition: join the neighbours whose union scores best, the leftmost among equals."""
    vocabulary = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(vocabulary, metadata["tokenizer.ggml.scores"], strict=True))
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(scores.get(a + b, -1e9), -at) for at, (a, b) in enumerate(pairwise(symbols))]
        best, place = max(unions, default=(-1e9, 0))
        if best == -1e9:
            break
        symbols[-place : -place + 2] = ["".join(symbols[-place : -place + 2])]
    found = []
    for symbol in symbols:
        found += [symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return found


PIECES = ["ab", "▁a", "abc", "bc", "▁abc", "cd", "abcd", "▁ab", "dé", "cdé"]


@given(st.text(alphabet="abcdé 🙂", min_size=1, max_size=12), st.permutations(PIECES))
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(text, pieces):
    metadata = sentencepiece(pieces)
    assert tokens(metadata, text) == ["<s>", *merge_by_score(metadata, text)]


@given(st.text(alphabet="abcdé 🙂日\n", max_size=12))
def test_sentencepiece_text_comes_back(text):
    tokenizer = tokenizer_from_gguf(PATH, sentencepiece(PIECES))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(alphabet="abcdé 🙂日", max_size=12))
def test_sentencepiece_text_streams_with_its_spaces(text):
    tokenizer = tokenizer_from_gguf(PATH, sentencepiece(PIECES))
    stream = tokenizer.stream_decoder()
    assert "".join(stream.push(token) for token in tokenizer.encode(text)) + stream.flush() == text


def test_no_merge_leads_to_a_control_token():
    metadata = sentencepiece(["<s", "s>"])
    metadata["tokenizer.ggml.tokens"] += ["<", "s", ">"]
    metadata["tokenizer.ggml.scores"] += [-90.0, -91.0, -92.0]
    metadata["tokenizer.ggml.token_type"] += [1, 1, 1]
    metadata["tokenizer.ggml.scores"][1] = 5.0  # <s> would win over every other merge
    backend_merges = tokenizer_from_gguf(PATH, metadata).files()["tokenizer.json"].decode()
    assert '"<",\n        "s"' in backend_merges
    assert '"<s",\n        ">"' not in backend_merges


def test_without_a_space_prefix_none_is_added():
    assert tokens(sentencepiece(PIECES, prefix=False), "abcd") == ["<s>", "abcd"]


# ---------------------------------------------------------------- refused


def test_a_file_without_a_tokenizer_has_none():
    assert tokenizer_from_gguf(PATH, {}) is None
    assert tokenizer_from_gguf(PATH, {"tokenizer.ggml.model": "no_vocab"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ggml.model": "bert"}, 'tokenizer model "bert" is not supported'),
        ({"ggml.pre": "tekken"}, 'pre-tokenizer "tekken" is not supported, expected one of gpt-2, smollm'),
        ({"ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens is missing or no list of texts"),
        ({"ggml.tokens": ["a", "a"]}, "holds a token twice"),
        ({"ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"ggml.merges": ["t"]}, "merge 't' is not of two tokens into a third"),
        ({"ggml.merges": ["t zz"]}, "merge 't zz' is not of two tokens into a third"),
        ({"ggml.token_type": [1]}, "token_type is no list of one number a token"),
        ({"ggml.eos_token_id": 10**6}, "eos_token_id is 1000000, expected one of"),
        ({"ggml.bos_token_id": "<s>"}, "bos_token_id is '<s>', expected one of"),
        ({"ggml.model": "llama"}, "scores is no list of one number a token"),
        ({"chat_template": 3}, "chat_template is no text"),
        ({"ggml.pre": ["smollm"]}, "is not supported, expected one of"),
        ({"ggml.model": ["gpt2"]}, "is not supported"),
    ],
)
def test_malformed_metadata_is_named(byte_bpe, change, message):
    metadata = byte_bpe(["t h"], **change)
    with pytest.raises(MiniloraError, match=message) as caught:
        tokenizer_from_gguf(PATH, metadata)
    assert "tiny.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- SmolLM2


def test_smollm2_writes_a_chat_as_it_was_trained_to_read_it(smollm2):
    from minilora.formats.checkpoint import open_checkpoint

    tokenizer = open_checkpoint(smollm2).tokenizer
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi 42"}])
    assert text.endswith("<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.eos_token_ids == {2}
    digits = tokenizer.encode("42")
    assert [tokenizer.decode([digit]) for digit in digits] == ["4", "2"]
