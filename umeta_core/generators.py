"""Generative models as makers of tasks: a VAE, a GAN that seeks modes, and an adapter for anybody's generator (LASIUM).

Facts that the paper leaves out are from the authors' code: strides, latent sizes, losses and their reductions.
Where TensorFlow pads (or cuts) an odd number of pixels, it puts the odd one after the image; the layers here put it
before. That is the same network seen in a mirror.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import one_of
from .data import as_floats
from .embeddings.base import Embedding
from .evaluation import evaluating
from .networks import glorot_uniform

# Layers of a VAE, (filters, kernel, stride): encoder, then decoder, which starts with 64 maps. By size of the images.
LAYERS = {
    28: (((64, 3, 2), (64, 3, 2), (64, 3, 1), (64, 3, 1)), ((64, 3, 2), (64, 3, 2), (64, 3, 1), (64, 3, 1))),
    84: (((64, 4, 2), (128, 4, 2), (256, 4, 2), (256, 4, 2), (512, 4, 2)),
         ((512, 4, 3), (256, 4, 2), (256, 4, 2), (128, 4, 1), (64, 4, 1))),
}  # fmt: skip
LATENT = {28: 20, 84: 500}  # numbers in z: Omniglot and CelebA; the code has 512 for mini-ImageNet
MAPS = 64
SLOPE = 0.2  # of the GAN's LeakyReLU below zero
ADAM_EPS, NORM_EPS, NORM_MOMENTUM = 1e-7, 1e-3, 0.01  # Keras' defaults; it calls the last one 0.99


class Generator(Embedding):
    """A map from latent vectors z to images of `shape` = (C, H, W), ink 1 on background 0.

    One that is trained defines `decode` and what `Embedding.fit` needs. `watch`, if set, is called before each epoch as
    ``watch(self, epochs done)``, to draw samples or to save the weights on the way; it must not draw random numbers
    from the generator of the fit.
    """

    latent: int
    shape: tuple[int, int, int]
    sphere = False  # whether z lies on the unit sphere
    watch: Callable[[Generator, int], None] | None = None

    def decode(self, z: Tensor) -> Tensor:
        """Images ``[n, C, H, W]`` in [0, 1] of vectors ``[n, latent]``, with gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, z: Tensor, chunk: int = 500) -> Tensor:
        """Images ``[n, C, H, W]``, float32 in [0, 1], of vectors ``[n, latent]``, each on its own; no gradients.

        ValueError: vectors of another size.
        """
        if z.dim() != 2 or z.shape[1] != self.latent:
            raise ValueError(f"z of shape {tuple(z.shape)}, but this generator takes [n, {self.latent}]")
        with evaluating(self):
            images = torch.cat([self.decode(part) for part in z.split(chunk)])
        return images

    def prior(self, n: int, generator: torch.Generator) -> Tensor:
        """z ``[n, latent]`` from N(0, I), divided by their norms if z lies on the unit sphere."""
        z = torch.randn(n, self.latent, generator=generator, device=generator.device)
        return F.normalize(z, dim=1) if self.sphere else z

    def start_epoch(self, images: Tensor, epoch: int, epochs: int, generator: torch.Generator) -> Tensor:
        if self.watch is not None:
            self.watch(self, epoch)
        return super().start_epoch(images, epoch, epochs, generator)

    def _pixels(self, images: Tensor) -> Tensor:
        """What the networks see of images, uint8 or in [0, 1]."""
        self.check_shape(images)
        images = as_floats(images) if images.dtype == torch.uint8 else images
        return images.contiguous(memory_format=torch.channels_last)

    def _ready(self, generator: torch.Generator | None) -> None:
        """Initial weights, and the memory format that is fastest on CPU and GPU."""
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                layer.weight.data.copy_(glorot_uniform(layer.weight.shape, generator))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)


class VAE(Generator):
    """Variational autoencoder (Kingma & Welling, 2014); as an embedding, the posterior's mean (LASIUM, section 4.2).

    The paper's eight convolutions of stride 2 do not give 28x28 pixels; strides and the network for 84x84 pixels are
    those of the authors' code. An update at 28x28 with 128 images takes 0.47 s on one CPU core, 0.27 s in bfloat16.

    Args:
        channels, size: of the square images; 28 (Omniglot) or 84 (CelebA, mini-ImageNet), others with `layers`.
        latent: numbers in z; None: 20 for 28 pixels and 500 for 84 (mini-ImageNet: 512).
        layers: of the encoder and the decoder, as in `LAYERS`.
        beta: weight of the KL divergence. None: 1 / latent, as the authors' code averages it over z; the textbook's
            bound has 1.
        norm: "batch", whose averages need some 500 updates to be right (Keras' momentum); or "fixed": batch norm never
            sees a batch, only its scales and shifts are learned. In the authors' code Keras has it in inference mode
            while it trains, as far as can be told without running it.
        lr: of Adam.
        autocast: bfloat16 convolutions; None: on a GPU that can (Ampere or later).
        generator: source of the initial weights, Glorot-uniform.

    Raises:
        ValueError: no layers for this size, or layers that do not lead back to it.
    """

    def __init__(
        self, channels=1, size=28, latent: int | None = None, *, layers=None, beta: float | None = None, norm="batch",
        lr=1e-3, autocast: bool | None = None, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        if layers is None and size not in LAYERS:
            raise ValueError(f"no VAE for {size}x{size} images; use 28x28 or 84x84, or give its layers")
        one_of("norm", norm, ("batch", "fixed"))
        down, up = layers or LAYERS[size]
        self.shape = self.takes = (channels, size, size)
        self.d = latent or LATENT.get(size, 20)
        self.latent, self.lr, self.norm, self.autocast = self.d, lr, norm, autocast
        self.beta = 1 / self.d if beta is None else beta
        enlarged = math.prod(stride for *_, stride in up)
        if size % enlarged:
            raise ValueError(f"a decoder that enlarges {enlarged} times does not make {size}x{size} images")
        self.encoder, features = _encoder(channels, size, down)
        self.mean, self.log_var = nn.Linear(features, self.d), nn.Linear(features, self.d)
        self.decoder = _decoder(self.d, size // enlarged, up, channels)
        self._ready(generator)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for everything."""
        return [torch.optim.Adam(self.parameters(), lr=self.lr, eps=ADAM_EPS, fused=True)]

    def step(self, images: Tensor, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One update; the losses are in nats per image: of the pixels, and the KL divergence before its weight."""
        x = self._pixels(images[index])
        noise = torch.randn(len(x), self.latent, generator=generator, device=x.device)
        reconstruction, kl = self.losses(x, noise)
        loss = reconstruction + self.beta * kl
        self.opt[0].zero_grad(set_to_none=True)
        loss.backward()
        self.opt[0].step()
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl}

    def losses(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`reconstruction_loss` and `kl_divergence` of images ``[n, C, H, W]`` in [0, 1]; noise ``[n, latent]``.

        (eq-vae-bound)
        """
        mean, log_var = self._statistics(x)
        logits = self._logits(mean + (log_var / 2).exp() * noise)
        return reconstruction_loss(x, logits), kl_divergence(mean, log_var)

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's means ``[n, latent]`` of images ``[n, C, H, W]`` in [0, 1]."""
        return self._statistics(self._pixels(x))[0]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations ``[n, latent]`` of z given images ``[n, C, H, W]`` in [0, 1]."""
        mean, log_var = self._statistics(self._pixels(x))
        return mean, (log_var / 2).exp()

    def decode(self, z: Tensor) -> Tensor:
        return self._logits(z).sigmoid()

    def train(self, mode: bool = True) -> VAE:
        super().train(mode)
        if self.norm == "fixed":
            for layer in self.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval()
        return self

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast_for(x):
            h = self.encoder(x)
        return self.mean(_full(h)), self.log_var(_full(h))

    def _logits(self, z: Tensor) -> Tensor:
        with self.autocast_for(z):
            return _full(self.decoder(z))


def reconstruction_loss(x: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of pixels x in [0, 1], summed over an image's pixels and averaged over images ``[n, C, H, W]``."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def kl_divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, I)) of ``[n, latent]``, summed over latents and averaged over images. (eq-vae-kl)"""
    return (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean() / 2


class MSGAN(Generator):
    """GAN with a reward for images that differ as much as their latents do (Mao et al., 2019; LASIUM, section 4.2).

    Neither network has batch norm. The discriminator's logit is positive for *generated* images, and its labels are
    1 and 0 plus noise, 0.05 U(0, 1); the generator wants the sum of the logits of two images to be negative (reference
    code, not in the paper). An update with 128 images takes 1.4 s on one CPU core, 0.44 s in bfloat16.
    (eq-gan-generator)

    Args:
        channels, size: of the square images; size a multiple of 4.
        latent: numbers in z.
        width: filters of the generator; the discriminator has half as many in its first layer.
        ratio: "released", LASIUM's code: the mean of ratios whose first latents are not those that made the first
            images, so that the denominators are all but constant; "original", MSGAN's code: the ratio of means over the
            batch, with the latents of both images. See `mode_seeking`.
        seeking: weight of that term; 0 for a plain GAN.
        lr: of both Adams.
        autocast: bfloat16 convolutions; None: on a GPU that can (Ampere or later).
        generator: source of the initial weights, Glorot-uniform.

    Raises:
        ValueError: images whose size is not a multiple of 4, or an unknown ratio.
    """

    def __init__(
        self, channels=1, size=28, latent=128, *, width=128, ratio="released", seeking=1.0, lr=3e-4,
        autocast: bool | None = None, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        if size % 4:
            raise ValueError(f"MSGAN takes images of a size divisible by 4, not {size}x{size}; load them resized")
        one_of("ratio", ratio, ("released", "original"))
        self.shape = self.takes = (channels, size, size)
        self.latent, self.lr, self.autocast = latent, lr, autocast
        self.ratio, self.seeking = ratio, seeking
        side = size // 4
        self.generator = nn.Sequential(
            nn.Linear(latent, side * side * width), _leaky(), _Maps(width, side),
            _up(width, width, 4, 2), _leaky(), _up(width, width, 4, 2), _leaky(), ToPixels(width, channels, 7),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, 2, 1), _leaky(), nn.Conv2d(width // 2, width, 3, 2, 1), _leaky(),
            nn.Conv2d(width, width, 3, 2, 1), _leaky(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(width, 1),
        )  # fmt: skip
        self._ready(generator)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the discriminator, Adam for the generator."""
        return [torch.optim.Adam(network.parameters(), lr=self.lr, eps=ADAM_EPS, fused=True)
                for network in (self.discriminator, self.generator)]  # fmt: skip

    def step(self, images: Tensor, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The discriminator moves on real images and the first half of the generated ones, then the generator."""
        x = self._pixels(images[index])
        n = len(x)
        z = self.prior(3 * n, generator)
        label_noise = 0.05 * torch.rand(2, n, generator=generator, device=x.device)
        made = self.decode(z[: 2 * n])
        judged = self.discriminate(torch.cat([made[:n].detach(), x])).view(2, n)
        theirs = discriminator_loss(judged, label_noise)
        self.move(self.opt[0], theirs, self.discriminator)
        deceiving = F.softplus(self.discriminate(made).view(2, n).sum(0)).mean()  # cross-entropy with label 0
        first = z[:n] if self.ratio == "original" else z[2 * n :]
        modes = mode_seeking(made[:n], made[n:], first, z[n : 2 * n], self.ratio)
        self.move(self.opt[1], deceiving + self.seeking * modes, self.generator)
        return {"discriminator": theirs, "generator": deceiving, "modes": modes}

    def decode(self, z: Tensor) -> Tensor:
        with self.autocast_for(z):
            logits = _full(self.generator(z))
        return logits.sigmoid()

    def discriminate(self, x: Tensor) -> Tensor:
        """Logits ``[n]`` of being generated, of images ``[n, C, H, W]`` in [0, 1]."""
        with self.autocast_for(x):
            return _full(self.discriminator(x)).squeeze(1)


def discriminator_loss(logits: Tensor, label_noise: Tensor) -> Tensor:
    """Cross-entropy of logits ``[2, n]`` of generated (label 1) and real images (0); the noise is added to the labels.

    A label above 1 is not a probability, and the loss has no lower bound there (reference code). (eq-gan-discriminator)
    """
    labels = torch.stack([label_noise[0] + 1, label_noise[1]])
    return F.binary_cross_entropy_with_logits(logits, labels)


def mode_seeking(x1: Tensor, x2: Tensor, z1: Tensor, z2: Tensor, ratio: str = "original") -> Tensor:
    """One over how far apart images are for the distance of their latents (Mao et al., 2019, eq. 3; their code's 1/.).

    x1, x2: images ``[n, C, H, W]``; z1, z2: latents ``[n, latent]``. Distances are means of absolute differences, over
    the whole batch ("original") or per pair, whose ratios are averaged ("released", LASIUM's code). (eq-mode-seeking)
    """
    one_of("ratio", ratio, ("released", "original"))
    images, latents = (x1 - x2).abs().flatten(1).mean(1), (z1 - z2).abs().mean(1)
    apart = (images / latents).mean() if ratio == "released" else images.mean() / latents.mean()
    return 1 / (apart + 1e-5)


class GivenGenerator(Generator):
    """Somebody's trained generator, for example a ProGAN or a BigBiGAN; `fit` does nothing.

    Args:
        make: maps z ``[n, latent]`` to square images ``[n, channels, h, h]``; a module moves along with ``to``.
        latent: numbers in z.
        channels, size: of the images that `generate` returns; others are resized to it, antialiased (not in LASIUM's
            code).
        output: least and greatest value of a pixel that `make` returns; mapped to 0 and 1.
        clip: cut values outside that range, as for networks whose last layer is linear; otherwise they are an error.
        sphere: z has length 1 (ProGAN), rather than being N(0, I).

    Raises:
        ValueError (when generating): images of another shape, NaN, or values outside `output`.
    """

    def __init__(
        self, make: Callable[[Tensor], Tensor], latent: int, *, channels=3, size=84, output=(0.0, 1.0), clip=False,
        sphere=False,
    ):  # fmt: skip
        super().__init__()
        if not output[0] < output[1]:
            raise ValueError(f"output={output} is no range; give the least and the greatest value of a pixel")
        self.make, self.latent, self.shape = make, latent, (channels, size, size)
        self.output, self.clip, self.sphere = output, clip, sphere
        self.eval()

    def fit(self, images: Tensor | None = None, **settings) -> dict:
        """Nothing to do."""
        return {"epoch": [], "seconds": 0.0}

    def decode(self, z: Tensor) -> Tensor:
        images = self.make(z)
        self._check(images, len(z))
        low, high = self.output
        images = ((images.float() - low) / (high - low)).clamp(0, 1)
        if images.shape[1:] == self.shape:
            return images
        return F.interpolate(images, self.shape[1:], mode="bilinear", antialias=True).clamp(0, 1)

    def _check(self, images: Tensor, n: int) -> None:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        if not isinstance(images, Tensor) or len(shape) != 4 or shape[:2] != (n, self.shape[0]) or shape[2] != shape[3]:
            raise ValueError(f"for {n} vectors the generator returned {shape}, not square images "
                             f"[{n}, {self.shape[0]}, h, h]; wrap it so that it does")  # fmt: skip
        low, high = (value.item() for value in images.detach().aminmax())
        if math.isnan(low):
            raise ValueError(f"the generator returned NaN among the images of {n} vectors")
        slack = 1e-3 * (self.output[1] - self.output[0])
        if not self.clip and (low < self.output[0] - slack or high > self.output[1] + slack):
            raise ValueError(f"the generator returned values from {low:.4g} to {high:.4g}, outside "
                             f"output={self.output}; give its range, or clip=True if it overshoots")  # fmt: skip


def interpolate(generator: Generator, z0: Tensor, z1: Tensor, steps: int) -> Tensor:
    """Images ``[n, steps, C, H, W]`` on the straight way from z0 to z1, both ``[n, latent]``, ends included.

    Where z lies on the unit sphere, the way is projected onto it.
    """
    share = torch.linspace(0, 1, steps, device=z0.device).view(1, -1, 1)
    z = torch.lerp(z0.unsqueeze(1), z1.unsqueeze(1), share)
    z = F.normalize(z, dim=2) if generator.sphere else z
    return generator.generate(z.flatten(0, 1)).unflatten(0, z.shape[:2])


class _Maps(nn.Module):
    """Vectors -> maps ``[n, maps, side, side]``."""

    def __init__(self, maps: int, side: int):
        super().__init__()
        self.shape = (maps, side, side)

    def forward(self, h: Tensor) -> Tensor:
        return h.unflatten(1, self.shape).contiguous(memory_format=torch.channels_last)


class Enlarge(nn.ConvTranspose2d):
    """A transposed convolution whose bias is a sum of its own: PyTorch's gradient of a transposed convolution's bias
    takes as long as those of its weights and its input together on a CPU."""

    def forward(self, h: Tensor) -> Tensor:
        h = F.conv_transpose2d(h, self.weight, None, self.stride, self.padding, self.output_padding)
        return h if self.bias is None else h + self.bias.to(h.dtype).view(-1, 1, 1)


class ToPixels(nn.Conv2d):
    """A convolution to very few channels, with an odd kernel and zero padding.

    Written as a matrix product that computes what each pixel adds to each of its neighbors, and a sum of those: half
    the time of a convolution on a CPU, whose kernels are made for many channels. On a GPU it is the convolution: there
    the derivative of that sum would launch a kernel for each image.
    """

    def __init__(self, maps: int, channels: int, kernel: int):
        super().__init__(maps, channels, kernel, padding=kernel // 2)

    def forward(self, h: Tensor) -> Tensor:
        if h.is_cuda:
            return super().forward(h)
        n, maps, height, width = h.shape
        taps = self.weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, maps)
        parts = F.linear(h.permute(0, 2, 3, 1).reshape(n, -1, maps), taps)  # [n, pixels, channels * taps]
        image = F.fold(parts.transpose(1, 2), (height, width), self.kernel_size, padding=self.padding)
        return image + self.bias.view(-1, 1, 1)


def _full(h: Tensor) -> Tensor:
    """bfloat16 -> float32; losses and sigmoids need the digits."""
    return h.float() if h.dtype == torch.bfloat16 else h


def _leaky() -> nn.LeakyReLU:
    return nn.LeakyReLU(SLOPE, inplace=True)


def _norm(maps: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(maps, eps=NORM_EPS, momentum=NORM_MOMENTUM)


def _encoder(channels: int, size: int, layers) -> tuple[nn.Sequential, int]:
    """Convolutions with batch norm and ReLU, flattened; and how many numbers come out."""
    parts, maps = [], channels
    for filters, kernel, stride in layers:
        parts += [_down(maps, filters, kernel, stride, size), _norm(filters), nn.ReLU(inplace=True)]
        maps, size = filters, -(-size // stride)
    return nn.Sequential(*parts, nn.Flatten()), maps * size * size


def _decoder(latent: int, side: int, layers, channels: int) -> nn.Sequential:
    """z -> logits of the pixels; the last convolution has the kernel of the one before."""
    parts, maps = [nn.Linear(latent, MAPS * side * side), nn.ReLU(inplace=True), _Maps(MAPS, side)], MAPS
    for filters, kernel, stride in layers:
        parts += [_up(maps, filters, kernel, stride, bias=False), _norm(filters), nn.ReLU(inplace=True)]
        maps = filters
    return nn.Sequential(*parts, _up(maps, channels, kernel, 1))


def _down(maps: int, filters: int, kernel: int, stride: int, size: int) -> nn.Module:
    """A convolution to ceil(size / stride) pixels, without bias (TensorFlow's SAME, mirrored)."""
    if stride == 1:
        return _up(maps, filters, kernel, 1, bias=False)
    missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return nn.Conv2d(maps, filters, kernel, stride, -(-missing // 2), bias=False)


def _up(maps: int, filters: int, kernel: int, stride: int, bias: bool = True) -> nn.Module:
    """A transposed convolution to stride times as many pixels (TensorFlow's SAME, mirrored).

    With stride 1 that is a convolution.
    """
    before = (kernel - 1) // 2
    if stride == 1 and kernel % 2:
        return nn.Conv2d(maps, filters, kernel, padding=before, bias=bias)
    if stride == 1:
        margin = nn.ZeroPad2d((before, kernel - 1 - before) * 2)
        return nn.Sequential(margin, nn.Conv2d(maps, filters, kernel, bias=bias))
    surplus = kernel - stride
    return Enlarge(maps, filters, kernel, stride, -(-surplus // 2), surplus % 2, bias=bias)
