"""The MMDiT against diffusers' SD3Transformer2DModel, with tiny random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_models import (
    MMDIT,
    TOLERANCE,
    abstract,
    channels_first,
    channels_last,
    diffusers,
    port,
    ported,
    torch,
    torch_mmdit,
    worst,
)

from flowgrpo_jax.models import convert
from flowgrpo_jax.models.mmdit import MMDiT, MMDiTConfig, sine_grid

# The square of patches that an odd grid of 9 x 9 is cropped to has margins of every parity.
SIZE = (8, 12)
CASES = {
    "SD3-medium": dict(num_layers=3),
    "SD3.5-medium": dict(num_layers=4, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "SD3.5-large": dict(num_layers=3, qk_norm="rms_norm"),
    "one layer": dict(num_layers=1),
    "one dual layer": dict(num_layers=1, qk_norm="rms_norm", dual_attention_layers=(0,)),
    "dual layers apart": dict(num_layers=4, dual_attention_layers=(0, 2, 3)),
    "patches of 1": dict(num_layers=2, patch_size=1, pos_embed_max_size=16, out_channels=6),
    "patches of 4": dict(num_layers=2, patch_size=4, in_channels=3),
}
MEDIUM = {**MMDIT, **CASES["SD3.5-medium"]}


def inputs(options, size=SIZE, length=7):
    """Latents [2, H, W, C], timesteps, text states and pooled states."""
    draw = np.random.default_rng(0).normal
    shapes = {
        "latents": (2, *size, options["in_channels"]),
        "tokens": (2, length, options["joint_attention_dim"]),
        "pooled": (2, options["pooled_projection_dim"]),
    }
    x, tokens, pooled = (draw(size=shape).astype(np.float32) for shape in shapes.values())
    return x, np.array([8.9, 960.1], np.float32), tokens, pooled


def their_velocity(theirs, x, timestep, tokens, pooled):
    x = x if torch.is_tensor(x) else channels_first(x)
    states, pooled = torch.tensor(tokens), torch.tensor(pooled)
    return channels_last(theirs(x, states, pooled, torch.tensor(timestep))[0])


@pytest.mark.parametrize("case", CASES)
def test_velocity(case):
    options = {**MMDIT, **CASES[case]}
    theirs, given = torch_mmdit(options), inputs(options)
    with torch.no_grad():
        wanted = their_velocity(theirs, *given)
    ours = ported(MMDiT, MMDiTConfig(**options), theirs)
    assert worst(ours(*given), wanted) <= TOLERANCE


@pytest.mark.parametrize(
    "size, length", [((2, 2), 1), ((6, 16), 7), ((18, 2), 30), ((18, 18), 3), ((14, 10), 40)]
)
def test_sizes(size, length):
    """Of the image, whose position grid is cropped around its centre, and of the text."""
    theirs, given = torch_mmdit(MEDIUM), inputs(MEDIUM, size, length)
    with torch.no_grad():
        wanted = their_velocity(theirs, *given)
    ours = ported(MMDiT, MMDiTConfig(**MEDIUM), theirs)
    assert worst(ours(*given), wanted) <= TOLERANCE


@pytest.mark.parametrize("case", ["SD3.5-medium", "SD3.5-large"])
def test_gradients(case):
    """Of every weight and of the latents, against torch's autograd."""
    options = {**MMDIT, **CASES[case]}
    theirs = torch_mmdit(options)
    x, *rest = inputs(options)
    weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    latents = channels_first(x).requires_grad_()
    (their_velocity(theirs, latents, *rest) * torch.tensor(weight)).sum().backward()

    apply, params = port(MMDiT, MMDiTConfig(**options), theirs)
    loss = jax.jit(jax.grad(lambda p, x: (apply(p, x, *rest) * weight).sum(), argnums=(0, 1)))
    ours, ours_x = loss(params, x)
    assert worst(ours_x, channels_last(latents.grad)) <= TOLERANCE
    ours = convert.to_torch_names(ours)
    errors = {k: worst(ours[k], v.grad) for k, v in theirs.named_parameters()}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("variant", [dict(unroll=True), dict(remat=True)], ids=str)
def test_variants_compute_the_same(variant):
    theirs, given = torch_mmdit(MEDIUM), inputs(MEDIUM)
    results = []
    for options in ({}, variant):
        apply, params = port(MMDiT, MMDiTConfig(**MEDIUM), theirs, **options)
        loss = lambda p, f=apply: (jnp.square(v := f(p, *given)).mean(), v)  # noqa: E731
        (_, velocity), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        results.append({"velocity": velocity, **grads})
    for name, wanted in results[0].items():
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(results[1][name], wanted, rtol=0, atol=1e-5 * scale)


def test_remat_saves_memory():
    options = {**MMDIT, "num_layers": 12}
    given = inputs(options, (18, 18), 30)

    def temporaries(remat):
        apply, shapes = abstract(MMDiT, MMDiTConfig(**options), remat=remat)
        grad = jax.jit(jax.grad(lambda p: apply(p, *given).sum()))
        return grad.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(remat=True) < temporaries(remat=False) / 3


def test_scanned_blocks_are_compiled_once():
    """Twice the layers, the same program; laid out one by one it grows."""

    def size(layers, unroll):
        options = {**MMDIT, "num_layers": layers}
        apply, shapes = abstract(MMDiT, MMDiTConfig(**options), unroll=unroll)
        lowered = jax.jit(apply).lower(shapes, *inputs(options))
        return lowered.compile().as_text().count(" dot(")

    assert size(4, unroll=False) == size(8, unroll=False) < size(4, unroll=True)


def test_bfloat16_stays_close():
    theirs, given = torch_mmdit(MEDIUM), inputs(MEDIUM)
    with torch.no_grad():
        wanted = their_velocity(theirs, *given)
    velocity = ported(MMDiT, MMDiTConfig(**MEDIUM), theirs, dtype=jnp.bfloat16)(*given)
    assert velocity.dtype == jnp.bfloat16 and worst(velocity, wanted) < 0.03


@pytest.mark.parametrize("sample_size, patch, side", [(8, 2, 9), (128, 2, 24), (16, 1, 16)])
def test_sine_grid(sample_size, patch, side):
    sizes = dict(sample_size=sample_size, patch_size=patch, pos_embed_max_size=side)
    wanted = diffusers.SD3Transformer2DModel(**{**MMDIT, **sizes}, num_layers=1).pos_embed.pos_embed
    assert worst(sine_grid(16, side, sample_size // patch), wanted) <= TOLERANCE


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="qk_norm='layer_norm': this MMDiT knows None and 'rms_n"):
        MMDiTConfig(qk_norm="layer_norm")
    with pytest.raises(ValueError, match="caption_projection_dim=1536 must equal .* = 2432"):
        MMDiTConfig(num_attention_heads=38)


@pytest.mark.parametrize(
    "size, message",
    [
        ((20, 6), "latents of 10 x 3 patches exceed pos_embed_max_size=9"),
        ((6, 20), "latents of 3 x 10 patches exceed pos_embed_max_size=9"),
        ((7, 6), "latent size 7 x 6 is not a multiple of patch_size=2"),
        ((6, 7), "latent size 6 x 7 is not a multiple of patch_size=2"),
    ],
)
def test_impossible_sizes_are_refused(size, message):
    apply, shapes = abstract(MMDiT, MMDiTConfig(**MEDIUM))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(apply, shapes, *inputs(MEDIUM, size))
