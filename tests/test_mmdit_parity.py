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
from flowgrpo_jax.models.sd3.mmdit import MMDiT, MMDiTConfig, sine_grid

SIZE = (8, 12)  # 4 x 6 patches of the 9 x 9 in the position grid: both margins are odd
CASES = {
    "SD3-medium": dict(num_layers=3),
    "SD3.5-medium": dict(num_layers=4, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "SD3.5-large": dict(num_layers=3, qk_norm="rms_norm"),
    "one layer": dict(num_layers=1),
    "one dual layer": dict(num_layers=1, qk_norm="rms_norm", dual_attention_layers=(0,)),
    "dual layers apart": dict(num_layers=4, dual_attention_layers=(0, 2, 3)),
    "more than ten": dict(num_layers=12, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
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
    "size, length", [((2, 2), 1), ((6, 16), 3), ((18, 18), 20), ((14, 10), 40)]
)
def test_sizes(size, length):
    """Of the image, whose position grid is cropped around its centre, and of the text."""
    theirs, given = torch_mmdit(MEDIUM), inputs(MEDIUM, size, length)
    with torch.no_grad():
        wanted = their_velocity(theirs, *given)
    ours = ported(MMDiT, MMDiTConfig(**MEDIUM), theirs)
    assert worst(ours(*given), wanted) <= TOLERANCE


@pytest.mark.parametrize(
    "case, variant",
    [
        ("SD3.5-medium", {}),
        ("SD3.5-medium", {"unroll": True}),
        ("SD3-medium", {"unroll": True}),
        ("SD3-medium", {"remat": True}),
    ],
    ids=str,
)
def test_gradients(case, variant):
    """Of every weight and of the latents, against torch's autograd; so for all ways to lay it out.

    The tolerance is that of the timestep's features: angles of 960 carry 6e-5 in float32.
    """
    options = {**MMDIT, **CASES[case]}
    theirs = torch_mmdit(options)
    x, *rest = inputs(options)
    weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    latents = channels_first(x).requires_grad_()
    wanted = their_velocity(theirs, latents, *rest)
    (wanted * torch.tensor(weight)).sum().backward()

    apply, params = port(MMDiT, MMDiTConfig(**options), theirs, **variant)

    def loss(params, x):
        v = apply(params, x, *rest)
        return (v * weight).sum(), v

    (ours, ours_x), velocity = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    assert worst(velocity, wanted) <= TOLERANCE
    assert worst(ours_x, channels_last(latents.grad)) <= TOLERANCE
    ours = convert.to_torch_names(ours)
    errors = {name: worst(ours[name], p.grad) for name, p in theirs.named_parameters()}
    assert {name: e for name, e in errors.items() if not e <= 1e-4} == {}


def test_remat_saves_memory():
    options = {**MMDIT, "num_layers": 12}
    given = inputs(options, (18, 18), 30)

    def temporaries(remat):
        apply, shapes = abstract(MMDiT, MMDiTConfig(**options), remat=remat)
        grad = jax.jit(jax.grad(lambda x, params: apply(params, x, *given[1:]).sum()))
        memory = grad.lower(given[0], shapes).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporaries(remat=True) < temporaries(remat=False) / 3


def test_unroll_lays_the_blocks_out():
    """Scanned, twice the layers are the same program; laid out, it grows with them."""

    def work(layers, unroll):
        apply, shapes = abstract(MMDiT, MMDiTConfig(**MMDIT, num_layers=layers), unroll=unroll)
        return jax.jit(apply).lower(shapes, *inputs(MMDIT)).cost_analysis()["flops"]

    assert work(4, unroll=False) == work(8, unroll=False)
    assert work(8, unroll=True) > 1.5 * work(4, unroll=True) > 1.5 * work(4, unroll=False)


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
    with pytest.raises(ValueError, match=r"caption_projection_dim=1536 must equal .* = 2432"):
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
