"""Exports for transformers: the same logits, the same tokens, as many live keys, and back again bit by bit."""

import dataclasses
import json

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import report_data
import tiny

import natsjax
from natsjax.data import ByteTokenizer
from natsjax.decode.decoder import Decoder
from natsjax.decode.generation import generate
from natsjax.errors import UserError
from natsjax.export.hf import export_hf
from natsjax.import_model import import_model
from natsjax.policies.nats import Nats

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="pip install 'natsjax[hf]'")

LENGTH = 64


def make_run(path, **groups):
    """An export of bytes with random parameters."""
    data = {"source": "none", "context_length": LENGTH, "tokenizer": "byte"}
    config = tiny.config(data=data, **{"model": {"head_dim": 8}} | groups)
    return tiny.write_random_export(path, config, ByteTokenizer())


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), one, other)


DENSE = {
    "llama": {},
    "llama, tied with scale 1": {"embedding_scale": 1.0, "activation": "geglu"},
    "llama, untied": {"tie_embeddings": False, "rope_theta": 300.0, "norm_eps": 1e-4},
    "llama, linear": {"rope_scaling": "linear", "rope_scaling_factor": 3.0},
    "llama, 3": {
        "rope_scaling": "llama3",
        "rope_theta": 5.0,
        "rope_scaling_factor": 8.0,
        "rope_original_context": 32,
        "rope_turns": (0.5, 3.0),
    },
    "mistral": {"layer_types": "sliding", "sliding_window": 4},
    "mistral, width no multiple of heads": {"embed_dim": 18, "num_heads": 4},
    "qwen2": {"qkv_bias": True},
    "qwen2, mixed": {"layer_types": "dense,sliding", "sliding_window": 3, "num_layers": 4},
    "qwen2, window 0": {"layer_types": "dense,sliding", "sliding_window": 0, "qkv_bias": True},
    "qwen3": {"qk_norm": True, "tie_embeddings": False},
    "qwen3, sliding, yarn": {
        "qk_norm": True,
        "layer_types": "sliding,dense",
        "sliding_window": 5,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_original_context": 32,
        "rope_theta": 20.0,
        "rope_turns": (0.5, 4.0),
        "rope_ramp": "pairs",
        "rope_attention_factor": 1.3,
    },
}


QUICK_DENSE = ("llama, tied with scale 1", "llama, 3", "mistral", "qwen2, mixed", "qwen3, sliding, yarn")


@pytest.mark.parametrize("name", hf_models.cases(DENSE, QUICK_DENSE))
def test_transformers_own_classes_have_our_logits(name, tmp_path):
    model = {"layer_types": "dense", "head_dim": 8} | DENSE[name]
    run = make_run(tmp_path / "run", model=model)
    found = export_hf(tmp_path / "run", tmp_path / "hf")
    assert (found.architecture, found.own) == (name.split(",")[0], [])
    theirs = hf_models.load(tmp_path / "hf")
    assert type(theirs).__module__.startswith("transformers.models.")
    ids, is_token = hf_models.texts(vocab_size=258)
    ours = hf_models.our_logits(run, ids, is_token)
    hf_models.assert_same_logits(ours, hf_models.their_logits(theirs, ids, is_token), is_token)

    import_model(tmp_path / "hf", tmp_path / "again")
    again = natsjax.load(tmp_path / "again")
    left_out = ("embedding_scale", "qkv_bias")  # folded, or 0 in a class that has them
    for field in dataclasses.fields(run.config.model):
        if field.name not in left_out:
            assert getattr(again.config.model, field.name) == getattr(run.config.model, field.name), field.name


TWICE = ("llama tied, wide heads", "llama linear", "llama 3", "mistral", "qwen2 sliding", "qwen3 sliding, yarn")


@pytest.mark.parametrize("name", hf_models.cases(TWICE, ("mistral", "qwen3 sliding, yarn")))
def test_imported_exported_and_imported_is_bit_by_bit_the_same(name, tmp_path):
    hf_models.save(hf_models.make(name), tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "a")
    export_hf(tmp_path / "a", tmp_path / "exported", largest_file=30_000)
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 1
    import_model(tmp_path / "exported", tmp_path / "b")
    one, other = natsjax.load(tmp_path / "a"), natsjax.load(tmp_path / "b")
    equal(other.parameters, one.parameters)
    assert (other.config, other.tokenizer.fingerprint) == (one.config, one.tokenizer.fingerprint)
    theirs, back = (hf_models.load(tmp_path / name).state_dict() for name in ("hf", "exported"))
    assert theirs.keys() == back.keys()
    assert all(bool((theirs[name] == back[name]).all()) for name in theirs)
    files = [json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("hf", "exported")]
    assert files[0] == files[1]


OWN = {
    "nats": {},
    "nats, tied": {"layer_types": "nats", "tie_embeddings": True, "embedding_scale": 2.0},
    "hybrid": {"layer_types": "nats,sliding,nats,dense", "num_layers": 4, "sliding_window": 3, "qk_norm": True},
    "several windows": {"windows": (1, 4, 9), "layer_types": "nats,dense"},
    "all options": {
        "layer_types": "nats,sliding",
        "qkv_bias": True,
        "qk_norm": True,
        "attention_gate": True,
        "attention_sinks": True,
        "final_logit_softcap": 5.0,
        "activation": "squared_relu",
        "nope": (False, True),
        "rope_scaling": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_original_context": 16,
    },
    "gated": {"layer_types": "gated"},
    "head_roles": {"layer_types": "head_roles,dense"},
    "dense with sinks": {"layer_types": "dense", "attention_sinks": True},
}


def own_run(path, name, **changes):
    fields = {"layer_types": "nats", "tie_embeddings": False, "head_dim": 8} | OWN[name] | changes
    nats = {"windows": fields.pop("windows")} if "windows" in fields else {"window": 2}
    nats |= {"initial_roles": ()}
    return make_run(path, model=fields, nats=nats)


def our_live_keys(run, tokens, role_bias=0.0):
    """Keys that each query of a sequence reads, ``[layers, k, t]``: the masks of a whole forward pass."""
    from natsjax.model.inputs import Batch
    from pallas_kernels.nats_attention import NO_END

    policy = Nats(role_bias)
    position = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    batch = Batch(jnp.asarray(tokens, jnp.int32)[None], position, jnp.full_like(position, NO_END))
    sampling = policy.choice(position, run.config) if run.config.model.has_roles else None
    _, roles = run.model(batch, sampling)
    t = np.arange(len(tokens))
    end = np.asarray(roles.key_end)[:, 0]
    return ((t[None, None, :, None] >= t) & (t[None, None, :, None] < end[:, :, None])).sum(-1)


QUICK_OWN = ("several windows", "all options", "head_roles")


@pytest.mark.parametrize("name", hf_models.cases(OWN, QUICK_OWN))
def test_our_code_in_transformers_has_our_logits_tokens_and_live_keys(name, tmp_path):
    torch, _ = hf_models.modules()
    run = own_run(tmp_path / "run", name)
    found = export_hf(tmp_path / "run", tmp_path / "hf")
    assert found.architecture == "natsjax"
    assert found.own
    model = hf_models.load(tmp_path / "hf", trust_remote_code=True)
    ids, is_token = hf_models.texts(vocab_size=256)
    ours = hf_models.our_logits(run, ids, is_token)
    hf_models.assert_same_logits(ours, hf_models.their_logits(model, ids, is_token), is_token)

    prompts = [row[mask].tolist() for row, mask in zip(ids, is_token, strict=True)]
    decoder = Decoder.of_run(run, Nats() if run.config.model.has_roles else None)
    drawn = generate(decoder, prompts, max_new_tokens=20).tokens
    left = [[0] * (ids.shape[1] - len(prompt)) + prompt for prompt in prompts]
    mask = torch.tensor([[0] * (ids.shape[1] - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    live = []
    step = type(model).forward

    def watched(self, *arguments, **options):
        result = step(self, *arguments, **options)
        cache = result.cache if "cache" in result else result.past_key_values
        live.append((cache.live_keys.numpy(), list(cache.num_slots), [layer.end for layer in cache.layers]))
        return result

    type(model).forward = watched
    try:
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs = model.generate(torch.tensor(left), attention_mask=mask, **options)
    finally:
        type(model).forward = step
    assert theirs[:, ids.shape[1] :].tolist() == [row[:20] for row in drawn]
    assert len(live) == 20
    counts = [our_live_keys(run, prompt + row) for prompt, row in zip(prompts, drawn, strict=True)]
    for at, (read, slots, ends) in enumerate(live):
        for row, prompt in enumerate(prompts):
            np.testing.assert_array_equal(read[:, row], counts[row][:, :, len(prompt) - 1 + at])
        # Nothing else is in memory: as many slots as the fullest head has keys for the next query.
        for layer, end in enumerate(ends):
            index = torch.tensor([len(prompt) + at for prompt in prompts])[:, None, None]
            assert slots[layer] == int((end > index).sum(-1).max())
            assert bool(((end > index) | (end == 0)).all())
    if run.config.model.has_roles:
        full = sum(len(prompt) + 20 for prompt in prompts) * live[-1][0][:, 0].size
        assert live[-1][0].sum() < 0.95 * full


def test_role_bias_chunks_and_beams(tmp_path):
    torch, transformers = hf_models.modules()
    run = own_run(tmp_path / "run", "several windows")
    export_hf(tmp_path / "run", tmp_path / "hf")
    model = hf_models.load(tmp_path / "hf", trust_remote_code=True)
    tokens = hf_models.texts((24,), vocab_size=256)[0]
    for bias in (-1.5, 2.0):
        model.config.role_bias = bias
        expected = our_live_keys(run, tokens[0], bias)
        cache = None
        for begin, end in ((0, 7), (7, 8), (8, 20), (20, 24)):  # a cache goes on in chunks of any size
            result = model(torch.tensor(tokens[:, begin:end]), cache=cache)
            cache = result.cache if "cache" in result else result.past_key_values
            np.testing.assert_array_equal(cache.live_keys[:, 0], expected[:, :, end - 1])
        whole = model(torch.tensor(tokens), use_cache=False).logits
        torch.testing.assert_close(result.logits, whole[:, 20:], rtol=1e-4, atol=1e-4)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
    beams = model.generate(torch.tensor(tokens), num_beams=3, **options)
    without = model.generate(torch.tensor(tokens), num_beams=3, use_cache=False, **options)
    assert beams.tolist() == without.tolist()
    with pytest.raises(NotImplementedError, match="a cache that drops keys cannot go back"):
        cache.crop(3)
    with pytest.raises(ValueError, match="cache: a NatsjaxCache was expected, not DynamicCache"):
        model(torch.tensor(tokens), cache=transformers.DynamicCache())


def test_an_own_folder_is_imported_as_it_was(tmp_path):
    for name in ("all options", "several windows"):
        run = own_run(tmp_path / name, name)
        export_hf(tmp_path / name, tmp_path / f"{name} hf", largest_file=8_000)
        import_model(tmp_path / f"{name} hf", tmp_path / f"{name} back")
        back = natsjax.load(tmp_path / f"{name} back")
        equal(back.parameters, run.parameters)
        assert (back.config.model, back.config.nats) == (run.config.model, run.config.nats)


def test_bfloat16(tmp_path):
    run = own_run(tmp_path / "run", "nats")
    export_hf(tmp_path / "run", tmp_path / "hf", dtype="bfloat16")
    tensors = safetensors_numpy.load_file(tmp_path / "hf/model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype.name == ("float32" if "norm" in name or "scorer" in name else "bfloat16"), name
    torch, _ = hf_models.modules()
    model = hf_models.load(tmp_path / "hf", torch.bfloat16, trust_remote_code=True)
    assert model.model.layers[0].self_attn.scorer.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    ids, is_token = hf_models.texts(vocab_size=256)
    short = hf_models.our_logits(run, ids, is_token)
    assert np.isfinite(hf_models.their_logits(model, ids, is_token)).all()
    wide = hf_models.their_logits(hf_models.load(tmp_path / "hf", trust_remote_code=True), ids, is_token)
    assert np.abs(wide - short)[is_token].max() > 0


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokenizers_have_our_ids_behind_bos(kind, tmp_path):
    _, transformers = hf_models.modules()
    texts = tmp_path / "texts"
    data = tiny.corpus(texts, tokenizer=kind, vocab_size=280)
    run = tiny.make_run(tmp_path / "run", tiny.config(data=data))
    export_hf(tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("the house là", " köln\n\nwas  here 🙂", ""):
        ids = [run.tokenizer.bos_id, *run.tokenizer.encode(text).tolist()]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (run.tokenizer.bos_id, run.tokenizer.eos_id)
    settings = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert settings["eos_token_id"] == run.tokenizer.eos_id
    card = (tmp_path / "hf/README.md").read_text()
    assert "trust_remote_code=True" in card
    assert run.data.description in card


def test_the_card_has_the_curve(tmp_path, caplog):
    make_run(tmp_path / "run", model={"layer_types": "dense", "head_dim": 8})
    (tmp_path / "run/report").mkdir()  # as training leaves it that was stopped before it evaluated
    export_hf(tmp_path / "run", tmp_path / "hf")
    assert "Perplexity" not in (tmp_path / "hf/README.md").read_text()
    report_data.write(tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text().splitlines()
    assert "![perplexity against KV fraction](pareto.png)" in card
    drawn = (tmp_path / "hf/pareto.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert drawn == (tmp_path / "run/report/pareto.png").read_bytes()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert set(modes.values()) == {modes["config.json"]}, modes
    table = [line for line in card if line.startswith("|")]  # a table to Markdown: neither code nor a paragraph
    assert len(table) == 2 + len(report_data.make_rows())
    assert card[card.index(table[0]) - 1] == ""
    (tmp_path / "run/report/evaluation.json").write_text("{")
    export_hf(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf/pareto.png").exists()
    assert "the model card is without the curve" in caplog.text


def test_only_such_a_folder_is_replaced(tmp_path):
    make_run(tmp_path / "run", model={"layer_types": "dense", "head_dim": 8})
    export_hf(tmp_path / "run", tmp_path / "hf")
    export_hf(tmp_path / "run", tmp_path / "hf", dtype="bfloat16")
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="holds something that is not an export with --format=hf"):
        export_hf(tmp_path / "run", tmp_path / "run")
    with pytest.raises(UserError, match="--dtype=int8: one of float32, bfloat16 was expected"):
        export_hf(tmp_path / "run", tmp_path / "other", dtype="int8")
    make_run(tmp_path / "selective", model={"layer_types": "selective"})
    with pytest.raises(
        UserError, match=r"model.layer_types = selective: neither transformers nor .* \"selective\" layers"
    ):
        export_hf(tmp_path / "selective", tmp_path / "selective hf")
    for name, fields, message in (
        ("shift", {"layer_types": "dense", "token_shift": True}, "model.token_shift = True: neither"),
        ("key shift", {"layer_types": "dense", "key_shift": True}, "model.key_shift = True: neither"),
        ("heads", {"layer_types": "sliding", "sliding_window": (2, 5)}, "has a window for each KV head"),
    ):
        make_run(tmp_path / name, model=fields)
        with pytest.raises(UserError, match=message):
            export_hf(tmp_path / name, tmp_path / f"{name} hf")
    recall = tiny.make_run(tmp_path / "recall", tiny.config())
    export_hf(tmp_path / "recall", tmp_path / "recall hf")
    assert not (tmp_path / "recall hf/tokenizer.json").exists()
    assert recall.config.model.has_roles
