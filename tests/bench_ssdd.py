"""Speed of SSDD's decoder beside a plain formulation of the same network on the same weights, in turns.

    python -m tests.bench_ssdd [--size S] [--res 128,256,512,1024] [--train-res 64,128] [--compile] [--threads N]

The plain form is what one writes first: contiguous memory, enlarged maps written out, convolutions of enlarged images,
and in every block of every forward pass a bias for all pairs of positions.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssdd_models.attention import relative_bias, table_index
from ssdd_models.layers import timestep_embedding
from ssdd_models.ssdd import SSDD
from ssdd_models.uvit import UViT
from ssdd_models.zoo import BUNDLED

GB = 2**30


def plain_block(block: Any, x: Tensor, ctx: Tensor, temb: Tensor) -> Tensor:
    scale, shift = F.interpolate(block.norm1.ctx_proj(ctx), size=x.shape[2:]).chunk(2, dim=1)
    h = block.conv1(F.silu(F.group_norm(x, block.norm1.groups, eps=1e-5) * (1 + scale) + shift))
    scale, shift = block.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)
    h = block.conv2(F.silu(block.norm2(h) * (1 + scale) + shift))
    return h + (block.conv_shortcut(x) if hasattr(block, "conv_shortcut") else x)


def plain_transformer(block: Any, x: Tensor, ctx: Tensor, grid: tuple[int, int]) -> Tensor:
    tokens = F.interpolate(ctx, size=grid).flatten(2).transpose(1, 2)
    shift, scale = block.norm1.linear(F.silu(tokens)).chunk(2, dim=-1)
    h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
    table = block.relative_position_bias.relative_bias_table
    rows, columns = (
        table_index(torch.arange(n, device=x.device)[:, None] - torch.arange(n, device=x.device)) for n in grid
    )
    bias = relative_bias(table, rows, columns).to(h.dtype)[None]  # [1, heads, N, N]
    layers = block.attn1
    q, k, v = (p(h).unflatten(2, (len(bias[0]), -1)).transpose(1, 2) for p in (layers.to_q, layers.to_k, layers.to_v))
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    x = x + layers.out_proj(h.transpose(1, 2).flatten(2))
    return x + block.ff["proj_out"](block.ff["proj_in_act"](block.norm2(x)))


def plain_velocity(net: UViT, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """The velocity of `net`, written plainly: x_t [B, 3, H, W], t [B], z [B, c, h, w] -> [B, 3, H, W]."""
    temb = timestep_embedding(1000 * t, net.config.widths[0])
    temb = F.silu(net.time_embedding["linear_2"](F.silu(net.time_embedding["linear_1"](temb))))
    ctx = net.ada_ctx_proj(z)
    h = net.conv_in(torch.cat([x_t, F.interpolate(z, size=x_t.shape[2:])], dim=1))
    skips = [h]
    levels: Any = net.down_blocks
    for level in levels:
        for block in level.resnets:
            skips.append(h := plain_block(block, h, ctx, temb))
        if hasattr(level, "downsamplers"):
            skips.append(h := level.downsamplers[0]["conv"](h))
    middle: Any = net.mid_block
    tokens = middle.proj_in(middle.norm(h).flatten(2).transpose(1, 2))
    for block in middle.transformer_blocks:
        tokens = plain_transformer(block, tokens, ctx, (h.shape[2], h.shape[3]))
    h = h + middle.proj_out(tokens).transpose(1, 2).reshape(h.shape)
    levels = net.up_blocks
    for level in levels:
        for block in level.resnets:
            h = plain_block(block, torch.cat([h, skips.pop()], dim=1), ctx, temb)
        if hasattr(level, "upsamplers"):
            h = level.upsamplers[0]["conv"](F.interpolate(h, scale_factor=2.0))
    return net.conv_out(F.silu(net.conv_norm_out(h)))


class Bench:
    """Both forms of one decoder with the same weights, on one device."""

    def __init__(self, size: str, device: torch.device, compiled: bool) -> None:
        torch.manual_seed(0)
        self.device = device
        self.ours = SSDD("f8c4", size, external_encoder=True).to(device).to(memory_format=torch.channels_last)
        for module in self.ours.modules():  # zeroed at the start; a trained network has none of these
            if hasattr(module, "conv2"):
                torch.nn.init.normal_(module.conv2.weight, std=0.02)
        self.plain = SSDD("f8c4", size, external_encoder=True).to(device)
        self.plain.load_state_dict(self.ours.state_dict())
        self.heads = self.ours.config.decoder.heads
        if compiled:
            self.ours.decoder.compile(dynamic=False)

    def inputs(self, batch: int, side: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(side)
        z, noise = torch.randn(batch, 4, side // 8, side // 8), torch.randn(batch, 3, side, side)
        return z.to(self.device), noise.to(self.device)

    def seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def compare(self, forms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        """Least seconds of each form, taken in turns: what other work on the machine disturbs least."""
        for run in forms.values():
            self.seconds(run)
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(repeats):
            for name, run in forms.items():
                times[name].append(self.seconds(run))
        return {name: min(values) for name, values in times.items()}

    def mask_fits(self, side: int, batch: int = 1) -> bool:
        """Whether the plain form's bias, and the two copies that making it takes, fit into free memory."""
        needed = 3 * 4 * self.heads * (side // 8) ** 4 * batch
        free = (
            torch.cuda.mem_get_info()[0]
            if self.device.type == "cuda"
            else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        )
        return needed < free

    def decode(self, side: int, repeats: int) -> None:
        z, noise = self.inputs(1, side)
        one = torch.ones(1, device=self.device)

        @torch.no_grad()
        def plain() -> Tensor:
            return noise + plain_velocity(self.plain.decoder, noise, one, z)

        def half() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                return self.ours.decode(z, 1, noise)

        def plain_half() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                return plain()

        forms: dict[str, Callable[[], Any]] = {"ours": lambda: self.ours.decode(z, 1, noise), "ours bf16": half}
        if self.mask_fits(side):
            forms |= {"plain": plain} | ({"plain bf16": plain_half} if self.device.type == "cuda" else {})
        times = self.compare(forms, repeats)
        row = [f"decode {side:5d} px", *(f"{name} {1 / seconds:.3f} img/s" for name, seconds in times.items())]
        if "plain" in times:
            row.append(f"{times['plain'] / times['ours']:.2f}x")
            error = (plain() - self.ours.decode(z, 1, noise)).abs().max().item()
            row.append(f"largest difference {error:.1e}")
        else:
            row.append("plain does not fit into memory")
        print("  ".join([*row, f"bf16 {times['ours'] / times['ours bf16']:.2f}x"]), flush=True)

    def train(self, side: int, batch: int, repeats: int) -> None:
        z, noise = self.inputs(batch, side)
        t, target = torch.rand(batch, device=self.device), torch.zeros_like(noise)

        def step(velocity: Callable[[], Tensor], net: SSDD) -> None:
            F.mse_loss(velocity(), target).backward()
            for parameter in net.parameters():
                parameter.grad = None

        forms = {
            "ours": lambda: step(lambda: self.ours(noise, t, z), self.ours),
            "plain": lambda: step(lambda: plain_velocity(self.plain.decoder, noise, t, z), self.plain),
        }
        times = self.compare(forms, repeats)
        rates = [f"{name} {1 / seconds:.3f} steps/s" for name, seconds in times.items()]
        print(
            "  ".join([f"train {side:4d} px x {batch}", *rates, f"{times['plain'] / times['ours']:.2f}x"]), flush=True
        )


def half_precision(num_images: int, side: int) -> None:
    """What bfloat16 changes in reconstructions by the bundled weights: PSNR and LPIPS to the input."""
    from PIL import Image

    import tokbench
    from tokbench.data.crops import crop
    from tokbench.metrics.perceptual import lpips_network
    from tokbench.protocols import PROTOCOLS

    if not BUNDLED.exists():
        print("bfloat16 against float32: no bundled weights to compare with")
        return
    model = SSDD.from_pretrained(BUNDLED).to(memory_format=torch.channels_last)
    alex, rows = lpips_network("alex", safe=False), []
    paths = sorted((Path(tokbench.__file__).parent / "samples").glob("*.jpg"))[:num_images]
    for path in paths:
        with Image.open(path) as image:
            real = torch.from_numpy(crop(image.convert("RGB"), side, PROTOCOLS["adm"]).copy()).permute(2, 0, 1)[None]
        x, scores = real / 127.5 - 1, []
        for enabled in (False, True):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                fake = model.decode(model.encode(x).mode(), 1, torch.randn(x.shape, generator=torch.manual_seed(0)))
            fake = fake.clamp(-1, 1)
            with torch.inference_mode():
                psnr = 10 * (4 / (fake - x).square().mean()).log10()
                scores.append(torch.stack([psnr, alex(x, fake).mean()]))
        rows.append(scores[1] - scores[0])
    psnr, lpips = torch.stack(rows).mean(0).tolist()
    print(f"bfloat16 - float32, {len(rows)} images at {side} px: PSNR {psnr:+.4f} dB, lpips-alex {lpips:+.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--res", default="128,256,512,1024")
    parser.add_argument("--train-res", default="64,128")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(options.size, device, options.compile)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {options.threads} threads"
    print(f"SSDD-{options.size} f8c4, one step, batch 1, {where}, torch {torch.__version__}, best of turns")
    for side in (int(text) for text in options.res.split(",") if text):
        bench.decode(side, 1 if side > 512 and device.type == "cpu" else options.repeats)
    for side in (int(text) for text in options.train_res.split(",") if text):
        bench.train(side, 8 if side <= 64 else 2, options.repeats)
    half_precision(4, 256)


if __name__ == "__main__":
    main()
