"""minilora: LoRA fine-tuning written from scratch on NumPy; the same source runs on a GPU through CuPy."""
from . import ops
from .tensor import Tensor, no_grad, primitive
