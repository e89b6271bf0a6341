"""A 16-channel TAESD in plain torch, with the tensor names that ComfyUI's VAE loader knows, and how it is trained."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The latent format of the transformer: processed = (latent - SHIFT) * SCALE. Stored in the file, so the encoder's own
# output is the processed latent.
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159
CHANNELS = 16
WIDTH = 64
DOWNSCALE = 8
# Largest noise added to latents while training: a sampled latent is never exact.
LATENT_NOISE = 0.15


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions around a skip, [B, 64, h, w] -> the same."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def conv(channels_in: int, channels_out: int, **options) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **options)


def build_encoder() -> nn.Sequential:
    layers = [conv(3, WIDTH), Block()]
    for _ in range(3):
        layers += [conv(WIDTH, WIDTH, stride=2, bias=False), Block(), Block(), Block()]
    return nn.Sequential(*layers, conv(WIDTH, CHANNELS))


def build_decoder() -> nn.Sequential:
    layers = [Clamp(), conv(CHANNELS, WIDTH), nn.ReLU()]
    for _ in range(3):
        layers += [Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(*layers, Block(), conv(WIDTH, 3))


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.taesd_encoder = build_encoder()
        self.taesd_decoder = build_decoder()
        self.vae_scale = nn.Parameter(torch.tensor(LATENT_SCALE), requires_grad=False)
        self.vae_shift = nn.Parameter(torch.tensor(LATENT_SHIFT), requires_grad=False)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1 -> latents [B, 16, H/8, W/8] as ComfyUI's VAE gives them."""
        return self.taesd_encoder(x * 0.5 + 0.5) / self.vae_scale + self.vae_shift

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, h, w] -> pictures [B, 3, 8h, 8w], about -1..1."""
        return (self.taesd_decoder((latents - self.vae_shift) * self.vae_scale) - 0.5) * 2

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> processed latents [B, 16, H/8, W/8], as the transformer sees them."""
        return self.taesd_encoder(to_channels(pictures))

    def decode_pictures(self, latents: Tensor) -> Tensor:
        """Processed latents -> uint8 [B, H, W, 3], truncated to 8 bit as the official code does."""
        pictures = self.taesd_decoder(latents).float().clamp(0, 1)
        return (pictures * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_channels(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in 0..1, channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def initialize(model: Autoencoder) -> None:
    """He initialisation; each block's last convolution starts small, so that depth does not blow up the sums."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Block):
            module.conv[4].weight.data.mul_(0.2)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels of [B, C, H, W], along rows and along columns."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(result: Tensor, target: Tensor) -> Tensor:
    """Absolute, squared and edge error of pictures [B, 3, H, W] in 0..1."""
    edge_error = sum(F.l1_loss(a, b) for a, b in zip(edges(result), edges(target), strict=True))
    return F.l1_loss(result, target) + 2 * F.mse_loss(result, target) + 0.5 * edge_error


def channel_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, [16] each."""
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)).clamp(min=1e-4)


def autoencoder_loss(model: Autoencoder, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """One training step's loss for uint8 pictures [B, H, W, 3].

    Latents are normalised per channel over the batch; `fold_normalization` later puts this into the encoder. A random share of the
    batch gets more noise on its latents than the rest.
    """
    target = to_channels(pictures)
    latents = model.taesd_encoder(target).float()
    mean, std = channel_statistics(latents)
    latents = (latents - mean[:, None, None]) / std[:, None, None]
    strength = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device, generator=generator)
    noise = torch.randn(latents.shape, device=latents.device, generator=generator)
    result = model.taesd_decoder(latents + strength * noise).float()
    # Without a pull towards unit size the last convolution's scale is free and drifts.
    drift = mean.square().mean() + (std - 1).square().mean()
    return reconstruction_loss(result, target) + 0.01 * drift


@torch.no_grad()
def fold_normalization(model: Autoencoder, pictures: Tensor, batch: int = 64) -> None:
    """Change the encoder's last convolution so that its output has zero mean and unit variance per channel over these pictures."""
    latents = torch.cat([model.encode_pictures(part).float() for part in pictures.split(batch)])
    mean, std = channel_statistics(latents)
    last = model.taesd_encoder[-1]
    last.weight.div_(std[:, None, None, None])
    last.bias.sub_(mean).div_(std)


@torch.no_grad()
def round_trip(model: Autoencoder, pictures: Tensor, batch: int = 64) -> Tensor:
    """uint8 [B, H, W, 3] -> uint8 of the same shape after encoding and decoding."""
    return torch.cat([model.decode_pictures(model.encode_pictures(part)) for part in pictures.split(batch)])
