"""Loading a model: what its files hold has to be what the network computes with."""

import numpy as np
import pytest

import minilora as ml
from minilora.errors import MiniloraError
from minilora.formats.safetensors import save_tensors
from tests import tiny


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_weights_that_are_no_floats_are_refused_by_name(tmp_path, dtype):
    network = tiny.model("float32")
    network.save(tmp_path)
    tensors = {name: tensor.data for name, tensor in network.network.named_parameters()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(MiniloraError, match=r"model\.norm\.weight is stored as int8, expected one of float64"):
        ml.load_model(tmp_path, dtype=dtype)
