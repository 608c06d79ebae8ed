"""A tokenizer of single bytes with a chat template, and tiny models that read with it."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import minilora as ml
from minilora.formats.tokenizer import Tokenizer
from tests import tiny

SPECIAL = ["<s>", "</s>", "<|turn|>"]
VOCABULARY = 256 + len(SPECIAL)
END, TURN = 257, 258
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


def model(dtype: str = "float32", seed: int = 0, **changes: Any) -> ml.Model:
    """A tiny random Llama that reads bytes, with a context of 256."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": END}
    network = tiny.model(dtype, seed, **(sizes | changes))
    network.tokenizer = byte_tokenizer()
    return network
