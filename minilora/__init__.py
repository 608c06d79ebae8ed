"""minilora: LoRA fine-tuning written from scratch on NumPy; the same source runs on a GPU through CuPy.

    import minilora as ml
    model = ml.load_model("smollm2")
    model.add_adapter("mine", ml.LoraConfig(r=8, alpha=16))
    optimiser = ml.AdamW(model.adapter_parameters("mine"), lr=1e-4)
    loss = ml.TrainStep(model, optimiser)(tokens, labels)

Importing it needs NumPy alone; the libraries that read and write files are imported when a file is.
"""

from . import kernels as kernels  # registers the faster functions of the primitives in ops
from . import ops
from .backend import to_numpy
from .comparison import GradientError
from .errors import MiniloraError
from .gradcheck import dot_product_check, gradcheck, gradcheck_model, gradcheck_parameters
from .loading import load_model, new_model
from .lora import LoraConfig
from .model import Model
from .optim import Adam, AdamW, clip_grad_norm, schedule
from .step import MicroBatch, TrainStep
from .tensor import Tensor, checkpoint, no_grad, primitive
from .train import TrainConfig, TrainingInterrupted, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "AdamW",
    "GradientError",
    "LoraConfig",
    "MicroBatch",
    "MiniloraError",
    "Model",
    "Tensor",
    "TrainConfig",
    "TrainResult",
    "TrainStep",
    "TrainingInterrupted",
    "checkpoint",
    "clip_grad_norm",
    "dot_product_check",
    "gradcheck",
    "gradcheck_model",
    "gradcheck_parameters",
    "load_model",
    "new_model",
    "no_grad",
    "ops",
    "primitive",
    "schedule",
    "to_numpy",
    "train",
]
