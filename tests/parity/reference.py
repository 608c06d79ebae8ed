"""The reference stack, torch with transformers and PEFT: the checkpoints that it writes, its float64.

Importing this skips the test module where the stack is not installed; torch, transformers and peft are imported from
here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilora as ml

_REASON = "parity with the reference stack is not tested: it is not installed (pip install 'minilora[parity]')"
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)
peft = pytest.importorskip("peft", reason=_REASON)

torch.set_num_threads(1)  # the networks are tiny: threads would only wait for each other


# --- float64 ----------------------------------------------------------------------------------------------------------


class _Float64(torch.overrides.TorchFunctionMode):
    """Every float32 that a call of torch asks for becomes float64.

    Transformers writes its float32 casts in a few ways (`x.float()`, `x.to(torch.float32)`, `softmax(..., dtype=
    torch.float32)`, `torch.arange(..., dtype=torch.float)`); all are calls of torch, in whatever family's file they
    stand.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def float64_casts() -> Iterator[None]:
    """Inside, transformers makes and runs float64 models in float64 throughout: norms, rotary tables, softmax, loss."""
    with _Float64():
        yield


# --- checkpoints ------------------------------------------------------------------------------------------------------


def write_checkpoint(config: Mapping[str, Any], path: Path, dtype: str = "float64", seed: int = 0) -> Path:
    """Have transformers write a model of this config, whose random weights make every part matter; returns the path."""
    torch.manual_seed(seed)
    settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config["model_type"], **settings), dtype=torch.float64
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:  # a norm's weight
                parameter.normal_(1, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


def reference_model(path: Path, dtype: str = "float64") -> Any:
    """What transformers reads from the directory, computing in `dtype`, for evaluation."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def reference_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """(B, T) tokens -> (B, T, V)."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


# --- adapters ---------------------------------------------------------------------------------------------------------


def peft_config(config: ml.LoraConfig) -> Any:
    """The same configuration as PEFT's."""
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules),
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        use_rslora=config.use_rslora,
        bias=config.bias,
        modules_to_save=None if config.modules_to_save is None else list(config.modules_to_save),
    )


def peft_parameters(model: Any) -> dict[str, Any]:
    """A PEFT model's trained parameters by the keys that its files have."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {name.replace(".modules_to_save", "").replace(".default", ""): value for name, value in trained.items()}


def in_files(model: ml.Model, key: str, array: np.ndarray) -> np.ndarray:
    """An array of adapter "a" or of its shape, the way that files and PEFT have it: GPT-2's weights transposed."""
    own = model._adapters.own["a"].get(key.removeprefix(ml.lora.PEFT_PREFIX))
    return array if own is None else own.as_in_files(array)


def peft_pair(
    path: Path, config: ml.LoraConfig, dtype: str = "float64", zero_B: bool = False, seed: int = 0
) -> tuple[ml.Model, Any]:
    """One base with one adapter, here (as "a") and in PEFT, with the same values: all random, or as training starts.

    zero_B: B is zero (of an embedding A), and what is trained whole is the base's.
    """
    ours = ml.load_model(path, dtype=dtype)
    theirs = peft.get_peft_model(reference_model(path, dtype), peft_config(config))
    ours.add_adapter("a", config)
    mine, parameters = ours.adapter_parameters("a"), peft_parameters(theirs)
    assert set(mine) == set(parameters)
    random = np.random.default_rng(seed)
    for key, tensor in mine.items():
        assert in_files(ours, key, tensor.data).shape == tuple(parameters[key].shape), key
        if zero_B and ".lora_" not in key:
            assert np.array_equal(in_files(ours, key, tensor.data), parameters[key].detach())
            continue
        zero = zero_B and (".lora_B." in key or key.endswith("lora_embedding_A"))
        start = np.zeros(tensor.shape) if zero else random.normal(0, 0.3, tensor.shape)
        tensor.data[...] = start
        with torch.no_grad():
            parameters[key].copy_(torch.from_numpy(in_files(ours, key, start)))
    return ours, theirs


def token_losses(model: Any, tokens: np.ndarray, labels: np.ndarray) -> Any:
    """Σ cross-entropy of the labels that are not ignored, differentiable: what transformers averages."""
    logits = model(torch.from_numpy(tokens), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]),
        torch.from_numpy(labels[:, 1:].reshape(-1)),
        ignore_index=-100,
        reduction="sum",
    )
