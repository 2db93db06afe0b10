"""MingTok: images to compact continuous latents, latents to semantic features, features to images.

Three transformers (arXiv:2510.06590). The low-level encoder sees all patches at once and gives each a latent of C
numbers. The semantic decoder is causal and knows no positions but the order, so it can expand latents one by one as
a language model draws them. The pixel decoder sees all features at once. Nothing here switches gradients off:
everything is differentiable from pixels to pixels.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from .checks import check_features
from .config import HEAD_DIM, LowLevelEncoderConfig, MingTokConfig, PixelDecoderConfig, SemanticDecoderConfig
from .features import Features, to_grid, to_tokens
from .kv_cache import LayerCache, LayerCaches
from .locking import ModelLock, exclusive
from .offload import OffloadableModule, nonfinite_error
from .transformer import LAYER_NORM_EPS, BlockStack, GeluMlp, SwiGLU

# images are at most twice the native side: the encoder's position table is stretched no further than published
MAX_GRID_FACTOR = 2


def upcast_forward(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) in the precision of x, with weights that are stored in a lower one upcast for this call.

    Offloaded weights are left to their layers, which bring them over in the dtype of their input.
    """
    # copies for this call alone: what is stored keeps its precision, and its size
    upcast = {
        name: p.to(x)
        for name, p in module.named_parameters()
        if p.device == x.device and p.dtype.itemsize < x.dtype.itemsize
    }
    return functional_call(module, upcast, (x,)) if upcast else module(x)


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each: [B, 3, H, W] -> [B, h*w, D], row by row."""

    def __init__(self, patch_size: int, dim: int, *, operations: Any, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.proj = operations.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size, device=device, dtype=dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        # Not as a convolution, which rounds float32 to TF32 on a GPU unless a global switch says otherwise. Colour is
        # the fastest axis, so that the sums are in the order of the convolution that the numbers were recorded with.
        p = self.proj.kernel_size[0]
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)  # (B, h*w, p*p*3)
        weight, bias = self.proj.weight.to(patches), self.proj.bias.to(patches)  # they may be offloaded
        return F.linear(patches, rearrange(weight, "d c p q -> d (p q c)"), bias)  # (B, h*w, D)


class LowLevelEncoder(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] -> raw latents [B, h*w + 1, C]; the last one is the class latent."""

    def __init__(
        self,
        config: LowLevelEncoderConfig,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make = {"operations": operations, "device": device, "dtype": dtype}
        # published: 16 x 16 patches of 32 pixels at 512 x 512, each 3072 numbers that become a latent of 32
        dim, self.grid, self.out_dim = config.embed_dim, config.grid, config.out_dim
        self.patch_embed = PatchEmbed(config.patch_size, dim, **make)
        # trained along for the teacher's sake; no patch token depends on what it becomes in the semantic decoder
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, device=device, dtype=dtype))
        # a learned table for the native grid, the class token's row last
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, dim, device=device, dtype=dtype))
        self.blocks = BlockStack(config.depth, dim, SwiGLU, **make)
        # the bottleneck: D numbers a token become C
        self.out_norm = operations.LayerNorm(dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        self.out_proj = operations.Linear(dim, config.out_dim, device=device, dtype=dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels)  # (B, N + 1, D)
        # every patch sees all others, so even the first latent tells of the whole image
        for block in self.blocks.layers:
            x = block(x)
        return self.project(x)  # (B, N + 1, C); no norm of the blocks' output before the shortcut, as published

    def embed(self, pixels: Tensor) -> Tensor:
        """Patch tokens, the class token behind them, positions added."""
        patch = self.patch_embed.proj.kernel_size[0]
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        patches = self.patch_embed(pixels)  # (B, h*w, D)
        # the class token comes last, so that dropping the last latent leaves those of the patches
        cls = self.cls_token.to(patches).expand(patches.shape[0], -1, -1)
        # the only position information in all of MingTok: attention adds none
        return torch.cat([patches, cls], dim=1) + self.positions(grid).to(patches)

    def project(self, x: Tensor) -> Tensor:
        """To C numbers a token: a projection, plus the mean over each of C groups of channels."""
        # a residual path around the bottleneck: it learns what the means of the channels leave out
        shortcut = x.unflatten(-1, (self.out_dim, -1)).mean(-1)  # (B, N + 1, C)
        return shortcut + self.out_proj(F.gelu(self.out_norm(x)))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table [1, h*w + 1, D], stretched bicubically where the grid is not the native one."""
        # taken as it is: the scale below would be a little above 1, and resampling would change the table
        if grid == (self.grid, self.grid):
            return self.pos_embed
        # On the CPU: on Macs older versions of PyTorch have no bicubic interpolation.
        table, cls = self.pos_embed.float().cpu().split([self.grid**2, 1], dim=1)
        # As published: the sampling follows this scale (0.1 guards against rounding down), not the output's size.
        scale = tuple((n + 0.1) / self.grid for n in grid)
        table = F.interpolate(to_grid(table, (self.grid, self.grid)), scale_factor=scale, mode="bicubic")
        # the class token has no place in the grid, so its row is not stretched
        return torch.cat([to_tokens(table), cls], dim=1).to(self.pos_embed)


class SemanticDecoder(nn.Module):
    """Raw latents [B, N, C] -> semantic features [B, N, D]; causal, without any position encoding."""

    def __init__(
        self,
        config: SemanticDecoderConfig,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim = config.embed_dim
        self.repeat = dim // config.in_dim  # neighbouring channels that each latent channel fills
        self.in_proj = operations.Linear(config.in_dim, dim, device=device, dtype=dtype)
        self.blocks = BlockStack(config.decoder_depth, dim, SwiGLU, operations=operations, device=device, dtype=dtype)
        self.norm = operations.LayerNorm(dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)

    def forward(self, raw: Tensor, caches: LayerCaches | None = None) -> Tensor:
        x = self.embed(raw)  # (B, N, D)
        # causal also where all latents are known, so that an image expands alike whether it was seen or drawn
        for i, block in enumerate(self.blocks.layers):
            x = block(x, causal=True, cache=caches[i] if caches else None)
        return self.norm(x)  # (B, N, D), what the language model sees of an image

    def embed(self, raw: Tensor) -> Tensor:
        """Each latent channel fills D / C neighbouring channels; a projection is added."""
        # the encoder's shortcut backwards: a mean of D / C channels is spread over as many
        return self.in_proj(raw) + raw.repeat_interleave(self.repeat, dim=-1)


class PixelDecoder(nn.Module):
    """Pixel tokens [B, n, Dp], in any order -> patches [B, n, p*p*3] in the same order; no positions."""

    def __init__(
        self,
        config: PixelDecoderConfig,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim = config.embed_dim
        self.patch_size = config.patch_size
        # plain GELU layers, not SwiGLU: the published builder never handed the choice on
        self.blocks = BlockStack(config.decoder_depth, dim, GeluMlp, operations=operations, device=device, dtype=dtype)
        self.norm = operations.LayerNorm(dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        # 768 numbers a pixel token as published: 16 rows of 16 pixels, colour fastest
        self.head = operations.Linear(dim, 3 * config.patch_size**2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # block by block, so that only one block's weights exist in float32 at a time
        for block in self.blocks.layers:
            x = upcast_forward(block, x)  # (B, n, Dp), every token sees all others
        return upcast_forward(self.head, upcast_forward(self.norm, x))


class MingTok(OffloadableModule):
    """The tokenizer: its three stages and the normalisation of the latents between the first two.

    `calls` counts what was run: "encode", "semantic", "decode", "preview". `fingerprint` identifies the weights that
    latents and features depend on; the loader sets it.
    """

    def __init__(
        self,
        config: MingTokConfig | None = None,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or MingTokConfig()
        make = {"operations": operations, "device": device, "dtype": dtype}
        # each semantic token becomes cells * cells pixel tokens, which are finer
        self.cells = config.semantic_decoder.patch_size // config.pixel_decoder.patch_size  # pixel tokens a side
        self.low_level_encoder = LowLevelEncoder(config.low_level_encoder, **make)
        self.semantic_decoder = SemanticDecoder(config.semantic_decoder, **make)
        # its rows are ordered (row, column, channel) by the cells of a token: 2 * 2 * 1024 as published
        self.sem_to_pix = operations.Linear(
            config.semantic_decoder.embed_dim,
            self.cells**2 * config.pixel_decoder.embed_dim,
            device=device,
            dtype=dtype,
        )
        self.pixel_decoder = PixelDecoder(config.pixel_decoder, **make)
        self.calls: Counter[str] = Counter()
        self.lock = ModelLock()
        self.fingerprint = ""  # of the first two stages: the pixel decoder changes no latent and no feature

    @property
    def patch_size(self) -> int:
        return self.config.low_level_encoder.patch_size

    @property
    def native_side(self) -> int:
        """Side in pixels of the images that the model draws and edits."""
        return self.config.low_level_encoder.img_size

    @property
    def reference_weight(self) -> Tensor:
        return self.low_level_encoder.cls_token

    @exclusive
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> normalised latents, float32 [B, C, h, w].

        H and W are multiples of `patch_size`, at most twice `native_side`. Raises ValueError, and RuntimeError where
        fp16 is too narrow for the model.
        """
        self._check_pixels(pixels)
        # counted after the checks: tests hold workflows to the exact number of encodes and decodes
        self.calls["encode"] += 1
        # float32 from here on: latents travel, are compared and saved
        raw = self.low_level_encoder(pixels.to(self.device, self.dtype))[:, :-1].float()  # without the class latent
        # fp16 ends at 65504; latents that overflowed would show only in what is made of them later
        if not raw.isfinite().all():
            raise nonfinite_error(self.dtype)
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        return to_grid(self.normalise(raw), grid)  # (B, C, h, w)

    @exclusive
    def semantic_features(self, latents: Tensor) -> Features:
        """Normalised latents [B, C, h, w] -> Features, in host memory.

        Raises ValueError, and RuntimeError where fp16 is too narrow for the model.
        """
        self.check_latents(latents)
        self.calls["semantic"] += 1
        latents = latents.float()  # other nodes may have worked on them in 16 bit
        raw = self.denormalise(to_tokens(latents).to(self.device))  # (B, h*w, C)
        tokens = self.semantic_decoder(raw.to(self.dtype)).float().cpu()  # (B, h*w, D)
        if not tokens.isfinite().all():
            raise nonfinite_error(self.dtype)
        own = latents.to("cpu", copy=True)  # the caller may write to theirs
        return Features(tokens, own, (latents.shape[2], latents.shape[3]), self.fingerprint)

    @exclusive
    def decode(self, features: Features) -> Tensor:
        """Features -> pixels, float32 [B, 3, H, W] in [-1, 1].

        Computed in float32 whatever the dtype of the weights, as published. Raises ValueError for another tokenizer's
        features, and RuntimeError where the weights are so large that they overflow.
        """
        self.check_features(features)
        self.calls["decode"] += 1
        patches = self.patches(features.tokens.to(self.device, torch.float32))  # (B, N, cells*cells, p*p*3)
        if not patches.isfinite().all():  # a black image would be taken for one
            raise nonfinite_error(torch.float32)
        # nothing bounds the head's output, and pixels outside [-1, 1] would wrap round in 8 bit
        return self.assemble(patches, features.grid).float().clamp(-1, 1)

    @exclusive
    def preview(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The image so far: the first n semantic tokens [B, n, D] -> pixels [B, 3, H, W], mid grey where none is yet.

        Cheap, since the pixel decoder knows no positions and takes just the tokens that are there, and computes in the
        dtype of the weights here.
        """
        self.calls["preview"] += 1
        patches = self.patches(tokens.to(self.device, self.dtype))  # (B, n, cells*cells, p*p*3)
        # mid grey is 0 in [-1, 1], so padding with zeros shows what is not drawn yet
        missing = grid[0] * grid[1] - tokens.shape[1]
        return self.assemble(F.pad(patches, (0, 0, 0, 0, 0, missing)), grid).float().clamp(-1, 1)

    def working_memory(self, images: int, patches: int) -> int:
        """Bytes beside the weights for encoding, decoding or drawing `images` of `patches` each."""
        config = self.config
        size, pixel = self.dtype.itemsize, config.pixel_decoder.embed_dim
        # they run one after the other, so the widest counts
        stages = (
            config.low_level_encoder.embed_dim * patches * size,
            config.semantic_decoder.embed_dim * patches * size,
            pixel * patches * self.cells**2 * 4,  # in float32
        )
        layer = 14 * max(stages)  # the stream, normed, q, k, v, and what is inside SwiGLU
        # keys and values of the semantic decoder: 98 KB a position in bf16 as published
        streamed = 2 * config.semantic_decoder.decoder_depth * config.semantic_decoder.embed_dim * patches * size
        block = 12 * pixel**2 * 4 if size < 4 else 0  # of the pixel decoder, its weights in float32
        return images * (layer + streamed) + block

    def stream(self, rows: int, capacity: int) -> SemanticStream:
        """A semantic decoder that takes the latents of `rows` images one at a time, `capacity` of each in all."""
        return SemanticStream(self, rows, capacity)

    def normalise(self, raw: Tensor) -> Tensor:
        # one mean and one scale for all channels: about N(0, 1), which is what the flow head starts from
        return (raw - self.config.mean) / self.config.scaling_factor

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents * self.config.scaling_factor + self.config.mean

    def patches(self, tokens: Tensor) -> Tensor:
        """Semantic tokens [B, N, D] -> patches [B, N, cells*cells, p*p*3], not clamped; float32 tokens in float32."""
        # (B, N*cells*cells, Dp); not in raster order, which makes no difference without positions
        x = rearrange(upcast_forward(self.sem_to_pix, tokens), "b n (cell d) -> b (n cell) d", cell=self.cells**2)
        return self.pixel_decoder(x).unflatten(1, (-1, self.cells**2))

    def assemble(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches as `patches` gives them -> pixels [B, 3, H, W]; cells of a token row by row, colour fastest."""
        return rearrange(
            patches,
            "b (h w) (x y) (p q c) -> b c (h x p) (w y q)",
            h=grid[0],
            x=self.cells,
            p=self.pixel_decoder.patch_size,
            c=3,
        )

    def check_features(self, features: Features) -> None:
        """Raises ValueError unless `features` hold images and were made by this tokenizer."""
        check_features("features", features)
        # shapes do not tell: features of another tokenizer would decode without an error, to a wrong picture
        if features.tokenizer != self.fingerprint:
            raise ValueError(
                f"these features belong to another tokenizer ({features.tokenizer[:12]}) than this one "
                f"({self.fingerprint[:12]}): make them with the MingTok of the model that is to use them"
            )
        widths = features.tokens.shape[2], features.latents.shape[1]
        own = self.config.semantic_decoder.embed_dim, self.config.low_level_encoder.out_dim
        if widths != own:
            raise ValueError(f"these features have {widths} channels in tokens and latents, not {own}: make them again")

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[0] == 0:
            raise ValueError(f"pixels must be [B, 3, H, W] with B at least 1, not {tuple(pixels.shape)}")
        for side in pixels.shape[2:]:
            if side == 0 or side % self.patch_size or side > MAX_GRID_FACTOR * self.native_side:
                raise ValueError(
                    f"pixels of {pixels.shape[3]}x{pixels.shape[2]}: both sides must be multiples of {self.patch_size} "
                    f"and at most {MAX_GRID_FACTOR * self.native_side}; ming_core.images resizes"
                )
        if not torch.isfinite(pixels).all():
            raise ValueError("pixels contain NaN or infinite values: repair the picture before encoding it")

    def check_latents(self, latents: Tensor) -> None:
        """Raises ValueError unless `latents` are normalised latents of images, as `encode` gives them."""
        # a host's own nodes may have blended, scaled or cropped them
        channels, most = self.config.low_level_encoder.out_dim, MAX_GRID_FACTOR * self.config.low_level_encoder.grid
        shape = tuple(latents.shape)
        if latents.ndim != 4 or latents.shape[0] == 0 or latents.shape[1] != channels:
            raise ValueError(
                f"latents must be [B, {channels}, h, w] with B at least 1, not {shape}: they come from another "
                f"tokenizer (MingTok latents have {channels} channels here); connect some that MingTok Encode made"
            )
        if not all(1 <= n <= most for n in shape[2:]):
            raise ValueError(
                f"latents of {shape[2]}x{shape[3]}: both sides must be from 1 to {most}; encode a smaller picture, or "
                "scale the latents down"
            )
        if not torch.isfinite(latents).all():
            raise ValueError("latents contain NaN or infinite values: repair them before expanding them")


class SemanticStream:
    """The semantic decoder, token by token: gives what it would give for all latents so far at once."""

    def __init__(self, mingtok: MingTok, rows: int, capacity: int) -> None:
        self.mingtok = mingtok
        config = mingtok.config.semantic_decoder
        options: dict[str, Any] = {"device": mingtok.device, "dtype": mingtok.dtype}
        heads = config.embed_dim // HEAD_DIM
        # all of it at once, so that a token copies nothing but its own: 25 MB for 256 tokens in bf16
        self.caches = LayerCaches(
            LayerCache(rows, heads, capacity, HEAD_DIM, **options) for _ in range(config.decoder_depth)
        )

    def append(self, latents: Tensor) -> Tensor:
        """The next normalised latents of each image [B, n, C] -> their features [B, n, D]."""
        # the flow head draws normalised latents, the semantic decoder was trained on raw ones
        raw = self.mingtok.denormalise(latents.float())
        return self.mingtok.semantic_decoder(raw.to(self.mingtok.dtype), self.caches)
