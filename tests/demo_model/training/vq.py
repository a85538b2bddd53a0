"""The demo model's visual tokenizer: a convolutional autoencoder with finite scalar quantization (FSQ).

It has the interface of NVIDIA's Cosmos discrete video tokenizer, in miniature: an image is a video of one frame, the
encoder returns `(indices, codes, loss)`, the decoder takes integer indices, and its state holds the FSQ levels as
`inv_quant.quantizer._levels`. It is exported as bfloat16 TorchScript.

FSQ is from Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (arXiv 2309.15505), sections 3.1 and A.1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = (5, 5, 5, 5)
CODEBOOK_SIZE = math.prod(LEVELS)
FACTOR = 32


class Quantizer(nn.Module):
    """Rounds each of d channels to one of its levels; the codebook is the grid of all combinations."""

    def __init__(self, levels: tuple[int, ...] = LEVELS):
        super().__init__()
        levels_tensor = torch.tensor(levels, dtype=torch.int32)
        basis = torch.cumprod(torch.tensor((1, *levels[:-1])), 0, dtype=torch.int32)
        self.register_buffer("_levels", levels_tensor)
        self.register_buffer("_basis", basis)
        digits = (torch.arange(math.prod(levels))[:, None] // basis) % levels_tensor  # [K, d]
        half = levels_tensor // 2
        self.register_buffer("implicit_codebook", (digits - half) / half)  # [K, d], about -1..1

    def forward(self, z: Tensor) -> Tensor:
        """[B, d, h, w] -> codes of the same shape; gradients pass straight through the rounding."""
        levels = self._levels.view(1, -1, 1, 1)
        half_length = (levels - 1) * 1.001 / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(z + torch.atanh(offset / half_length)) * half_length - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (levels // 2)

    def indices(self, codes: Tensor) -> Tensor:
        """Codes [B, d, h, w] -> indices [B, h, w]."""
        half = (self._levels // 2).view(1, -1, 1, 1)
        digits = (codes * half + half).round().to(torch.int32)
        return (digits * self._basis.view(1, -1, 1, 1)).sum(1, dtype=torch.int32)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of [B, C, h, w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mixer(channels: int) -> nn.Sequential:
    """A wide depthwise convolution, then two pointwise ones: cheap where the grid is small and the channels many."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
        ChannelNorm(channels),
        nn.Conv2d(channels, 3 * channels, 1),
        nn.GELU(),
        nn.Conv2d(3 * channels, channels, 1),
    )


def convolver(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ChannelNorm(channels),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def pointwise(channels: int) -> nn.Sequential:
    """Two pointwise convolutions: depth without a wider view."""
    return nn.Sequential(
        ChannelNorm(channels), nn.Conv2d(channels, 2 * channels, 1), nn.GELU(), nn.Conv2d(2 * channels, channels, 1)
    )


class Residual(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def down(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * channels_in, channels_out, 1))


def up(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, 4 * channels_out, 1), nn.PixelShuffle(2))


class Encoder(nn.Module):
    """Video [B, 3, 1, H, W] in [-1, 1] -> (indices [B, 1, h, w], codes [B, d, 1, h, w], loss).

    It sees each cell with a margin of four pixels and no more: the inside of a thing has the same tokens before every
    background, and a generator can put together pairs that it never saw.
    """

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, 64, 3, padding=1),
            down(64, 128),
            Residual(pointwise(128)),
            down(128, 224),
            Residual(pointwise(224)),
            down(224, 256),
            Residual(pointwise(256)),
            Residual(pointwise(256)),
            ChannelNorm(256),
            nn.Conv2d(256, len(LEVELS), 1),
        )
        self.quantizer = Quantizer()

    def forward(self, video: Tensor):
        codes = self.quantizer(self.net(video.squeeze(2)))
        indices = self.quantizer.indices(codes)
        return indices.unsqueeze(1), codes.unsqueeze(2), torch.zeros(1, dtype=video.dtype, device=video.device)


class InverseQuantizer(nn.Module):
    """Indices [B, 1, h, w] -> codes [B, d, h, w]."""

    def __init__(self):
        super().__init__()
        self.quantizer = Quantizer()

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices.squeeze(1).long(), self.quantizer.implicit_codebook).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """Indices [B, 1, h, w] -> video [B, 3, 1, 32h, 32w], about [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.inv_quant = InverseQuantizer()
        self.net = nn.Sequential(
            nn.Conv2d(len(LEVELS), 288, 3, padding=1),
            *[Residual(mixer(288)) for _ in range(4)],
            up(288, 160),
            Residual(mixer(160)),
            Residual(mixer(160)),
            up(160, 96),
            Residual(convolver(96)),
            Residual(convolver(96)),
            up(96, 48),
            Residual(convolver(48)),
            Residual(convolver(48)),
            ChannelNorm(48),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def forward(self, indices: Tensor) -> Tensor:
        return self.net(self.inv_quant(indices)).unsqueeze(2)


def reconstruction_loss(pixels: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error at four scales, and of the horizontal and vertical differences, which keeps edges sharp."""
    loss = F.l1_loss(pixels, target)
    for dim in (2, 3):
        loss = loss + F.l1_loss(pixels.diff(dim=dim), target.diff(dim=dim))
    for _ in range(3):
        pixels, target = F.avg_pool2d(pixels, 2), F.avg_pool2d(target, 2)
        loss = loss + 0.5 * F.l1_loss(pixels, target)
    return loss
