"""The differentiable primitives, a file per idea. `minilora.tensor.PRIMITIVES` lists them all."""

from .activation import gelu_tanh, silu, silu_mul
from .arithmetic import add, div, exp, log, maximum, mean, mul, neg, power, sqrt, sub, sum, tanh, where
from .attention import attention
from .dora import with_magnitude
from .embedding import embedding
from .fused import add_layer_norm, add_rms_norm, lora_linears, lora_rows
from .linalg import CompressedWeight, linear, matmul
from .lora import dropout, lora_linear, low_rank
from .loss import cross_entropy, linear_cross_entropy
from .norm import layer_norm, rms_norm
from .rotary import rotary
from .shape import add_rows, astype, broadcast_to, concatenate, getitem, reshape, select_rows, transpose, unstack

__all__ = [
    "CompressedWeight",
    "add",
    "add_layer_norm",
    "add_rms_norm",
    "add_rows",
    "astype",
    "attention",
    "broadcast_to",
    "concatenate",
    "cross_entropy",
    "div",
    "dropout",
    "embedding",
    "exp",
    "gelu_tanh",
    "getitem",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log",
    "lora_linear",
    "lora_linears",
    "lora_rows",
    "low_rank",
    "matmul",
    "maximum",
    "mean",
    "mul",
    "neg",
    "power",
    "reshape",
    "rms_norm",
    "rotary",
    "select_rows",
    "silu",
    "silu_mul",
    "sqrt",
    "sub",
    "sum",
    "tanh",
    "transpose",
    "unstack",
    "where",
    "with_magnitude",
]
