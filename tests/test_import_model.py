"""Imported models have the logits of transformers; what cannot be imported ends in one sentence."""

import dataclasses
import json
import pickle
import shutil

import hf_models
import jax
import numpy as np
import pytest
import tiny

import natsjax
from natsjax.data.prepare import prepare
from natsjax.errors import UserError
from natsjax.import_model import import_model
from natsjax.model.transformer import init_parameters, model_structure
from natsjax.runs.data import open_data
from natsjax.runs.initial_parameters import InitialParameters
from natsjax.runs.workdir import Workdir

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="pip install 'natsjax[hf]'")


def imported(folder, output, **options):
    import_model(folder, output, **options)
    return natsjax.load(output)


QUICK = ("llama tied, wide heads", "llama 3", "mistral", "qwen2 sliding", "qwen3 sliding, yarn")


@pytest.mark.parametrize("name", hf_models.cases(hf_models.MODELS, QUICK))
def test_the_logits_are_those_of_transformers(name, tmp_path):
    model = hf_models.make(name)
    run = imported(hf_models.save(model, tmp_path / "hf"), tmp_path / "out")
    ids, is_token = hf_models.texts()
    ours = hf_models.our_logits(run, ids, is_token)
    hf_models.assert_same_logits(ours, hf_models.their_logits(model, ids, is_token), is_token)
    assert run.config.model.embedding_scale == 1
    assert run.tokenizer.vocab_size == hf_models.VOCAB_SIZE
    assert (run.tokenizer.bos_id, run.tokenizer.eos_id) == (256, 257)
    assert run.tokenizer.token_text(299) == "⟨unused 299⟩"


def test_shards_and_half_precision(tmp_path):
    torch, _ = hf_models.modules()
    model = hf_models.make("qwen2 sliding")
    whole = imported(hf_models.save(model, tmp_path / "whole"), tmp_path / "a")
    shards = hf_models.save(model, tmp_path / "shards", max_shard_size="40KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    equal(imported(shards, tmp_path / "b").parameters, whole.parameters)

    half = imported(hf_models.save(model.to(torch.float16), tmp_path / "half"), tmp_path / "c")
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), whole.parameters)
    equal(half.parameters, rounded)

    ids, is_token = hf_models.texts()
    short = imported(hf_models.save(model.to(torch.bfloat16), tmp_path / "short"), tmp_path / "d")
    assert short.config.model.dtype == short.config.model.param_dtype == "bfloat16"
    assert Workdir(tmp_path / "d").read_export()["dtype"] == "bfloat16"
    wide = imported(tmp_path / "short", tmp_path / "e", dtype="float32")
    theirs, rough = (
        hf_models.their_logits(hf_models.load(tmp_path / "short", dtype), ids, is_token)
        for dtype in (torch.float32, torch.bfloat16)
    )
    hf_models.assert_same_logits(hf_models.our_logits(wide, ids, is_token), theirs, is_token)
    # Rounded activations of a random model: as far from the exact ones as those of transformers are.
    far = [np.abs(x - theirs)[is_token].mean() for x in (hf_models.our_logits(short, ids, is_token), rough)]
    assert 0 < far[0] < 2 * far[1]


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), one, other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama model, written without PyTorch."""
    path = tmp_path_factory.mktemp("models") / "hf"
    path.mkdir()
    write_llama(path)
    hf_models.write_tokenizer(path)
    return path


def write_llama(path):
    """A folder as transformers 4 wrote it: a field that it can leave out is left out."""
    rng = np.random.default_rng(0)
    shapes = {"input_layernorm": (16,), "post_attention_layernorm": (16,)}
    shapes |= {"self_attn.q_proj": (16, 16), "self_attn.o_proj": (16, 16)}
    shapes |= {"self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16)}
    shapes |= {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
    tensors = {f"model.layers.{at}.{name}.weight": shape for at in range(2) for name, shape in shapes.items()}
    tensors |= {"model.embed_tokens.weight": (258, 16), "lm_head.weight": (258, 16), "model.norm.weight": (16,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in tensors.items()}
    safetensors_numpy.save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "bos_token_id": 256,
        "eos_token_id": [257, 256],
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))


def changed(folder, target, **fields):
    """A copy with fields of config.json changed."""
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | fields))
    return target


def retensored(folder, target, change):
    """A copy whose tensors ``change`` has changed in place."""
    shutil.copytree(folder, target)
    arrays = safetensors_numpy.load_file(target / "model.safetensors")
    change(arrays)
    safetensors_numpy.save_file(arrays, target / "model.safetensors")
    return target


def refuse(folder, message, **options):
    output = folder.parent / f"{folder.name} refused"
    with pytest.raises(UserError, match=message) as error:
        import_model(folder, output, **options)
    assert str(error.value).count("\n") == 0
    assert not output.exists()


def test_an_old_folder(folder, tmp_path):
    run = imported(folder, tmp_path / "out")
    assert (run.config.model.rope_theta, run.config.model.norm_eps) == (5000.0, 1e-6)
    assert run.config.data.context_length == 2048
    short = imported(folder, tmp_path / "short", context_length=64)
    assert short.config.data.context_length == 64
    equal(short.parameters, run.parameters)
    for wrong in (1, 2049):
        refuse(folder, f"--context_length={wrong}: the model reads 2,048 tokens at most", context_length=wrong)
    assert run.config.model.layer_types == ("dense",)
    said = Workdir(tmp_path / "out").read_export()
    assert (said["step"], said["source"], said["data"]) == (0, str(folder), "hf (llama), imported")
    again = imported(folder, tmp_path / "out")  # an export is replaced
    equal(again.parameters, run.parameters)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "gemma2"},
            "config.json: model_type = 'gemma2' is no architecture .* llama, mistral, qwen2, qwen3",
        ),
        ({"model_type": ["llama"]}, "model_type = .* is no architecture"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type = 'mixtral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is no language model"),
        ({"attention_bias": True}, "attention_bias = True: natsjax has no biases of the attention's output layer"),
        ({"mlp_bias": True}, "mlp_bias = True: natsjax has no biases in the MLP"),
        ({"num_experts": 4}, "num_experts = 4: natsjax has no mixture of experts"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: natsjax has no capped attention logits"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .*: natsjax has no quantized weights"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map = .*: natsjax has no code of a model's own"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act = 'gelu_pytorch_tanh': natsjax has no such activation"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: natsjax rotates whole heads"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic': natsjax has no such scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate = False: .* whole pairs"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor = -1: a number of at least 0 was expected"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters = .* one rotary embedding for all layers"),
        ({"rope_scaling": "big"}, "rope_scaling = 'big': an object was expected"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers = '2': a positive whole number was expected"),
        ({"hidden_size": None}, "hidden_size = None: a positive whole number was expected"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: a number of at least 0 was expected"),
        ({"num_attention_heads": 3}, "config.json: model.num_heads = 3: not a multiple of model.num_kv_heads = 2"),
        ({"layer_types": ["sliding_attention"] * 2}, r"layer_types = .* \(llama\) are all full_attention here"),
        ({"layer_types": ["full_attention"]}, "layer_types = .*: 2 of full_attention and sliding_attention"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window = 0: a positive whole number was expected"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight, although tie_word"),
        (
            {"vocab_size": 300},
            r"tensor model.embed_tokens.weight has the shape \(258, 16\); its config asks for \(300, 16\)",
        ),
        ({"vocab_size": 200}, "tokenizer.json has 258 tokens, and the model knows 200"),
        (
            {"num_hidden_layers": 3},
            "hf lacks the tensors model.layers.2.self_attn.k_proj.weight, .* and 6 more, which its",
        ),
        ({"num_hidden_layers": 1}, "hf.* has the tensors model.layers.1.* and 6 more beyond those of its config"),
        ({"model_type": "qwen3", "head_dim": 4}, "lacks the tensors model.layers.0.self_attn.k_norm.weight"),
    ],
)
def test_what_natsjax_cannot_represent_is_refused_by_name(folder, tmp_path, fields, message):
    refuse(changed(folder, tmp_path / "hf", **fields), message)


def test_damaged_folders(folder, tmp_path):
    def with_nan(arrays):
        arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan

    refuse(
        retensored(folder, tmp_path / "nan", with_nan), "model.layers.1.mlp.up_proj.weight has values that are not num"
    )

    def with_infinity(arrays):
        arrays["lm_head.weight"][0, 0] = np.inf

    refuse(retensored(folder, tmp_path / "inf", with_infinity), "lm_head.weight has values that are not numbers")
    refuse(
        retensored(folder, tmp_path / "less", lambda x: x.pop("lm_head.weight")), "lacks the tensor lm_head.weight, "
    )

    def with_one_more(arrays):
        arrays["model.layers.0.self_attn.o_proj.bias"] = np.zeros(16, np.float32)

    refuse(
        retensored(folder, tmp_path / "more", with_one_more), "has the tensor model.layers.0.self_attn.o_proj.bias be"
    )

    def turned(arrays):
        arrays["model.layers.0.mlp.down_proj.weight"] = np.ascontiguousarray(
            arrays["model.layers.0.mlp.down_proj.weight"].T
        )

    refuse(retensored(folder, tmp_path / "turned", turned), r"down_proj.weight has the shape \(24, 16\); .* \(16, 24\)")

    def as_int(arrays):
        arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(np.int8)

    refuse(retensored(folder, tmp_path / "int", as_int), "lm_head.weight is stored as I8; natsjax reads F32, F16, BF16")

    cut = changed(folder, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    refuse(cut, "model.safetensors is damaged, or no safetensors file")
    (cut / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refuse(cut, "Git LFS")
    (cut / "model.safetensors").unlink()
    refuse(cut, "holds no model.safetensors and no model.safetensors.index.json")
    (cut / "config.json").write_text("{")
    refuse(cut, "config.json cannot be read as JSON")
    (cut / "config.json").write_text("[]")
    refuse(cut, "config.json holds a JSON list; an object was expected")
    (cut / "config.json").unlink()
    refuse(cut, "is no Hugging Face folder of a model: it has no config.json")
    refuse(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", "is neither a Hugging Face folder nor a .gguf file")
    refuse(folder, "--dtype=float16: one of auto, float32, bfloat16 was expected", dtype="float16")


def test_damaged_indices(folder, tmp_path):
    whole = changed(folder, tmp_path / "hf")
    (whole / "model.safetensors").rename(whole / "model-00001-of-00002.safetensors")
    index = whole / "model.safetensors.index.json"

    def write(weight_map):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    names = safetensors_numpy.load_file(whole / "model-00001-of-00002.safetensors").keys()
    right = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    write(right | {"model.norm.weight": "model-00002-of-00002.safetensors"})
    refuse(whole, "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names")
    write(right | {"model.norm.weight": "../hf/model-00001-of-00002.safetensors"})
    refuse(whole, "index.json names '../hf/model-00001-of-00002.safetensors', which is no file of its folder")
    write(right | {"model.other.weight": "model-00001-of-00002.safetensors"})
    refuse(whole, "says that model-00001-of-00002.safetensors holds model.other.weight, and it does not")
    for content in ({}, [], {"a": 1}):
        write(content)
        refuse(whole, "index.json has no weight_map")
    write(right)
    equal(imported(whole, tmp_path / "out").parameters, imported(folder, tmp_path / "other").parameters)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(folder, tmp_path):
    path = changed(folder, tmp_path / "hf")
    (path / "model.safetensors").unlink()
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (path / name).write_bytes(trap)
        refuse(path, f"holds its weights as {name} and not as safetensors; natsjax unpickles nothing")
        (path / "model.safetensors").write_bytes(trap)
        refuse(path, "is damaged, or no safetensors file")
        (path / "model.safetensors").unlink()
        (path / name).unlink()
    assert not (tmp_path / "sprung").exists()


def test_tokenizers(folder, tmp_path):
    path = changed(folder, tmp_path / "hf")
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<|end|>"}))
    run = imported(path, tmp_path / "a")
    assert (run.tokenizer.bos_id, run.tokenizer.eos_id) == (256, 257)  # BOS is that of config.json
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"bos_token_id": None}))
    run = imported(path, tmp_path / "b")
    assert run.tokenizer.bos_id == run.tokenizer.eos_id == 257
    (path / "config.json").write_text(json.dumps(values | {"bos_token_id": 999}))
    refuse(path, "id 999 cannot be BOS or EOS")
    (path / "config.json").write_text(json.dumps(values | {"bos_token_id": None, "eos_token_id": None}))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": None}))
    refuse(path, "name neither BOS nor EOS, of which natsjax needs one")
    (path / "tokenizer.json").write_text("{}")
    refuse(path, "tokenizer.json is not a tokenizer.json of Hugging Face's library")
    (path / "tokenizer.json").unlink()
    refuse(path, "there is no tokenizer in")
    run = imported(path, tmp_path / "c", tokenizer=folder)
    assert run.tokenizer.fingerprint == imported(folder, tmp_path / "d").tokenizer.fingerprint


def test_an_imported_model_is_measured_on_and_trained_from_text_of_its_tokens(tmp_path):
    small = tmp_path / "hf"
    small.mkdir()
    write_llama(small)
    hf_models.write_tokenizer(small)
    changed(small, tmp_path / "short", max_position_embeddings=24)
    run = imported(tmp_path / "short", tmp_path / "out")
    with pytest.raises(
        UserError, match=r"out was imported and has no corpus .* --tokenizer=.*out/tokenizer .* --prepared_"
    ):
        run.data.contexts("validation", 1)
    with pytest.raises(UserError, match=r'data.source = "none": there is nothing to train on'):
        open_data(run.config, Workdir(tmp_path / "none"))
    texts = tiny.write_texts(tmp_path / "texts")
    prepare(texts, tmp_path / "corpus", tokenizer=tmp_path / "out/tokenizer", held_out_fraction=0.3, progress=False)
    prepare(texts, tmp_path / "bytes", tokenizer="byte", held_out_fraction=0.3, progress=False)
    with pytest.raises(UserError, match=r"bytes has other tokens .* prepare the text with --tokenizer=.*out/tokenizer"):
        natsjax.load(tmp_path / "out", prepared_dir=tmp_path / "bytes")
    here = natsjax.load(tmp_path / "out", prepared_dir=tmp_path / "corpus")
    assert len(here.data.contexts("validation", 2)["inputs"]) == 2
    data = {"source": "corpus", "prepared_dir": str(tmp_path / "corpus"), "context_length": 24}
    config = tiny.config(
        model=dataclasses.asdict(run.config.model) | {"layer_types": ("nats",)},
        data=data | {"tokenizer": str(tmp_path / "out/tokenizer")},
        train={"init_from": str(tmp_path / "out"), "reinit_scorer": True},
    )
    assert open_data(config, Workdir(tmp_path / "run")).vocabulary.fingerprint == run.tokenizer.fingerprint
    structure, size = model_structure(config, run.tokenizer.vocab_size), run.tokenizer.vocab_size
    _, fresh = init_parameters(config, size, jax.random.key(0))
    parameters = InitialParameters(config, structure, here.tokenizer).put_into(fresh)
    equal(parameters["blocks"]["mlp"], run.parameters["blocks"]["mlp"])
    equal(parameters["blocks"]["attention"]["scorer"], fresh["blocks"]["attention"]["scorer"])
