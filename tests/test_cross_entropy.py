"""Cross-entropy in chunks of tokens: the sums and gradients of the plain formula, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natsjax.model import cross_entropy

B, T, D, V = 3, 7, 5, 11


def plain(x, output_weight, targets, weight, softcap=0.0, z_loss=0.0):
    logits = jnp.einsum("btd,vd->btv", x, output_weight)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    log_total = jax.nn.logsumexp(logits, -1)
    nll, z = jnp.sum(weight * (log_total - chosen)), jnp.sum(weight * log_total**2)
    return nll + z_loss * z, (nll, z, logits)


@pytest.fixture(params=[1, 4, 21], ids="{} tokens a chunk".format)
def arguments(request, monkeypatch):
    """Random ones, some of weight 0, and chunks that divide the tokens or do not."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", request.param * V * 4)
    monkeypatch.setattr(cross_entropy, "_LEAST_TOKENS", 1)
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 3, (B, T)).astype(np.float32)
    x, output_weight = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (V, D)))
    return x, output_weight, rng.integers(0, V, (B, T)).astype(np.int32), weight


@pytest.mark.parametrize(("softcap", "z_loss"), [(0.0, 0.0), (2.0, 0.0), (0.0, 0.1), (1.5, 0.2)])
def test_sums_and_gradients_are_those_of_the_plain_formula(arguments, softcap, z_loss):
    def loss(x, output_weight):
        totals = cross_entropy.loss_totals(x, output_weight, *arguments[2:], softcap=softcap, z_loss=z_loss)
        return 3 * totals.loss, totals

    (total, found), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*arguments[:2])
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in arguments[:2]]
        gradient = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)
        (expected, (nll, z, logits)), wanted = gradient(*wide, *arguments[2:], softcap, z_loss)
        expected, nll, z, logits, *wanted = (np.asarray(x) for x in (expected, nll, z, logits, *wanted))
    np.testing.assert_allclose(total, 3 * expected, rtol=1e-5)
    np.testing.assert_allclose((found.nll, found.z_loss), (nll, z), rtol=1e-5)
    each = cross_entropy.token_losses(*arguments[:3], softcap=softcap)
    np.testing.assert_allclose(np.sum(arguments[3] * each.nll), nll, rtol=1e-5)
    assert float(found.correct) == np.sum(arguments[3] * (np.argmax(logits, -1) == arguments[2]))
    for got, right in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, 3 * right, rtol=1e-4, atol=1e-5)


def test_losses_of_tokens_add_up(arguments):
    x, output_weight, targets, weight = arguments
    each = cross_entropy.token_losses(x, output_weight, targets)
    totals = cross_entropy.loss_totals(*arguments)
    assert each.nll.shape == each.correct.shape == (B, T)
    np.testing.assert_allclose(np.sum(weight * each.nll), totals.nll, rtol=1e-6)
    np.testing.assert_allclose(np.sum(weight * each.correct), totals.correct)


def test_huge_logits_stay_finite(arguments):
    x, output_weight, targets, weight = arguments
    loss = lambda x: cross_entropy.loss_totals(x, output_weight, targets, weight).loss  # noqa: E731
    totals, gradient = jax.value_and_grad(loss)(1e4 * x)
    assert np.isfinite(totals)
    assert np.isfinite(gradient).all()


def test_the_gradients_chunk_never_holds_all_logits():
    tokens, vocab = 4096, 8192
    assert 4 * tokens * vocab > 2 * cross_entropy._CHUNK_BYTES
    gradient = jax.grad(lambda x, w, t, weight: cross_entropy.loss_totals(x, w, t, weight).loss, argnums=(0, 1))
    shapes = [((4, tokens // 4, 8), jnp.float32), ((vocab, 8), jnp.float32)]
    shapes += [((4, tokens // 4), jnp.int32), ((4, tokens // 4), jnp.float32)]
    compiled = jax.jit(gradient).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * cross_entropy._CHUNK_BYTES
