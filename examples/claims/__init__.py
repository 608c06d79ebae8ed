"""The claims of Hu et al. 2021, "LoRA: low-rank adaptation of large language models", measured: see README.md here.

A module for each claim. Its docstring says the claim, how it is measured and what would refute it; `measure(model)`
finds the numbers, `verdict(results)` applies the rule that the docstring states, `rows(results)` is the table and
`draw(results, path)` the figure.
"""

NAMES = (
    "rank_sweep",
    "intrinsic_rank",
    "forgetting",
    "alpha_over_r",
    "which_matrices",
    "subspaces",
    "memory",
    "latency",
    "swapping",
    "trade_off",
)
