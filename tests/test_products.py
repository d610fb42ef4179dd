"""Products in bfloat16: their error against float64, their gradient, and where they are chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgrpo_jax import sharding
from flowgrpo_jax.assembly import settings
from flowgrpo_jax.assembly.run import build_run
from flowgrpo_jax.configs import shapes
from flowgrpo_jax.models import products
from flowgrpo_jax.sampling import sampler


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def nearest(x):
    """The nearest number with eight significant bits."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(fraction * 256) / 256, exponent)


def test_operands_are_rounded_and_sums_are_not():
    x, y = arrays((7, 300), (300, 5))
    found = jax.jit(products.bfloat16)(x, y)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, nearest(x) @ nearest(y), rtol=1e-5, atol=1e-4)
    assert np.abs(found - x.astype(np.float64) @ y).max() > 1e-3
    np.testing.assert_allclose(products.exact(x, y), x.astype(np.float64) @ y, atol=1e-4)


def test_the_gradient_is_that_of_rounded_operands():
    """By hand: of sum(g * (x @ y)) it is g @ y.T and x.T @ g, with leading axes as well."""
    x, y, g = arrays((3, 4, 6), (3, 6, 5), (3, 4, 5))
    of_x, of_y = jax.grad(lambda x, y: (g * products.bfloat16(x, y)).sum(), (0, 1))(x, y)
    x, y, g = map(nearest, (x, y, g))
    np.testing.assert_allclose(of_x, g @ y.swapaxes(1, 2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_y, x.swapaxes(1, 2) @ g, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "flags, found", [("fpu avx512_bf16", True), ("amx_bf16 amx_tile", True), ("fpu avx512f", False)]
)
def test_the_cpu_says_what_it_multiplies(tmp_path, flags, found):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor : 0\nmodel name : a CPU\nflags\t\t: {flags}\n")
    assert products.cpu_has_bfloat16(str(file)) == found
    assert not products.cpu_has_bfloat16(str(tmp_path / "absent"))


def test_auto_is_for_models_in_f32_on_cpus_that_have_it(monkeypatch):
    mesh = sharding.make_mesh()
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: True)
    assert products.load("auto", mesh, "float32") is products.bfloat16
    assert products.load("auto", mesh, "bfloat16") is products.exact
    assert products.load("", mesh, "float32") is products.exact
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: False)
    assert products.load("auto", mesh, "float32") is products.exact
    assert products.load("bfloat16", mesh, "float32") is products.bfloat16


def test_a_model_in_half_precision_has_nothing_to_round():
    config = shapes.get_config()
    config.model.dtype, config.model.product_dtype = "bfloat16", "bfloat16"
    with pytest.raises(ValueError, match="set it to ''"):
        settings.check(config)


def test_the_velocity_of_the_model_in_the_box_hardly_changes():
    """Its relative error is a few thousandths, at every noise level."""
    config = shapes.get_config()
    config.prompts.test = ""

    def velocities(product_dtype):
        config.model.product_dtype = product_dtype
        run = build_run(config, training=False)
        cond = run.encode(["a red circle", "two stars", "a blue square", "a green ring"])
        empty, rows = run.empty, jnp.arange(4)
        guided = sampler.guided(run.model.velocity, 1.0, run.model.guidance)
        keys = sampler.image_keys(jax.random.key(0), 0, rows, rows)
        x = sampler.normal(keys, sampler.ODE_KEY, run.model.latent_shape(64, 64))
        policy = {k: jnp.zeros(v.shape, v.dtype) for k, v in run.model.trained_shapes.items()}
        v = jax.jit(lambda s: guided(policy, run.model.base, x, s, cond, empty, rows))
        return np.stack([v(jnp.float32(sigma)) for sigma in (1.0, 0.6, 0.2)])

    exact, rounded = velocities(""), velocities("bfloat16")
    error = np.sqrt(((rounded - exact) ** 2).mean((1, 2, 3, 4)) / (exact**2).mean((1, 2, 3, 4)))
    assert (error > 1e-4).all() and (error < 0.02).all(), error
