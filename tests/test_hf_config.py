"""What files of other projects ask for and natsjax lacks is one sentence, whatever stands in them."""

import importlib.util

import pytest
import tiny

from natsjax.errors import UserError
from natsjax.interop.hf_config import read_hf_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}


@pytest.mark.parametrize("value", ["1", [1], -1, True])
def test_the_first_window_layer_is_a_number(value):
    qwen = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": value}
    with pytest.raises(UserError, match=r"config.json: max_window_layers = .*: a number of at least 0 was expected"):
        read_hf_config(qwen, "config.json")


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ({"token_shift": True}, "token_shift"),
        ({"layer_types": ["selective"]}, "layer_types"),
        ({"layer_types": ["sliding"], "sliding_window": [1, 2]}, "sliding_window"),
    ],
)
def test_a_folder_of_our_own_has_nothing_that_none_is_exported_with(model, field):
    """Somebody has edited it: there are no names for such parameters in a folder."""
    stored = tiny.config(model={"layer_types": "dense"}).to_dict()
    own = {"model": stored["model"] | model, "nats": stored["nats"], "data": {"source": "none", "context_length": 24}}
    with pytest.raises(UserError, match=f"config.json: model.{field} = "):
        read_hf_config({"model_type": "natsjax", "natsjax": own, "vocab_size": 32}, "config.json")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="pip install 'natsjax[hf]'")
def test_a_file_that_scales_rotary_embeddings_twice(tmp_path):
    """Its factors would have been left out in silence."""
    import gguf
    import numpy as np

    from natsjax.interop.gguf_file import GGUFFile

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)
    writer.add_tensor("rope_freqs.weight", np.full(4, 2.0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UserError, match=r"scales the rotary embedding twice, by rope_freqs.weight and as .* = 'linear'"
    ):
        _ = GGUFFile(path).config
