"""The tokenizer that a GGUF file carries in its metadata, rebuilt with the `tokenizers` library.

Two kinds: "gpt2", byte-level BPE with its merges and a named rule that splits text into words first; and "llama",
SentencePiece BPE with byte fallback, whose merges follow from the scores of its pieces. Others are refused by name.
Source: llama-vocab.cpp of https://github.com/ggml-org/llama.cpp; Hugging Face's tokenizer.json of each model family
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ..errors import MiniloraError
from .tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_END_ROLES = ("eos", "eot", "eom")  # end of sequence, of turn, of message: each ends a generation

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# How text is split into words before BPE, by tokenizer.ggml.pre: each expression splits the pieces of the one before.
WORDS = {
    "gpt-2": [_GPT2_WORDS],
    "smollm": [r"\p{N}", _GPT2_WORDS],
    "llama-bpe": [_LLAMA3_WORDS],
    "qwen2": [_LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
}
WHOLE_WORDS = "llama-bpe"  # takes a whole word that is in the vocabulary even where the merges would not lead to it


def tokenizer_from_gguf(path: Path, metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata, or None where it carries none.

    Raises MiniloraError for a kind that is not supported (by its name) and for malformed metadata.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "no_vocab":
        return None
    if kind == "gpt2":
        backend = _byte_level_bpe(path, metadata)
    elif kind == "llama":
        backend = _sentencepiece_bpe(path, metadata)
    else:
        raise MiniloraError(
            f'{path}: tokenizer model "{kind}" is not supported, expected "gpt2" (byte-level BPE) or "llama"'
        )
    tokens = _tokens(path, metadata)
    special, user_defined = _added_tokens(path, metadata, tokens)
    backend.add_special_tokens(special)
    backend.add_tokens(user_defined)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, name in _ROLES.items():
        if (token := _role_id(path, metadata, role, tokens)) is not None:
            config[name] = tokens[token]
    if isinstance(context := metadata.get(f"{metadata.get('general.architecture')}.context_length"), int):
        config["model_max_length"] = context
    _add_sequence_tokens(backend, metadata, config, kind)
    ends = [_role_id(path, metadata, role, tokens) for role in _END_ROLES]
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise MiniloraError(f"{path}: metadata tokenizer.chat_template is no text; convert the model again")
    return Tokenizer(backend, config, template, [token for token in ends if token is not None])


def _byte_level_bpe(path: Path, metadata: Mapping[str, Any]) -> Backend:
    words = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(words, str) or words not in WORDS:
        raise MiniloraError(f'{path}: pre-tokenizer "{words}" is not supported, expected one of {", ".join(WORDS)}')
    vocabulary = {token: number for number, token in enumerate(_tokens(path, metadata))}
    merges = []
    for merge in _texts(path, metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise MiniloraError(f"{path}: merge {merge!r} is not of two tokens into a third; convert the model again")
        merges.append((left, right))
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=words == WHOLE_WORDS))
    if words == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = word_splitter(words)
    backend.decoder = decoders.ByteLevel()
    return backend


def word_splitter(words: str) -> pre_tokenizers.PreTokenizer:
    """How text is split before BPE under the name `words`, one of WORDS."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in WORDS[words]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece_bpe(path: Path, metadata: Mapping[str, Any]) -> Backend:
    tokens = _tokens(path, metadata)
    scores = metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(score, float) for score in scores)
    ):
        raise MiniloraError(
            f"{path}: metadata tokenizer.ggml.scores is no list of one number a token; convert the model again"
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # SentencePiece merges the neighbours whose union scores best: the union's score ranks every way to merge into it.
    ranked = []
    types = _token_types(path, metadata, tokens)
    for token, score, type_ in zip(tokens, scores, types, strict=True):
        if type_ in (UNKNOWN, CONTROL, BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-score, left, right))
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(ranked)]
    unknown = _role_id(path, metadata, "unknown", tokens)
    backend = Backend(
        models.BPE(
            vocabulary,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _add_sequence_tokens(backend: Backend, metadata: Mapping[str, Any], config: dict[str, Any], kind: str) -> None:
    """Make encode() put the begin and end token around a text, where the file says so or its kind implies it."""
    implied = kind == "llama" or metadata.get("tokenizer.ggml.pre") == WHOLE_WORDS
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", implied)) and "bos_token" in config
    config["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in config
    before = [config["bos_token"]] if config["add_bos_token"] else []
    after = [config["eos_token"]] if config["add_eos_token"] else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
        )


def _added_tokens(
    path: Path, metadata: Mapping[str, Any], tokens: list[str]
) -> tuple[list[AddedToken], list[AddedToken]]:
    """(special, user-defined) tokens: both are found in a text before it is split, only the first are hidden later."""
    special, user_defined = [], []
    for token, type_ in zip(tokens, _token_types(path, metadata, tokens), strict=True):
        if type_ in (CONTROL, UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif type_ == USER_DEFINED:
            user_defined.append(AddedToken(token, special=False, normalized=False))
    return special, user_defined


def _token_types(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise MiniloraError(f"{path}: metadata tokenizer.ggml.token_type is no list of one number a token")
    return types


def _role_id(path: Path, metadata: Mapping[str, Any], role: str, tokens: list[str]) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if value is None or value == 0xFFFFFFFF:  # llama.cpp's "none"
        return None
    if not isinstance(value, int) or not 0 <= value < len(tokens):
        raise MiniloraError(
            f"{path}: metadata tokenizer.ggml.{role}_token_id is {value!r}, expected one of {len(tokens)} tokens"
        )
    return value


def _tokens(path: Path, metadata: Mapping[str, Any]) -> list[str]:
    tokens = _texts(path, metadata, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens) or "" in tokens:
        raise MiniloraError(
            f"{path}: metadata tokenizer.ggml.tokens holds a token twice or an empty one; convert the model again"
        )
    return tokens


def _texts(path: Path, metadata: Mapping[str, Any], key: str) -> list[str]:
    texts = metadata.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise MiniloraError(f"{path}: metadata {key} is missing or no list of texts; convert the model again")
    return texts
