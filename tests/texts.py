"""A tokenizer of single bytes with a chat template, and tiny models that read with it."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import minilora as ml
from minilora.formats.gguf_tokenizer import word_splitter
from minilora.formats.tokenizer import Tokenizer
from tests import tiny

SPECIAL = ["<s>", "</s>", "<|turn|>"]
VOCABULARY = 256 + len(SPECIAL)
END, TURN = 257, 258
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t"), ("Ġt", "he"), ("1", "2"), ("12", "3"), ("o", "Ġ")]
MERGED = 256 + len(MERGES) + len(SPECIAL)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Token ids are bytes; 256 begins a text, 257 ends one, 258 opens a turn."""
    # Byte-level BPE writes printable bytes as they are and the others as characters from 256 on (GPT-2).
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, CHAT_TEMPLATE)


def merging_tokenizer(words: str = "gpt-2", **settings: Any) -> Tokenizer:
    """Byte-level BPE with a few merges, whose text is split as llama.cpp's pre-tokenizer `words` splits it.

    Ids: 256 bytes, the merges' tokens, then SPECIAL; MERGED tokens in all. settings: of the model (ignore_merges).
    """
    single = byte_tokenizer().files()["tokenizer.json"]
    vocabulary = json.loads(single)["model"]["vocab"]
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, MERGES, **settings))
    backend.pre_tokenizer = word_splitter(words)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, CHAT_TEMPLATE)


def model(dtype: str = "float32", seed: int = 0, **changes: Any) -> ml.Model:
    """A tiny random Llama that reads bytes, with a context of 256."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": END}
    network = tiny.model(dtype, seed, **(sizes | changes))
    network.tokenizer = byte_tokenizer()
    return network
