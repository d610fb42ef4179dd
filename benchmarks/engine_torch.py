"""The epoch of the benchmark in PyTorch, as a good user of diffusers and peft writes it.

Inference mode for sampling, no value read back between steps, text gathered once per micro-batch,
attention by scaled_dot_product_attention, no gradient checkpointing, one backward per stored step
(keeping all of a rollout's graphs would only take memory), fused AdamW, all cores. Latents are
channels first, as diffusers has them. "torch-compile" compiles the transformer and the decoder for
their one shape each. In bfloat16 the frozen weights are stored so, and autocast casts those of the
adapter, as flow_grpo does; in float32 on a GPU products may use TF32, as XLA's do.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.engine import Arrays, serve


class TorchEngine:
    """See `engine.Engine`."""

    def __init__(self, name: str, config: dict[str, Any], inputs: Arrays):
        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        )
        sample, self.train = config["sample"], config["train"]
        self.clip = config["algorithm"]["options"]["clip_range"]
        self.groups, self.group_size = sample["groups"], sample["group_size"]
        self.micro_batch, self.window = sample["micro_batch"], sample["window"]
        self.angle = sample["noise_level"] * math.pi / 2
        self.guidance = sample["guidance_scale"]
        self.sigmas = inputs["sigmas"].tolist()  # Python floats: nothing to wait for in a step
        self.device = "cuda" if os.environ["JAX_PLATFORMS"] == "cuda" else "cpu"  # as JAX does
        model = config["model"]
        self.dtype = getattr(torch, model["dtype"])
        self.product_dtype = getattr(torch, model["product_dtype"] or model["dtype"])
        torch.set_float32_matmul_precision("high")
        self.tokens, self.pooled, advantages = (
            torch.from_numpy(inputs[k]).to(self.device) for k in ("tokens", "pooled", "advantages")
        )
        self.advantages = advantages.split(self.micro_batch)
        rows = torch.arange(self.groups, device=self.device).repeat_interleave(self.group_size)
        self.rows = rows.split(self.micro_batch)

        directory = Path(config["model"]["path"])
        self.transformer = load_transformer(
            directory / "transformer", config["lora"], inputs, self.dtype
        ).to(self.device)
        self.vae = AutoencoderKL.from_pretrained(directory / "vae").requires_grad_(False)
        self.vae.to(self.device)
        if name == "torch-compile":
            self.transformer.compile(dynamic=False)
            self.vae.decoder.compile(dynamic=False)
        side = config["model"]["height"] // 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent = (self.vae.config.latent_channels, side, side)
        self.lora = [p for p in self.transformer.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.lora]
        t = self.train
        self.optimiser = torch.optim.AdamW(
            self.lora,
            t["learning_rate"],
            (t["b1"], t["b2"]),
            t["eps"],
            t["weight_decay"],
            fused=True,
        )

    # ------------------------------------------------------------------- the parts of an epoch

    def velocity(self, x: Tensor, step: int, text: tuple[Tensor, Tensor]) -> Tensor:
        tokens, pooled = text
        x = x.repeat(len(tokens) // len(x), 1, 1, 1)  # both branches of guidance in one batch
        time = x.new_full((len(x),), 1000 * self.sigmas[step])
        half = self.product_dtype != torch.float32
        with torch.autocast(self.device, self.product_dtype, enabled=half):
            v = self.transformer(x, tokens, pooled, time, return_dict=False)[0].float()
        if self.guidance <= 1:
            return v
        empty, prompt = v.chunk(2)
        return empty + self.guidance * (prompt - empty)

    def text(self, m: int) -> tuple[Tensor, Tensor]:
        """The texts of a micro-batch, behind as many empty ones where there is guidance."""
        rows = self.rows[m]
        if self.guidance > 1:
            rows = torch.cat([torch.full_like(rows, self.groups), rows])
        return self.tokens[rows], self.pooled[rows]

    def noise(self, m: int) -> Tensor:
        return torch.randn(len(self.rows[m]), *self.latent, device=self.device)

    def transition(self, x: Tensor, v: Tensor, step: int) -> tuple[Tensor, float]:
        """Mean and std of a CPS step (arXiv 2509.05952)."""
        sigma, sigma_next = self.sigmas[step : step + 2]
        x_0, x_1 = x - sigma * v, x + (1 - sigma) * v
        mean = (1 - sigma_next) * x_0 + sigma_next * math.cos(self.angle) * x_1
        return mean, sigma_next * math.sin(self.angle)

    def rollout(self, m: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(latents, stored window, its log-probs) of micro-batch m."""
        x, text = self.noise(m), self.text(m)
        stored, log_probs = [x], []
        for step in range(len(self.sigmas) - 1):
            v = self.velocity(x, step, text)
            if step < self.window:
                mean, std = self.transition(x, v, step)
                x = torch.randn_like(mean).mul_(std).add_(mean)
                stored.append(x)
                log_probs.append(log_prob(x, mean, std))
            else:
                x = x + (self.sigmas[step + 1] - self.sigmas[step]) * v
        return x, stored, log_probs

    def images(self, latents: Tensor) -> Tensor:
        """uint8 [M, H, W, 3]"""
        config = self.vae.config
        z = latents / config.scaling_factor + (config.shift_factor or 0.0)
        pixels = self.vae.decode(z, return_dict=False)[0]
        levels = pixels.div_(2).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous()

    def backward(self, stored: Any, log_probs: Any, m: int) -> None:
        """Add micro-batch m's share to the gradient."""
        text, advantage, clip = self.text(m), self.advantages[m], self.clip
        for step, (x, x_next, old) in enumerate(zip(stored, stored[1:], log_probs)):
            mean, std = self.transition(x, self.velocity(x, step, text), step)
            ratio = torch.exp(log_prob(x_next, mean, std) - old)
            clipped = ratio.clamp(1 - clip, 1 + clip)
            loss = torch.maximum(-advantage * ratio, -advantage * clipped).sum()
            (loss / (self.groups * self.group_size * self.window)).backward()

    # ------------------------------------------------------------------- what the driver asks for

    @torch.inference_mode()
    def draw(self) -> Arrays:
        _, stored, log_probs = self.rollout(0)
        x = torch.stack(stored).permute(0, 1, 3, 4, 2)
        return {"x": x.cpu().numpy(), "log_prob": torch.stack(log_probs).cpu().numpy()}

    def probe(self, drawn: Arrays) -> Arrays:
        x = torch.from_numpy(drawn["x"]).permute(0, 1, 4, 2, 3).contiguous().to(self.device)
        log_prob = torch.from_numpy(drawn["log_prob"]).to(self.device)
        with torch.inference_mode():
            v = self.velocity(x[0], 0, self.text(0)).permute(0, 2, 3, 1)
            images = self.images(x[0])
        self.backward(x, log_prob, 0)
        gradients = {
            lora_name(name): p.grad.cpu().numpy()
            for name, p in self.transformer.named_parameters()
            if p.grad is not None
        }
        self.optimiser.zero_grad()
        return {"velocity": v.cpu().numpy(), "images": images.cpu().numpy(), **gradients}

    @torch.inference_mode()
    def sample(self) -> None:
        self.rollouts, images = [], []
        for m in range(len(self.rows)):
            self.rollouts.append(self.rollout(m))
            images.append(self.images(self.rollouts[-1][0]))
        for levels in images:  # once all is asked for: the device need not wait for the host
            levels.cpu()

    @torch.inference_mode()
    def decode(self) -> None:
        for levels in [self.images(latents) for latents, _, _ in self.rollouts]:
            levels.cpu()

    def update(self) -> None:
        for m, (_, stored, log_probs) in enumerate(self.rollouts):
            self.backward(stored, log_probs, m)
        nn.utils.clip_grad_norm_(self.lora, self.train["max_grad_norm"])
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            for average, p in zip(self.ema, self.lora):
                average.lerp_(p, 1 - self.train["ema_decay"])
        if self.device == "cuda":
            torch.cuda.synchronize()

    def device_peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0.0


def log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """Mean over the latent of the Gaussian log-density: [M]."""
    squared = (x - mean).square().mean((1, 2, 3))
    return squared / (-2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


def load_transformer(
    directory: Path, lora: dict[str, Any], inputs: Arrays, dtype: torch.dtype
) -> nn.Module:
    """The frozen transformer with the shared adapter on it, which is float32."""
    model = SD3Transformer2DModel.from_pretrained(directory, torch_dtype=dtype)
    model.requires_grad_(False)
    targets = list(lora["targets"])
    model.add_adapter(LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=targets))
    trained = {lora_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    shared = {name for name in inputs if name.startswith("lora.")}
    if trained.keys() != shared:
        raise ValueError(f"the adapters differ in {sorted(trained.keys() ^ shared)}")
    for name, parameter in trained.items():
        parameter.data = torch.from_numpy(inputs[name]).clone()
    return model


def lora_name(name: str) -> str:
    """A peft parameter's name in inputs.npz."""
    return "lora." + name.replace(".default.", ".")


if __name__ == "__main__":
    serve(TorchEngine)
