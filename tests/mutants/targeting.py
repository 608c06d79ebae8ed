"""Planted bugs of targeting: embeddings and heads, what an adapter trains whole, which modules patterns name."""

from __future__ import annotations

from .mutant import Mutant

OWN = ("tests/lora/test_own.py",)
EMBEDDING = ("tests/lora/test_embedding.py",)
NAMES = ("tests/lora/test_targets.py",)
PARITY = ("tests/parity/test_targets.py",)

TARGETING = [
    # --- embeddings
    Mutant(
        "lora/variants/embedding.py",
        "return ops.linear(u * (self.scale * weight), self.lora_B)",
        "return ops.linear(u * self.scale, self.lora_B)",
        "embedding: the weight of a sum is forgotten",
        EMBEDDING,
    ),
    Mutant(
        "lora/variants/embedding.py",
        "return super().delta(base).T",
        "return super().delta(base.T).T[::-1]",
        "embedding: ΔE is merged into other rows",
        ("tests/lora/test_laws.py::test_merging_leaves_the_logits_and_unmerging_restores_every_bit", *PARITY),
    ),
    Mutant(
        "lora/variants/embedding.py",
        'config.with_changes(init="zeros", dropout=0.0)',
        'config.with_changes(init="zeros")',
        "embedding: dropout on tokens",
        EMBEDDING,
    ),
    Mutant(
        "lora/variants/embedding.py",
        'plain = config.with_changes(init="zeros", dropout=0.0)',
        "plain = config.with_changes(dropout=0.0)",
        "embedding: A starts random, so that the model is not the base",
        EMBEDDING,
    ),
    Mutant(
        "models/gpt2.py",
        "if self.transformer.wpe.adapter is not None:",
        "if False:",
        "positions of all rows are looked up once, whatever each row's adapter",
        EMBEDDING,
    ),
    Mutant(
        "train/checks.py",
        'START = {"lora_B": "lora_A", "lora_embedding_A": "lora_embedding_B"}',
        'START = {"lora_B": "lora_A", "lora_embedding_B": "lora_embedding_A"}',
        "first step: an embedding is taken for a linear layer",
        EMBEDDING,
    ),
    # --- what an adapter trains whole
    Mutant(
        "nn.py",
        "return self.current().forward(*args)",
        "return self.forward(*args)",
        "own: the copies are never computed with",
        OWN,
    ),
    Mutant(
        "nn.py",
        "weight = self.current().weight\n        if ops.add_rms_norm",
        "weight = self.weight\n        if True or ops.add_rms_norm",
        "own: a fused norm takes the base's weight",
        OWN,
    ),
    Mutant(
        "nn.py",
        "        twin = copy(self)\n",
        "        twin = self\n",
        "own: the copies are put into the base",
        OWN,
    ),
    Mutant(
        "nn.py",
        "for held in (module.adapter, module.own):",
        "for held in (module.adapter,):",
        "own: a checkpoint does not know that a copy is trained",
        ("tests/lora/test_own.py::test_a_block_whose_norms_alone_are_trained_is_checkpointed",),
    ),
    Mutant(
        "models/causal_lm.py",
        "head = self.lm_head.current()",
        "head = self.lm_head",
        "own: the loss goes through the base's head",
        OWN,
    ),
    Mutant(
        "lora/own.py",
        "data = base.astype(dtype)  # always a copy",
        "data = base.astype(dtype, copy=False)  # never a copy",
        "own: the base's array is trained itself",
        OWN,
    ),
    Mutant(
        "lora/own.py",
        "return array.T if self.is_turned else array",
        "return array",
        "own: GPT-2's whole weights are saved the other way round",
        (*OWN, *PARITY),
    ),
    Mutant(
        "lora/own.py",
        'key = f"{path}.base_layer.bias" if path in adapted else f"{path}.bias"',
        'key = f"{path}.bias"',
        "own: the bias of an adapted layer has the key of another layer's",
        (*OWN, *PARITY),
    ),
    Mutant(
        "lora/values.py",
        "return again is not None and np.array_equal(value, again)",
        "return True",
        "own: a repetition that is none is let pass",
        OWN,
    ),
    Mutant(
        "lora/adapters.py",
        "if len(weights) > 1 or weight != 1:",
        "if len(weights) > 2:",
        "own: a sum of adapters takes the first one's copies",
        OWN,
    ),
    Mutant(
        "lora/merge.py",
        "for own in (own for name in weights for own in adapters.own[name].values()):",
        "for own in ():",
        "own: merging leaves the copies out",
        OWN,
    ),
    # --- names
    Mutant(
        "lora/targets.py",
        "chosen -= set(saved)",
        "chosen -= set()",
        "a module that is trained whole gets A and B too",
        (*NAMES, *PARITY),
    ),
    Mutant(
        "lora/targets.py",
        "if layer_number(name) in wanted or name in in_full}",
        "if layer_number(name) in wanted}",
        "a module named in full falls to layers_to_transform",
        NAMES,
    ),
    Mutant(
        "lora/targets.py",
        "if not matches(name, HEAD) and name not in embeddings}",
        "if not matches(name, HEAD)}",
        "all-linear takes embeddings",
        NAMES,
    ),
    Mutant(
        "lora/targets.py",
        "if pattern and name.endswith(pattern)]",
        "if matches(name, pattern)]",
        "modules_to_save by parts of names, not by their ends",
        (*NAMES, *PARITY),
    ),
    Mutant(
        "lora/targets.py",
        'any(f"{name}.".startswith(f"{hit}.") for hit in hits)',
        "any(name.startswith(hit) for hit in hits)",
        "modules_to_save: layer 1 takes layer 10 along",
        NAMES,
    ),
]
