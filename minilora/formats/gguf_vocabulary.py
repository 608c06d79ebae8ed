"""A tokenizer as the metadata of a GGUF file: the way back from gguf_tokenizer.py.

llama.cpp does not read a tokenizer.json: it knows kinds, "gpt2" (byte-level BPE whose words are split as a name says)
and "llama" (SentencePiece BPE with byte fallback). Which name, and whether a tokenizer is of such a kind at all, is not
read off its settings but tried: what was written is read back, and must give the same tokens for texts that tell the
kinds apart. Source: llama-vocab.cpp and convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..errors import MiniloraError
from .gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
    WORDS,
    tokenizer_from_gguf,
    word_splitter,
)
from .tokenizer import Tokenizer

# Texts on which tokenizers differ: runs of digits and of spaces, line ends, contractions, punctuation, scripts, emoji.
PROBES = (
    "Hello  world, I'LL say we'll 1234567890 3.14 ½ ٣٤٥",
    "  leading\n\n\n\ttabs\r\n\r\n  and   trailing   ",
    "def f(x):\n    return x**2  # it's (not) $5+7<=>^~|`´ a_b !!!???\n",
    "émigré naïve Ünïcödé Ελληνικά Русский עברית हिन्दी 日本語のテキスト 한국어 ไทย",
    "🙂👩‍👩‍👧 \u200b\u00a0zero\u2003width ￼ \x07 ０１２ ⅷ ²x2y33",
    "https://example.com/a?b=c&d=%20 {\"json\": [1, 2.5e-3, null]} can't'VE 'tis don\u2019t",
)  # fmt: skip


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.…` keys for a model with `vocab_size` rows in its embedding.

    Raises MiniloraError for a tokenizer that llama.cpp has no kind for, or that has more tokens than the model rows.
    """
    content = tokenizer.files()["tokenizer.json"]
    assert isinstance(content, bytes)
    described: dict[str, Any] = json.loads(content)
    model = described["model"]
    if model.get("type") != "BPE" or not model["merges"]:
        raise _unsupported(f"is {model.get('type')} without merges" if "merges" in model else f"is {model.get('type')}")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise _unsupported(f"has {setting} {model[setting]!r}")
    backend = Backend.from_str(json.dumps(described))
    tokens, types = _tokens(described, vocab_size)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if model.get("byte_fallback"):
        metadata |= _sentencepiece(described, tokens, types, merges)
    else:
        if any(" " in part for merge in merges for part in merge):
            raise _unsupported("has merges of parts with spaces")
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _words(backend, described),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    metadata |= _special_tokens(tokenizer)
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    _check(tokenizer, metadata)
    return metadata


def _unsupported(what: str) -> MiniloraError:
    return MiniloraError(
        f"the tokenizer {what}, which llama.cpp has no kind for; expected byte-level BPE of {', '.join(WORDS)}, or "
        "SentencePiece BPE with byte fallback"
    )


def _tokens(described: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """All tokens in the order of their ids with their types; ids that no token has are padding, as in llama.cpp's own
    files."""
    by_id = {number: token for token, number in described["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, NORMAL)
    for added in described["added_tokens"]:
        by_id[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(by_id) >= vocab_size:
        raise MiniloraError(
            f"the tokenizer has a token of number {max(by_id)}, expected less than the {vocab_size} rows of the "
            "model's embedding: is it another model's?"
        )
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    return tokens, [types.get(number, UNUSED) for number in range(vocab_size)]


def _words(backend: Backend, described: dict[str, Any]) -> str:
    """The name in llama.cpp of how this tokenizer splits text into words."""
    normalizer = described.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):  # llama.cpp leaves NFC out: texts are composed as a rule
        raise _unsupported(f"changes the text before it splits it ({json.dumps(normalizer)[:60]})")
    if backend.pre_tokenizer is not None:
        found = [backend.pre_tokenizer.pre_tokenize_str(probe) for probe in PROBES]
        for words in WORDS:
            splits = word_splitter(words)
            same = found == [splits.pre_tokenize_str(probe) for probe in PROBES]
            if same and (words == WHOLE_WORDS) == bool(described["model"].get("ignore_merges")):
                return words
    raise _unsupported(f"splits text in a way of its own ({json.dumps(described.get('pre_tokenizer'))[:200]})")


def _sentencepiece(
    described: dict[str, Any], tokens: list[str], types: list[int], merges: list[list[str]]
) -> dict[str, Any]:
    """The keys of kind "llama": its scores rank the merges by the token that they lead to, the first merge highest."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    unknown = described["model"].get("unk_token")
    for number, token in enumerate(tokens):
        if token == unknown:
            types[number] = UNKNOWN
        elif types[number] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = BYTE
    # Pieces that nothing merges into (single characters) come last, as SentencePiece has them.
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    prefix = Backend.from_str(json.dumps(described | {"added_tokens": []})).encode("a", add_special_tokens=False)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix.tokens[:1] != ["a"],
    }


def _special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of the tokens with a role, and which of them stand around a text."""
    metadata: dict[str, Any] = {}
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    metadata |= {f"tokenizer.ggml.{role}_token_id": number for role, number in ids.items() if number is not None}
    more = sorted(tokenizer.eos_token_ids - {tokenizer.eos_token_id})  # llama.cpp: ends of a turn and of a message
    for role, number in zip(("eot", "eom"), more, strict=False):
        metadata[f"tokenizer.ggml.{role}_token_id"] = number
    bare, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    before, after = whole[: len(whole) - len(bare)], []
    for cut in range(len(whole) - len(bare) + 1):
        if whole[cut : cut + len(bare)] == bare:
            before, after = whole[:cut], whole[cut + len(bare) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise _unsupported(f"puts the tokens {before} before a text and {after} behind it")
    metadata["tokenizer.ggml.add_bos_token"] = bool(before)
    metadata["tokenizer.ggml.add_eos_token"] = bool(after)
    return metadata


def _check(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """MiniloraError where what the metadata says gives other tokens than the tokenizer itself."""
    read = tokenizer_from_gguf(Path("the tokenizer"), metadata)
    assert read is not None
    for probe in PROBES:
        # Before a text that begins with spaces SentencePiece puts one more; newer tokenizer.json of its kind do not.
        probe = probe.lstrip() if metadata["tokenizer.ggml.model"] == "llama" else probe
        if read.encode(probe) != tokenizer.encode(probe):
            raise _unsupported(f"tokenises {probe[:20]!r}… in a way of its own")
