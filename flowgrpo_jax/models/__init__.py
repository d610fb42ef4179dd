"""Models draw images from text. The trainer knows them by one record, and each kind has one row.

A `Model` is pure functions over flat parameter dicts, and the shapes or the arrays that they take.
A `Family` makes the models of one kind. `find` chooses it by the `_class_name` that a directory in
diffusers layout has in its model_index.json, so that `config.model.path` is enough.

To add one: write a file or folder with a `Family`, give it a row in `TABLE`, test it
(tests/test_models.py trains a small one that is no part of this package). A family of the user's
own is named in the recipe as `model.family="package.module:name"` and needs no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgrpo_jax import tables
from flowgrpo_jax.models import directories, lora
from flowgrpo_jax.models.layers import Params
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.sharding import Rules
from flowgrpo_jax.storage.files import read_object
from flowgrpo_jax.types import Conditioning, Pictures

TEXTS = 64  # prompts that are encoded at once
TEXT_ROUND = 8  # fewer of them are filled up to a multiple of this
GUIDANCES = ("branch", "input", "none")


def text_rows(prompts: int) -> int:
    """Return how many rows the text encoders compute at once for so many prompts.

    They are compiled for each number of rows, and a run asks for several: the empty prompt, an
    epoch, an evaluation, what a cache lacks. Rounded up, most of them are the same.
    """
    return min(-(-prompts // TEXT_ROUND) * TEXT_ROUND, TEXTS)


@dataclass(frozen=True)
class Model:
    """A model, loaded or only described. The frozen parameters of a described one are shapes.

    Attributes:
      params: {"transformer", "vae"}, the frozen weights of the two parts that every pipeline has,
        each {path: array or ShapeDtypeStruct}. The text encoders are read when they are needed.
      velocity: (trained, params["transformer"], latents [B, H, W, C] f32, sigma [B], conditioning
        of B rows) -> f32 [B, H, W, C]. `trained` is an adapter, or f32 weights that take the place
        of the transformer's own (full fine-tuning). With guidance "input" its last argument is the
        guidance scale, f32 [B].
      decode: (params["vae"], latents [B, H, W, C]) -> Pictures.
      levels: (params["vae"], latents [B, H, W, C]) -> f32 [B, H, W, 3], the pixels from 0 to 255
        before they are rounded, for algorithms that differentiate the rewards; None without one.
      encode_text: (weights of the text encoders, `tokenize(prompts)`) -> conditioning of P rows.
      token_shapes: P -> the shapes of what `tokenize` makes of P prompts.
      sigmas: (steps, height, width) -> f32 [steps + 1], the schedule from 1 to 0 for that size in
        pixels.
      shift: (height, width) -> the shift of that schedule, 1 for one that has none.
      latent_shape: (height, width) in pixels -> latent (H, W, C). Raises ValueError for a size that
        the model cannot draw.
      trained_shapes: what is trained, f32.
      text_shapes: {component: shapes} of the text encoders.
      lora_spec: the adapter that the model has room for; rank 0 means none.
      rules: the layout of each parameter, for `sharding`.
      heads: attention heads of the transformer, which `mesh.tensor` has to divide.
      default_size: side in pixels of the pictures that it was made for.
      to_latents: (params["vae"], uint8 [B, height, width, 3]) -> latents f32 [B, H, W, C] of
        pictures; None of a kind of model that reads none.
      guidance: how guidance works: "branch" (a second branch with the empty prompt), "input" (the
        scale is an input of the network) or "none".
      tokenize, read_text: prompts to tokens, and the text encoders' weights; None of a model that
        is only described.
      text_files: the files on which the conditioning of a prompt depends, for the cache on disk.
      directory: where its files lie; name: what the user calls it, "" of one only described.
    """

    params: dict[str, Params]
    velocity: Callable[..., jax.Array]
    decode: Callable[[Params, jax.Array], Pictures]
    encode_text: Callable[[dict[str, Params], Any], Conditioning]
    token_shapes: Callable[[int], Any]
    sigmas: Callable[[int, int, int], np.ndarray]
    latent_shape: Callable[[int, int], tuple[int, int, int]]
    trained_shapes: Params
    text_shapes: dict[str, Params]
    lora_spec: LoRASpec
    rules: Rules
    heads: int
    default_size: int
    to_latents: Callable[[Params, jax.Array], jax.Array] | None = None
    guidance: str = "branch"
    levels: Callable[[Params, jax.Array], jax.Array] | None = None
    shift: Callable[[int, int], float] = lambda height, width: 1.0
    tokenize: Callable[[list[str]], Any] | None = None
    read_text: Callable[[], dict[str, Params]] | None = None
    text_files: Callable[[], list[Path]] = list
    directory: Path = Path()
    name: str = ""

    @property
    def base(self) -> Params:
        return self.params["transformer"]

    def init_trained(self, key: jax.Array) -> Params:
        """Initialise what is trained: an adapter that changes nothing, or all weights in f32."""
        if self.lora_spec.rank:
            return lora.init(key, self.trained_shapes)
        return {
            path: jnp.array(self.base[path], x.dtype) for path, x in self.trained_shapes.items()
        }

    def reference(self, trained: Params) -> Params:
        """Return the policy before training, which does not depend on the values in `trained`."""
        return lora.reference(trained) if self.lora_spec.rank else {}

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode P prompts to a conditioning of P rows, in equal parts if there are many of them.

        The activations of a text encoder may be large, which limits how many are encoded at once.
        """
        if self.read_text is None or self.tokenize is None:
            raise ValueError("this model is only described: `load` it to encode prompts")
        text = self.read_text()
        size = text_rows(len(prompts))
        padded = prompts + prompts[-1:] * (-len(prompts) % size)
        parts = [
            self.encode_text(text, self.tokenize(padded[i : i + size]))
            for i in range(0, len(padded), size)
        ]
        return jax.tree.map(lambda *xs: jnp.concatenate(xs)[: len(prompts)], *parts)


@dataclass(frozen=True)
class Family:
    """The models of one kind.

    Attributes:
      describe: (path, name or hub id, **settings) -> Model with shapes in place of weights. It
        reads configs alone, and downloads nothing for a published model.
      load: (path, name or hub id, *, place, texts_alone, **settings) -> Model. `place` gives the
        sharding of the parameter at component/path, and `texts_alone` leaves all weights but the
        text encoders' out.
      export: (trained, directory of the base, directory to write to) -> the file that was written:
        all of a transformer's weights, after training without an adapter.
      rules: the layout of each parameter, for `sharding`.
      targets: the linears that an adapter is for where the recipe names none.
      options: settings that only this family has, with their defaults: `config.model.options`.
      base_dtypes: what it takes as `config.model.base_dtype` beside "": `quantised.INT8`, or none.

    The settings of `describe` and `load` are lora_spec (a LoRASpec, or None for a small one), dtype
    (of the transformer and the text encoders), remat, attention and product (of its
    linears; functions of models.attention and models.products), gather (applied to parameters of
    the transformer before their use; `sharding.gather_weights` makes it), base_dtype where one is
    chosen, and the options.
    """

    describe: Callable[..., Model]
    load: Callable[..., Model]
    export: Callable[[Params, Path, Path], Path]
    rules: Rules
    targets: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    base_dtypes: tuple[str, ...] = ()


TABLE = {"StableDiffusion3Pipeline": "flowgrpo_jax.models.sd3:FAMILY"}  # by _class_name
PUBLISHED = {  # known without a download
    "stabilityai/stable-diffusion-3-medium-diffusers": "StableDiffusion3Pipeline",
    "stabilityai/stable-diffusion-3.5-medium": "StableDiffusion3Pipeline",
    "stabilityai/stable-diffusion-3.5-large": "StableDiffusion3Pipeline",
}


def find(model: str | Path, family: str = "") -> Family:
    """Return the family of a model.

    Args:
      model: a directory in diffusers layout, the name of a model of the package, or a hub id.
      family: a name of the table or "package.module:name"; "" means by the model itself.

    Raises FileNotFoundError where there is no such model, and ValueError for one of another kind.
    """
    name = family or PUBLISHED.get(str(model)) or _class_name(model)
    return tables.check(tables.find(TABLE, name, "model.family"), Family, name)


def _class_name(model: str | Path) -> str:
    file = directories.resolve(model, folders=()) / "model_index.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist: {file.parent} is no model in diffusers layout. Download all of"
            f" it, or name its kind by config.model.family: {', '.join(TABLE)}"
        )
    name = read_object(file).get("_class_name")
    if name not in TABLE:
        raise ValueError(
            f"{file} has _class_name={name!r}: the known kinds are {', '.join(TABLE)}. One of your"
            " own is named by config.model.family='package.module:name'"
        )
    return name


def settings_of(family: Family, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return all options of a family. Raises ValueError that lists them for one it does not have.

    Args:
      where: the setting that the options come from, for the error: "config.model.options".
    """
    if unknown := sorted(set(options) - set(family.options)):
        known = ", ".join(f"{name}={value!r}" for name, value in family.options.items())
        raise ValueError(
            f"{where}: {', '.join(unknown)} is unknown; this kind of model takes"
            f" {known or 'no options'}"
        )
    return {**family.options, **options}
