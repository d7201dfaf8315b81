"""Decoding on one device and on eight gives the same logits and tokens: batch over data and fsdp, heads over tensor."""

import numpy as np
import pytest
from processes import SLOW, json_lines

pytestmark = pytest.mark.larger
MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}] + [{"data": 8, "fsdp": 1}] * SLOW

DECODE = """
import dataclasses, json, sys
import jax, numpy as np
import decoding
from natsjax.decode.generation import generate
from natsjax.policies import H2O, TOVA, AdaSnapKV, KeyDiff
from natsjax.decode.sampling import Sampling
from natsjax.decode.scoring import score

meshes = json.load(sys.stdin)
config = decoding.config()
parameters = jax.device_get(decoding.parameters_of(config))
rows = decoding.prompts([3, 17, 1, 9, 12, 8, 2])
sampling = Sampling(temperature=1.2, top_p=0.9, seed=5)
policies = {"nats": None, "h2o": H2O(6, 3), "tova": TOVA(6), "ada": AdaSnapKV(6, 3, 0.0), "keydiff": KeyDiff(6)}
for mesh in [None, *meshes]:
    result = {}
    for name, policy in policies.items():
        decoder = decoding.decoder(config, parameters, policy, mesh=mesh)
        found = generate(decoder, rows, max_new_tokens=24)
        result[name] = {"tokens": found.tokens, "logprobs": found.logprobs, "evicted": found.evicted,
                        "live": found.kv_live, "devices": decoder.mesh.size}
    decoder = decoding.decoder(config, parameters, mesh=mesh)
    drawn = generate(decoder, rows, max_new_tokens=8, sampling=sampling)
    result["drawn"] = {"tokens": drawn.tokens, "logprobs": drawn.logprobs}
    result["scored"] = [scored.logprobs.tolist() for scored in score(decoder, rows, drawn.tokens)]
    padded = rows + [[0]]  # a whole batch for eight shards
    logits, cache = decoding.chunked_logits(decoder, padded, 8)
    result["logits"] = logits[:, ::3].tolist()
    shards = {tuple(x.sharding.shard_shape(x.shape)[2:4]) for x in cache.buffer[0].storage.arrays}
    result["shards"] = sorted(shards)
    print(json.dumps(result), flush=True)
"""


@pytest.fixture(scope="module")
def found():
    return json_lines(DECODE, MESHES, devices=8)


def test_logits_do_not_depend_on_the_mesh(found):
    one, *others = (np.array(result["logits"]) for result in found)
    for other in others:
        assert np.abs(other - one).max() <= 2e-5 * np.abs(one).max()


def test_greedy_tokens_do_not_depend_on_the_mesh(found):
    """Up to the first step whose two best logits are closer than 1e-4, which these prompts do not come to."""
    one, *others = found
    for other in others:
        for name in ("nats", "h2o", "tova", "ada", "keydiff", "drawn"):
            assert other[name]["tokens"] == one[name]["tokens"], name
            for a, b in zip(other[name]["logprobs"], one[name]["logprobs"], strict=True):
                assert np.allclose(a, b, atol=1e-4)
        assert all(other[name]["devices"] == 8 for name in ("nats", "h2o"))
        for scored, drawn in zip(other["scored"], one["drawn"]["logprobs"], strict=True):
            assert np.allclose(scored, drawn, atol=1e-4)
        for name in ("h2o", "tova", "ada", "keydiff"):
            assert other[name]["evicted"] == one[name]["evicted"] > 0
        assert abs(other["nats"]["live"] - one["nats"]["live"]) < 1e-5


def test_each_device_holds_its_own_sequences_and_heads(found):
    one, *others = found
    assert one["shards"] == [[8, 2]]
    for result, mesh in zip(others, MESHES, strict=True):
        assert result["shards"] == [[8 // (mesh.get("data", 1) * mesh["fsdp"]), 2 // mesh.get("tensor", 1)]]
