"""Stable Diffusion 3 and 3.5 as plain functions and flat parameter dicts.

`load` reads a directory in diffusers layout and returns an `SD3`: pure functions (velocity, decode,
encode_text), the frozen weights they take, and the shapes of the trainable adapter. This is where
modules end: nothing outside `models/` knows about Flax.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowgrpo_jax.models import convert, layers, lora
from flowgrpo_jax.models.layers import Params
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.mmdit import MMDiT, MMDiTConfig
from flowgrpo_jax.models.text import CLIPConfig, CLIPText, T5Config, T5Encoder, encode_prompt
from flowgrpo_jax.models.tokenizers import Tokenizers
from flowgrpo_jax.models.vae import VAE, VAEConfig, to_uint8
from flowgrpo_jax.types import Conditioning

BUNDLED = ("shapes", "signs")  # models of the package's own worlds, by the names of their folders
ENCODERS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
PARTS = ("scheduler", "transformer", "vae", *ENCODERS)
T5_PARTS = "tokenizer_3", "text_encoder_3"


@dataclass(frozen=True)
class SD3:
    """A loaded model. `params` is frozen: {"transformer", "vae", "text_encoder", ...}.

    velocity(lora, base, latents [B, H, W, C] f32, sigma [B], tokens [B, L, E], pooled [B, V])
      -> f32 [B, H, W, C]
    decode(vae, latents [B, H, W, C]) -> uint8 [B, 8H, 8W, 3]
    encode_text(text, ids) -> Conditioning of P prompts
    """

    directory: Path
    params: dict[str, Params]
    velocity: Callable[..., jax.Array]
    decode: Callable[[Params, jax.Array], jax.Array]
    encode_text: Callable[[dict[str, Params], Any], Conditioning]
    tokenizers: Tokenizers
    lora_shapes: Params
    lora_spec: LoRASpec
    shift: float
    latent_channels: int
    downsampling: int
    default_size: int

    @property
    def base(self) -> Params:
        return self.params["transformer"]

    @property
    def text_params(self) -> dict[str, Params]:
        return {k: v for k, v in self.params.items() if k.startswith("text_encoder")}

    def init_lora(self, key: jax.Array) -> Params:
        return lora.init(key, self.lora_shapes)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Latent [H, W, C] of an image of height x width pixels."""
        unit = 2 * self.downsampling
        if height % unit or width % unit:
            raise ValueError(f"image size {height} x {width}: both must be multiples of {unit}")
        return height // self.downsampling, width // self.downsampling, self.latent_channels

    def encode(self, prompts: list[str]) -> Conditioning:
        """Prompts (P strings) to their text states, each prompt once."""
        return self.encode_text(self.text_params, self.tokenizers(prompts))


def resolve(model: str | Path, *, t5: bool = True) -> Path:
    """A model's directory from a path, the name of a model of the package, or a hub id.

    Args:
      t5: whether to download the largest text encoder of a model on the hub.

    Raises FileNotFoundError that says what to do when none of them leads to a model.
    """
    if model in BUNDLED:
        return _bundled(str(model))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(model).count("/") != 1 or str(model).startswith("."):
        raise FileNotFoundError(
            f"model directory {model!r} does not exist: set config.model.path to a directory in"
            f" diffusers layout, a hub id (organisation/name) or one of {', '.join(BUNDLED)}"
        )
    from huggingface_hub import snapshot_download

    # Folders by name: the hub repository holds the same weights a second time in other layouts.
    parts = (*PARTS, *T5_PARTS) if t5 else PARTS
    wanted = ["model_index.json", *(f"{part}/*" for part in parts)]
    twice = ["*.fp16.safetensors", "*.fp16-*.safetensors", "*.bin", "*.index.fp16.json"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted, ignore_patterns=twice))
    except Exception as error:
        raise FileNotFoundError(_no_download(str(model), error)) from error


def _bundled(name: str) -> Path:
    directory = Path(__file__).parent.parent / name / "model"
    if not (directory / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the model {name!r} is not in this copy of the package: make it with"
            f" `python -m flowgrpo_jax.{name}.pretrain --workdir DIR --out {directory}`, or set"
            " config.model.path to a directory that it has written"
        )
    return directory


def _no_download(model: str, error: Exception) -> str:
    """What to do about a model that the hub did not hand out."""
    from huggingface_hub import errors

    page, local = f"https://huggingface.co/{model}", "set config.model.path to a local copy"
    copy = f"`hf download {model} --local-dir DIR` on a machine that can, then {local}"
    match error:
        case errors.GatedRepoError():
            problem, fix = (
                "is gated, and this account has not been given its weights",
                f"accept the licence at {page}, log in here with `hf auth login` (or set HF_TOKEN)"
                f" and start again; or {local}",
            )
        case errors.RepositoryNotFoundError():
            problem, fix = (
                "is not on the hub, or is private",
                f"check the name at {page}; for a private one log in with `hf auth login`; or"
                f" {local}",
            )
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | ConnectionError():
            problem, fix = (
                "is neither a local directory nor in the cache, and the hub cannot be reached",
                f"go online (and unset HF_HUB_OFFLINE), or {copy}",
            )
        case _:
            problem, fix = (
                "is no local directory and could not be downloaded",
                f"for gated weights accept the licence at {page} and log in with `hf auth login`;"
                f" or {copy}",
            )
    return f"model {model!r} {problem}: {fix}. The hub said: {error}"


def _config(directory: Path, component: str, kind: type) -> Any:
    """A component's config.json as our record; fields that we do not use are passed over."""
    file = directory / component / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: {directory} is no complete SD3 model")
    fields = {f.name for f in dataclasses.fields(kind)}
    raw = {k: v for k, v in json.loads(file.read_text()).items() if k in fields}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})


def _component(
    directory: Path, name: str, module: nnx.Module, dtype: Any, place: Any, **kwargs: Any
):
    """(apply, frozen params, lora shapes) of a component that is described but not yet loaded."""
    apply, shapes = layers.functional(module)
    lora_shapes, base_shapes = lora.split(shapes)
    params = convert.load(
        directory / name,
        base_shapes,
        dtype=dtype,
        ignore=getattr(module, "ignored", ()),
        place=place and (lambda path, shape: place(f"{name}/{path}", shape)),
        **kwargs,
    )
    return apply, params, lora_shapes


def load(
    model: str | Path,
    *,
    lora_spec: LoRASpec | None = None,
    dtype: Any = jnp.float32,
    text_dtype: Any = None,
    t5: bool = True,
    t5_length: int = 256,
    remat: bool = False,
    unroll: bool = False,
    place: convert.Place | None = None,
) -> SD3:
    """Load a model of the SD3 family.

    Args:
      model: a directory in diffusers layout, "shapes", "signs" or a hub id.
      lora_spec: the adapter to make room for; SD3's defaults without it.
      dtype: compute and storage dtype of the transformer; the VAE stays f32.
      text_dtype: of the text encoders; `dtype` without it.
      t5: false leaves the largest text encoder out, as diffusers' `text_encoder_3=None`: zeros
        [P, t5_length, E] stand for its states. So does a directory that lacks it.
      t5_length: T5 tokens of a prompt (the paper: 128; diffusers: 256).
      remat: recompute block activations in the backward pass.
      unroll: lay equal blocks out one by one instead of scanning them.
      place: sharding of each frozen parameter, given component/path and its shape.
    Raises:
      FileNotFoundError: a missing directory or file, by name.
      ValueError: weights that do not fit their config, all listed.
    """
    directory = resolve(model, t5=t5)
    t5 = t5 and (directory / "text_encoder_3").is_dir()
    if t5 and not (directory / "tokenizer_3").is_dir():
        raise FileNotFoundError(
            f"{directory}/tokenizer_3 does not exist, though text_encoder_3 does: download it as"
            " well, or set config.model.t5=False"
        )
    spec = lora_spec or LoRASpec()
    text_dtype = text_dtype or dtype
    config = _config(directory, "transformer", MMDiTConfig)
    vae_config = _config(directory, "vae", VAEConfig)

    def transformer() -> MMDiT:
        return MMDiT(config, dtype=dtype, remat=remat, unroll=unroll, rngs=nnx.Rngs(0))

    module = nnx.eval_shape(transformer)
    lora.add(module, spec)
    mmdit, base, lora_shapes = _component(
        directory, "transformer", module, dtype, place, patch_size=config.patch_size
    )
    vae_module = nnx.eval_shape(lambda: VAE(vae_config, rngs=nnx.Rngs(0)))
    vae, vae_params, _ = _component(directory, "vae", vae_module, jnp.float32, place)
    encode_text, text_params = _text(directory, text_dtype, t5, t5_length, config, place)

    def velocity(lora, base, latents, sigma, tokens, pooled):
        x = latents.astype(dtype)
        v = mmdit({**base, **lora}, x, 1000 * sigma, tokens.astype(dtype), pooled.astype(dtype))
        return v.astype(jnp.float32)

    return SD3(
        directory=directory,
        params={"transformer": base, "vae": vae_params, **text_params},
        velocity=velocity,
        decode=lambda params, z: to_uint8(vae(params, z, method="decode")),
        encode_text=encode_text,
        tokenizers=Tokenizers.load(directory, t5_length, t5=t5),
        lora_shapes=lora_shapes,
        lora_spec=spec,
        shift=_shift(directory),
        latent_channels=config.in_channels,
        downsampling=vae_config.downsampling,
        default_size=config.sample_size * vae_config.downsampling,
    )


def _text(directory: Path, dtype: Any, t5: bool, t5_length: int, config: MMDiTConfig, place: Any):
    """(encode_text, params) of the two or three text encoders."""
    kinds: dict[str, tuple[Any, Any]] = {
        "text_encoder": (CLIPConfig, CLIPText),
        "text_encoder_2": (CLIPConfig, CLIPText),
    }
    if t5:
        kinds["text_encoder_3"] = (T5Config, T5Encoder)
    apply, params = {}, {}
    for name, (config_kind, module_kind) in kinds.items():
        fields = _config(directory, name, config_kind)
        module = nnx.eval_shape(lambda f=fields, m=module_kind: m(f, dtype=dtype, rngs=nnx.Rngs(0)))
        apply[name], params[name], _ = _component(directory, name, module, dtype, place)

    @jax.jit
    def encode(params: dict[str, Params], ids: Any) -> Conditioning:
        clip_l, clip_g = (apply[k](params[k], i) for k, i in zip(apply, ids[:2]))
        states = apply["text_encoder_3"](params["text_encoder_3"], ids[2]) if t5 else None
        tokens, pooled = encode_prompt(
            clip_l, clip_g, states, t5_length=t5_length, width=config.joint_attention_dim
        )
        return Conditioning(tokens=tokens, pooled=pooled)

    return encode, params


def _shift(directory: Path) -> float:
    file = directory / "scheduler" / "scheduler_config.json"
    return float(json.loads(file.read_text()).get("shift", 1.0)) if file.exists() else 3.0
