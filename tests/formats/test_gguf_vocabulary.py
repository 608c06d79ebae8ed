"""Tokenizers as GGUF metadata: the same tokens after the way there and back, or a refusal that says why."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from minilora.errors import MiniloraError
from minilora.formats.checkpoint import open_checkpoint
from minilora.formats.gguf_file import open_gguf
from minilora.formats.gguf_tokenizer import WORDS, tokenizer_from_gguf
from minilora.formats.gguf_vocabulary import PROBES, tokenizer_metadata
from minilora.formats.tokenizer import Tokenizer
from tests import texts

TEXTS = [*PROBES, "hello the 123 hehell o", "<|turn|>hello</s>the", ""]


def changed(tokenizer: Tokenizer, config: dict | None = None, **parts) -> Tokenizer:
    """The tokenizer with other parts of its tokenizer.json, and of its configuration."""
    files = tokenizer.files()
    described = json.loads(files["tokenizer.json"])
    for name, value in parts.items():
        described[name] = value(described[name]) if callable(value) else value
    return Tokenizer(
        Backend.from_str(json.dumps(described)), json.loads(files["tokenizer_config.json"]) | (config or {}), None
    )


@pytest.mark.parametrize("words", WORDS)
def test_a_byte_level_tokenizer_comes_back_under_the_name_of_its_words(tmp_path, words):
    tokenizer = texts.merging_tokenizer(words, ignore_merges=words == "llama-bpe")
    metadata = tokenizer_metadata(tokenizer, texts.MERGED)
    assert metadata["tokenizer.ggml.pre"] == words
    read = tokenizer_from_gguf(tmp_path, metadata)
    for text in TEXTS:
        assert read.encode(text) == tokenizer.encode(text)
        assert read.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert (read.bos_token_id, read.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert read.chat_template == texts.CHAT_TEMPLATE


def test_the_words_of_hugging_face_s_own_settings_are_recognised():
    """GPT-2's tokenizer.json says ByteLevel, SmolLM2's Digits and ByteLevel: the same splits in other words."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = changed(texts.merging_tokenizer(), pre_tokenizer=level)
    assert tokenizer_metadata(tokenizer, texts.MERGED)["tokenizer.ggml.pre"] == "gpt-2"
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}
    tokenizer = changed(texts.merging_tokenizer(), pre_tokenizer=digits)
    assert tokenizer_metadata(tokenizer, texts.MERGED)["tokenizer.ggml.pre"] == "smollm"


def test_smollm2_s_tokenizer_is_written_as_its_own_file_has_it(smollm2):
    theirs = open_gguf(smollm2).metadata
    ours = tokenizer_metadata(open_checkpoint(smollm2).tokenizer, len(theirs["tokenizer.ggml.tokens"]))
    for key, value in theirs.items():
        if key.startswith("tokenizer.") and key != "tokenizer.ggml.add_space_prefix":  # for SentencePiece only
            assert ours[key] == value, key


def test_rows_without_a_token_are_padding():
    metadata = tokenizer_metadata(texts.merging_tokenizer(), texts.MERGED + 2)
    assert metadata["tokenizer.ggml.tokens"][-2:] == [f"[PAD{texts.MERGED}]", f"[PAD{texts.MERGED + 1}]"]
    assert metadata["tokenizer.ggml.token_type"][-3:] == [3, 5, 5]


def test_special_and_added_tokens_have_their_types():
    tokenizer = changed(
        texts.merging_tokenizer(),
        added_tokens=lambda tokens: [token | {"special": token["content"] != "<|turn|>"} for token in tokens],
    )
    metadata = tokenizer_metadata(tokenizer, texts.MERGED)
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert (types["<s>"], types["</s>"], types["<|turn|>"], types["h"]) == (3, 3, 4, 1)


def test_every_end_of_a_generation_is_kept(tmp_path):
    tokenizer = texts.merging_tokenizer()
    turn = tokenizer.encode("<|turn|>")[0]
    tokenizer.eos_token_ids.add(turn)
    metadata = tokenizer_metadata(tokenizer, texts.MERGED)
    assert metadata["tokenizer.ggml.eot_token_id"] == turn
    assert tokenizer_from_gguf(tmp_path, metadata).eos_token_ids == tokenizer.eos_token_ids


@pytest.mark.parametrize(("before", "after"), [([], []), (["<s>"], []), (["<s>"], ["</s>"])])
def test_tokens_around_a_text_are_kept(tmp_path, before, after):
    tokenizer = texts.merging_tokenizer()
    backend = Backend.from_str(tokenizer.files()["tokenizer.json"].decode())
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
    )
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
    read = tokenizer_from_gguf(tmp_path, tokenizer_metadata(tokenizer, texts.MERGED))
    for text in TEXTS:
        assert read.encode(text) == tokenizer.encode(text)


def sentencepiece(prefix: bool = True) -> Tokenizer:
    """A tokenizer of Llama 2's kind: SentencePiece BPE with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("h", "e"), ("l", "l"), ("▁", "t"), ("he", "ll"), ("▁t", "he"), ("hell", "o"), ("e", "l"), ("▁", "▁")]
    pieces += [left + right for left, right in merges]
    pieces += sorted({character for text in ("▁helot", "abcdefgijkmnpqrsuvwxyz.,1234567890'") for character in text})
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_comes_back(tmp_path, prefix):
    tokenizer = sentencepiece(prefix)
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] == prefix
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert (types["<unk>"], types["<s>"], types["<0x41>"], types["he"]) == (2, 3, 6, 1)
    read = tokenizer_from_gguf(tmp_path, metadata)
    for text in [*PROBES, "hello the hello", "the  hell"]:
        assert read.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text in a way of its own"),
        ({"pre_tokenizer": None}, "splits text in a way of its own"),
        ({"normalizer": {"type": "Lowercase"}}, "changes the text before it splits it"),
        ({"model": lambda model: model | {"ignore_merges": True}}, "splits text in a way of its own"),
        ({"model": lambda model: model | {"merges": []}}, "is BPE without merges"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "is WordLevel"),
        ({"model": lambda model: model | {"end_of_word_suffix": "</w>"}}, "has end_of_word_suffix"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "splits text in a way of its own",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_kind_for_is_refused(change, message):
    with pytest.raises(MiniloraError, match=f"the tokenizer {message}") as caught:
        tokenizer_metadata(changed(texts.merging_tokenizer(), **change), texts.MERGED)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_the_model_has_rows_are_refused():
    with pytest.raises(MiniloraError, match=f"a token of number {texts.MERGED - 1}, expected less than the 100 rows"):
        tokenizer_metadata(texts.merging_tokenizer(), 100)


def test_other_tokens_around_a_text_are_refused():
    backend = Backend.from_str(texts.merging_tokenizer().files()["tokenizer.json"].decode())
    turn = backend.token_to_id("<|turn|>")
    backend.post_processor = processors.TemplateProcessing(
        single=["<|turn|>", "$A"], special_tokens=[("<|turn|>", turn)]
    )
    with pytest.raises(MiniloraError, match=rf"puts the tokens \[{turn}\] before a text"):
        tokenizer_metadata(Tokenizer(backend, {"bos_token": "<s>"}), texts.MERGED)


def test_the_newer_form_of_a_sentencepiece_tokenizer_is_recognised():
    """Metaspace instead of a normalizer: other tokens only for a text that begins with a space."""
    tokenizer = sentencepiece()
    backend = Backend.from_str(tokenizer.files()["tokenizer.json"].decode())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    again = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    assert tokenizer_metadata(again, again.vocab_size) == tokenizer_metadata(tokenizer, tokenizer.vocab_size)
