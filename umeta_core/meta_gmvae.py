"""Meta-GMVAE (Lee et al., 2021): a VAE of sets, whose prior is a mixture of Gaussians fitted by EM to every episode.

Shapes: T episodes of M unlabeled images x, N Monte Carlo samples z of d numbers for each image, K components. What
departs from the paper is from the authors' code: the set blocks, the mean over M in the objective, weight decay and
the E-step at test time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import one_of
from .data import ImageSet, as_floats
from .em import Mixture, em, labeled_start, random_start
from .episodes import Episodes
from .evaluation import evaluating
from .fast_conv4 import Geometry, batch_statistics, channels_last, conv_block
from .losses import check_equal_weights
from .noise import CountedNoise, noise_of_tasks

LOG_2PI = math.log(2 * math.pi)
CACHE = 1 << 18  # numbers of a map that are handled at a time on a CPU
MEMORY = 1 << 26  # numbers in the samples of sets that an inductive test handles at a time; EM needs several times that


class UnlabeledSets:
    """Episodes of images drawn with replacement from a pool, labels never looked at (reference code: RandomSampler).

    `features` ``[n, d]``, float, are what the episodes show instead of the images.
    """

    def __init__(self, images: ImageSet, features: Tensor | None = None):
        if features is not None and len(features) != len(images):
            raise ValueError(f"the features are of {len(features)} images but {images.name} {images.split} has "
                             f"{len(images)}")  # fmt: skip
        if features is not None and not torch.isfinite(features).all():
            raise ValueError("some features are not finite; fit the embedding again")
        self.images = images
        self.features = None if features is None else features.to(images.labels.device)

    def sample(self, tasks: int, way: int, shot: int, query: int, generator: torch.Generator) -> Episodes:
        """`tasks` sets of M = way * (shot + query) images; plainest with way 1, shot M, query 0."""
        device = self.images.labels.device
        shape = (tasks, way, shot + query)
        index = torch.randint(len(self.images), shape, generator=generator, device=device)
        if self.features is not None:
            x = self.features[index]
        else:
            x = self.images.shown(index)
        return Episodes(x[:, :, :shot], x[:, :, shot:])


# Networks ------------------------------------------------------------------------------------------------------------


class SetBlock(nn.Module):
    """Self-attention between the members of a set ``[S, M, width]``, as released, without layer norm.

    Against a transformer's layer: what attention adds to is the *projected* query, scores are divided by the root of
    the whole width and not of a head's, and one linear layer with ReLU is added after (the paper's Table 3 has ELU).
    (eq-gmvae-block)
    """

    def __init__(self, width: int, heads: int = 4, generator: torch.Generator | None = None):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads cannot share {width} features; use a divisor")
        self.heads, self.scale = heads, width**-0.5
        self.query, self.key, self.value, self.out = (_linear(width, width, generator) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(f(x)) for f in (self.query, self.key, self.value))
        h = q + F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        h = h.transpose(1, 2).flatten(2)
        return h + F.relu(self.out(h))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class NormBlock(nn.Module):
    """Convolution without bias, batch norm and ReLU on channels-last maps: the numbers of PyTorch's layers, faster.

    Training uses the statistics of the batch and averages them as BatchNorm2d does; evaluation has the averages. `pool`
    is a max-pool that halves the maps and rounds up. `up` is a transposed convolution, of stride 2.
    """

    def __init__(self, channels: int, filters: int, kernel=3, *, pool=False, up=False, generator=None):
        super().__init__()
        self.up, self.pool = up, pool
        shape = (channels, filters) if up else (filters, channels)
        self.weight = nn.Parameter(_uniform((*shape, kernel, kernel), shape[1] * kernel**2, generator))
        self.scale, self.shift = nn.Parameter(torch.ones(filters)), nn.Parameter(torch.zeros(filters))
        self.register_buffer("running_mean", torch.zeros(filters))
        self.register_buffer("running_var", torch.ones(filters))

    def forward(self, x: Tensor) -> Tensor:
        fused = self.training and self.pool and x.shape[2] % 2 == 0  # for even sides, rounding does not matter
        x = self._on_batch(channels_last(x), fused) if self.training else F.relu(self._on_averages(channels_last(x)))
        return F.max_pool2d(x, 2, ceil_mode=True) if self.pool and not fused else x

    def _on_batch(self, x: Tensor, fused: bool) -> Tensor:
        if fused:
            pixels = len(x) * x.shape[2] * x.shape[3]
            x, mean, var = conv_block(x, self.weight, self.scale, self.shift, Geometry())
        else:
            weight = channels_last(self.weight)
            y = F.conv_transpose2d(x, weight, None, 2, 1) if self.up else F.conv2d(x, weight, padding=1)
            pixels = y.numel() // y.shape[1]
            x, mean, var = _NormRelu.apply(channels_last(y), self.scale, self.shift)
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var * pixels / (pixels - 1), 0.1)
        return x

    def _on_averages(self, x: Tensor) -> Tensor:
        gain = self.scale * torch.rsqrt(self.running_var + Geometry.eps)
        shift = self.shift - self.running_mean * gain
        if self.up:
            return F.conv_transpose2d(x, self.weight * gain.view(1, -1, 1, 1), shift, 2, 1)
        return F.conv2d(x, self.weight * gain.view(-1, 1, 1, 1), shift, padding=1)


class _NormRelu(torch.autograd.Function):
    """Batch norm with batch statistics, then ReLU: output, mean and biased variance of channels-last ``[n, C, H, W]``.

    On a CPU some images at a time, which stay in the cache from one pass over them to the next.
    """

    @staticmethod
    def forward(ctx, y, scale, shift):
        ctx.images = max(1, CACHE // y[0].numel()) if y.device.type == "cpu" else len(y)
        mean, var = batch_statistics(y)
        r = torch.rsqrt(var + Geometry.eps)
        gain = scale * r
        gain, offset = (v.repeat(y.shape[2] * y.shape[3]) for v in (gain, shift - mean * gain))
        out = torch.empty_like(y)
        for part, done in _parts(ctx.images, y, out):
            torch.addcmul(offset, part, gain, out=done).relu_()
        ctx.save_for_backward(y, out, mean, r, scale)
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx, gout, *_):
        """``gy = k (relu'(out) gout - mean(..) - h mean(.. h))`` with h the normalized y, as in `fast_conv4.Block`."""
        y, out, mean, r, scale = ctx.saved_tensors
        channels, pixels = y.shape[1], y.shape[2] * y.shape[3]
        gy = torch.empty_like(y)
        gshift, with_y = torch.zeros_like(mean), torch.zeros_like(mean)
        for g, o, part, u in _parts(ctx.images, channels_last(gout), out, y, gy):
            torch.ops.aten.threshold_backward.grad_input(g, o, 0, grad_input=u)
            ones = u.new_ones(u.numel() // channels)
            gshift.addmv_(u.view(-1, channels).t(), ones)
            with_y.addmv_((u * part).view(-1, channels).t(), ones)
        gscale = r * (with_y - mean * gshift)
        k, n = scale * r, len(y) * pixels
        slope = -k * r * gscale / n
        k, slope, base = (v.repeat(pixels) for v in (k, slope, -k * gshift / n - slope * mean))
        for part, u in _parts(ctx.images, y, gy):
            u.mul_(k).add_(torch.addcmul(base, part, slope))
        return gy, gscale, gshift


def _parts(images: int, *maps: Tensor):
    """Channels-last maps ``[n, C, H, W]`` side by side, some images at a time, as rows ``[images, H*W*C]``."""
    return zip(*(x.permute(0, 2, 3, 1).flatten(1).split(images) for x in maps))


def sides(size: int) -> list[int]:
    """Sides of the maps: halved four times, rounded up. 28, 14, 7, 4, 2."""
    return [size] + [(size := -(-size // 2)) for _ in range(4)]


class ImageEncoder(nn.Sequential):
    """Conv-4 with max-pools that round up (paper, Table 3): images ``[n, C, H, W]`` to features ``[n, 256]``."""

    def __init__(self, channels=1, size=28, filters=64, generator: torch.Generator | None = None):
        widths = [channels] + 4 * [filters]
        blocks = [NormBlock(a, b, pool=True, generator=generator) for a, b in zip(widths, widths[1:])]
        super().__init__(*blocks, nn.Flatten())
        self.features = filters * sides(size)[-1] ** 2


class ImageDecoder(nn.Module):
    """Latents to images of independent Bernoulli pixels (paper, Table 4): MLP, then transposed convolutions."""

    def __init__(self, latent=64, channels=1, size=28, filters=64, generator: torch.Generator | None = None):
        super().__init__()
        if size % 2:
            raise ValueError(f"no decoder for {size}x{size} images; use an even size")
        first, *targets, _ = reversed(sides(size))  # 2; 4, 7, 14; 28
        self.latent, self.shape = latent, (filters, first, first)
        width = filters * first**2
        widths = [latent, width, width, width]
        self.mlp = nn.Sequential(
            *(f for a, b in zip(widths, widths[1:]) for f in (_linear(a, b, generator), nn.ELU(inplace=True)))
        )
        self.blocks = nn.Sequential(
            *(NormBlock(filters, filters, 4 - side % 2, up=True, generator=generator) for side in targets)
        )
        self.weight = nn.Parameter(_uniform((filters, channels, 4, 4), 16 * channels, generator))
        self.bias = nn.Parameter(_uniform((channels,), 16 * channels, generator))

    def logits(self, z: Tensor) -> Tensor:
        """Logits of the pixels, ``[n, C, H, W]``, of latents ``[n, d]``.

        On a CPU the last transposed convolution is a matrix product and a sum of overlaps: few channels suit no kernel.
        On a GPU the derivative of that sum would launch a kernel for each image.
        """
        h = self.blocks(self.mlp(z).unflatten(1, self.shape))
        if h.is_cuda:
            return F.conv_transpose2d(h, self.weight, self.bias, 2, 1)
        parts = h.permute(0, 2, 3, 1).flatten(1, 2) @ self.weight.flatten(1)  # [n, pixels, channels * 16]
        size = [2 * side for side in h.shape[2:]]
        return F.fold(parts.transpose(1, 2), size, 4, stride=2, padding=1) + self.bias.view(-1, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Means of the pixels, ``[n, C, H, W]``, of latents ``[n, d]``."""
        return self.logits(z).sigmoid()

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), ``[T, M, N]``, of images ``[T, M, C, H, W]`` in [0, 1] under samples ``[T, M, N, d]``."""
        logits = self.logits(z.flatten(0, 2)).unflatten(0, z.shape[:3])
        pixels = x.unsqueeze(2).expand_as(logits)
        return -F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").flatten(3).sum(3)


class FeatureDecoder(nn.Sequential):
    """Latents to features, which end in a ReLU themselves (paper, Table 8): ``[n, d]`` to ``[n, features]``.

    Args:
        calibrated: the Gaussian's variance is the mean squared error of what is decoded at a time (paper, App. B.2,
            after Rybkin et al. 2020); False: the log-likelihood is minus the sum of squared errors (reference code).
    """

    def __init__(self, features=256, latent=64, *, calibrated=False, generator: torch.Generator | None = None):
        widths = [latent, 2 * features, 2 * features, features]
        super().__init__(
            *(f for a, b in zip(widths, widths[1:]) for f in (_linear(a, b, generator), nn.ReLU(inplace=True)))
        )
        self.latent, self.calibrated = latent, calibrated

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), ``[T, M, N]``, of features ``[T, M, features]`` under samples ``[T, M, N, d]``."""
        error = (self(z) - x.unsqueeze(2)).square().sum(3)
        if not self.calibrated:
            return -error
        width = x.shape[2]
        variance = error.detach().mean() / width  # its own gradient is zero at the optimum
        return -(error / variance + width * (variance.log() + LOG_2PI)) / 2


def _uniform(shape: tuple[int, ...], fan: int, generator: torch.Generator | None) -> Tensor:
    """U(-1/sqrt(fan), 1/sqrt(fan)): what PyTorch gives a new layer, from a generator of our own."""
    return torch.empty(shape).uniform_(-(fan**-0.5), fan**-0.5, generator=generator)


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    layer.weight.data, layer.bias.data = (_uniform(p.shape, inputs, generator) for p in layer.parameters())
    return layer


# The model -----------------------------------------------------------------------------------------------------------


class MetaGMVAE(CountedNoise, nn.Module):
    """A VAE whose posterior q(z | x, D) sees the whole set D and whose prior is a mixture that EM fits to the set.

    It learns from sets without labels and classifies episodes of any way. The ablations of Table 2: ``episodic=False``
    (without Ep: the prior is N(0, I)), ``set_level=False`` (without Set: each image is a set of its own),
    ``covariance="identity"`` (without sigma^2); all three are the vanilla VAE.

    Args:
        encoder: ``[n, C, H, W] -> [n, features]``, `ImageEncoder`; None for episodes of features.
        decoder: `ImageDecoder` or `FeatureDecoder`.
        features, latent: of the set encoder and of z (32 for mini-ImageNet in the reference code, 64 in the paper).
        components: K in training; at test time it is the way.
        samples, test_samples: N; None: as in training.
        decoded: how many of the N samples are decoded in training; None: all. Decoding is nearly all of the work, and
            the objective has the same expectation; fewer `samples` are something else, as EM then fits its prior to
            fewer points, those of the divergence, which comes out too small.
        iterations: of EM; 0 leaves its start.
        learn_weights: whether EM in training learns the mixing weights.
        covariance: of the components at test time, "diagonal" or "identity".
        e_step: covariance by which EM assigns queries at test time: "identity" (reference code) or "diagonal" (eq. 10).
        inference: "transductive": all queries of an episode join the set and the EM (as published); "inductive": each
            query meets the support set alone.
        reduce: the objective is a "mean" over the images of a set (reference code) or the "sum" of equation 9.
        weight_decay: L2, on all parameters, as Adam has it (reference code: 1e-6 on Omniglot, 5e-2 on mini-ImageNet).
        chunk: images decoded at a time, about: whole samples of the batch, which share batch statistics.
        seed: of sampling. At test time each task has noise of its own, the same in every call and reading.
        generator: source of the initial weights.

    Raises:
        ValueError: an unknown switch, a number that is too small, more samples decoded than drawn, or networks of other
            widths than `features` and `latent`.
    """

    def __init__(
        self, encoder: nn.Module | None, decoder: nn.Module, *, features=256, latent=64, components=20, samples=32,
        decoded: int | None = None, test_samples: int | None = None, iterations=10, learn_weights=True, episodic=True,
        set_level=True, covariance="diagonal", e_step="identity", inference="transductive", reduce="mean",
        weight_decay=0.0, chunk=4800, seed=0, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        _check_switches(covariance, e_step, inference, reduce)
        _check_numbers(samples=samples, decoded=decoded, test_samples=test_samples, components=components, chunk=chunk,
                       iterations=iterations)  # fmt: skip
        _check_widths(encoder=(encoder, "features", features), decoder=(decoder, "latent", latent))
        self.encoder, self.decoder, self.latent, self.components = encoder, decoder, latent, components
        self.samples, self.decoded, self.test_samples = samples, decoded, test_samples or samples
        self.iterations = iterations
        self.learn_weights, self.episodic, self.set_level = learn_weights, episodic, set_level
        self.covariance, self.e_step, self.inference = covariance, e_step, inference
        self.reduce, self.weight_decay, self.chunk, self.seed = reduce, weight_decay, chunk, seed
        self.set_encoder = nn.Sequential(
            SetBlock(features, generator=generator), SetBlock(features, generator=generator),
            _linear(features, 2 * latent, generator),
        )  # fmt: skip

    # Posterior and prior ---------------------------------------------------------------------------------------------

    def features(self, x: Tensor) -> Tensor:
        """f(x), ``[T, M, features]``, of each image ``[T, M, C, H, W]`` alone, batch norm in training aside.

        What is features already passes as it is.
        """
        if self.encoder is None or x.dim() == 3:
            return x
        return self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    @torch.no_grad()
    def embed(self, images: Tensor, chunk=1000) -> Tensor:
        """f(x), ``[n, features]``, of uint8 images ``[n, C, H, W]``, on running averages; `predict` takes them, too.

        ValueError: images of another type, or a model that learns on features.
        """
        if self.encoder is None:
            raise ValueError("this model learns on features and has no encoder; give its tasks the features themselves")
        was, device = self.training, next(self.parameters()).device
        self.eval()
        h = torch.cat([self.encoder(as_floats(x.to(device))) for x in images.split(chunk)])
        self.train(was)
        return h

    def posterior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x, D), ``[T, M, d]`` each, given features ``[T, M, features]`` (eq. 5).

        (eq-gmvae-posterior)
        """
        sets = h if self.set_level else h.flatten(0, 1).unsqueeze(1)
        mean, log_variance = self.set_encoder(sets).view(*h.shape[:2], -1).split(self.latent, 2)
        return mean, log_variance

    def prior(self, z: Tensor, noise: torch.Generator) -> Mixture:
        """The mixture that EM fits to the samples of each set ``[T, M, N, d]`` (eq. 6 and 7); N(0, I) if not episodic.

        It starts from K different samples, two of which may be of one image (reference code). (eq-gmvae-prior)
        """
        pooled = z.detach().flatten(1, 2).nan_to_num(0, 0, 0)  # what diverged shows in the loss: no mixture fits it
        if not self.episodic:
            return Mixture(pooled.new_ones(len(z), 1), pooled.new_zeros(len(z), 1, self.latent))
        start = random_start(pooled, self.components, noise)
        return em(pooled, start, self.iterations, learn_weights=self.learn_weights)

    # Training --------------------------------------------------------------------------------------------------------

    def loss(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Minus the objective (eq. 9) ``[T]``, on all images of an episode as one set without labels.

        L2 is in it, too, where there is any. The second value, accuracy elsewhere, is 0: there are no labels.
        (eq-gmvae-objective)
        """
        xs, _, xq, _ = episodes.flat()
        x = torch.cat([xs, xq], 1)
        reconstruction, divergence = self.terms(x, self._noise(x))
        total = reconstruction + divergence
        if self.reduce == "sum":
            total = total * x.shape[1]
        if self.weight_decay:
            total = total + self.weight_decay / 2 * nn.utils.parameters_to_vector(self.parameters()).square().sum()
        return total, torch.zeros_like(total)

    def terms(self, x: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean over images and samples of ``-log p(x | z)`` and of ``log q(z | x, D) - log p(z)``, ``[T]`` each.

        x: images ``[T, M, C, H, W]``, or features. The second, a Monte Carlo estimate of a KL divergence (a mixture
        has no closed form), is unbiased given the prior. The prior is a constant: there is no gradient through EM.
        (eq-gmvae-kl)
        """
        mean, log_variance = (s.unsqueeze(2) for s in self.posterior(self.features(x)))
        epsilon = torch.randn(
            *x.shape[:2], self.samples, self.latent, generator=noise, device=x.device, dtype=mean.dtype
        )
        z = mean + (log_variance / 2).exp() * epsilon
        prior = self.prior(z, noise)
        log_q = -(log_variance.sum(3) + epsilon.square().sum(3) + self.latent * LOG_2PI) / 2
        log_p = prior.log_density(z.flatten(1, 2)).view_as(log_q)
        return self.reconstruction(x, z[:, :, : self.decoded]), (log_q - log_p).mean((1, 2))

    def reconstruction(self, x: Tensor, z: Tensor) -> Tensor:
        """Mean of ``-log p(x | z)``, ``[T]``, of images ``[T, M, ...]`` and samples ``[T, M, N, d]``, in chunks.

        Its gradient needs losses of equal weight, as their mean has. ValueError: others.
        """
        if torch.is_grad_enabled():
            return _Reconstruction.apply(z, self, x, *self.decoder.parameters())
        return sum(self._chunk_loss(x, part, z.shape[2]) for part in self._chunks(z))

    def _chunks(self, z: Tensor) -> tuple[Tensor, ...]:
        tasks, m, n, _ = z.shape
        pieces = -(-tasks * m * n // self.chunk)
        return z.split(-(-n // min(n, pieces)), 2)

    def _chunk_loss(self, x: Tensor, z: Tensor, samples: int) -> Tensor:
        return -self.decoder.log_likelihood(x, z).sum(2).mean(1) / samples

    # Test ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """log p(y | x, D) of the queries, ``[T, N*Q, N]``, by semi-supervised EM; batch norm on running averages."""
        xs, y, xq, _ = episodes.flat()
        with evaluating(self):
            h = self.features(torch.cat([xs, xq], 1))
            support, query = h.split([xs.shape[1], xq.shape[1]], 1)
            classify = self.classify if self.inference == "transductive" else self._classify_alone
            return classify(support, y, query, episodes.way, self.test_noise(h, episodes.first))

    def classify(self, support: Tensor, y: Tensor, query: Tensor, way: int, epsilon: Tensor | None = None) -> Tensor:
        """log of the mean of p(y | z) over a query's samples, ``[S, q, K]`` (eq. 11).

        Features of support ``[S, m, features]``, labels ``[S, m]`` and queries ``[S, q, features]`` are S sets;
        `epsilon` is their noise (None: that of the first tasks of a test). (eq-gmvae-predict)
        """
        mixture, _, z = self.adapt(support, y, query, way, epsilon)
        log_p = mixture.log_joint(z).log_softmax(2).unflatten(1, (-1, self.test_samples))
        return log_p.logsumexp(2) - math.log(self.test_samples)

    def adapt(
        self, support: Tensor, y: Tensor, query: Tensor, way: int, epsilon: Tensor | None = None
    ) -> tuple[Mixture, Tensor, Tensor]:
        """The mixture of one component for each class (eq. 10) and the samples of support and queries it is fitted to.

        Shapes as in `classify`; the samples of one image follow one another: ``[S, m*N, d]`` and ``[S, q*N, d]``.
        (eq-gmvae-semi)
        """
        m, h = support.shape[1], torch.cat([support, query], 1)
        mean, log_variance = (s.unsqueeze(2) for s in self.posterior(h))
        z = mean + (log_variance / 2).exp() * (self.test_noise(h) if epsilon is None else epsilon)
        x, z = z[:, :m].flatten(1, 2), z[:, m:].flatten(1, 2)
        y = y.repeat_interleave(self.test_samples, 1)
        mixture = em(z, labeled_start(x, y, way), self.iterations, labeled=(x, y), covariance=self.covariance,
                     e_step=self.e_step, learn_weights=False)  # fmt: skip
        return mixture, x, z

    def _classify_alone(self, support: Tensor, y: Tensor, query: Tensor, way: int, epsilon: Tensor) -> Tensor:
        """`classify` with one set for each query, some sets at a time; an image has the noise that it has there."""
        tasks, m, q = *support.shape[:2], query.shape[1]
        size = max(1, MEMORY // ((m + 1) * self.test_samples * self.latent))
        logits = []
        for part in torch.arange(tasks * q, device=y.device).split(size):
            t, i = part // q, part % q
            noise = torch.cat([epsilon[t, :m], epsilon[t, m + i].unsqueeze(1)], 1)
            logits.append(self.classify(support[t], y[t], query[t, i].unsqueeze(1), way, noise))
        return torch.cat(logits).view(tasks, q, way)

    def test_noise(self, h: Tensor, first=0) -> Tensor:
        """Standard Gaussian noise ``[T, M, N, d]`` for features ``[T, M, features]`` of tasks number `first` and on.

        It depends on a task's number alone: were it the same for all tasks, no interval over tasks would contain it.
        """
        shape = (h.shape[1], self.test_samples, self.latent)
        return noise_of_tasks(h.new_empty((len(h), *shape)), self.seed, first)


def _check_switches(covariance: str, e_step: str, inference: str, reduce: str) -> None:
    one_of("covariance", covariance, ("identity", "diagonal"))
    one_of("e_step", e_step, ("identity", "diagonal"))
    one_of("inference", inference, ("transductive", "inductive"))
    one_of("reduce", reduce, ("mean", "sum"))
    if covariance == "identity" and e_step == "diagonal":
        raise ValueError("e_step='diagonal' needs covariance='diagonal'")


def _check_widths(**networks: tuple) -> None:
    for what, (network, name, wanted) in networks.items():
        width = getattr(network, name, wanted)
        if width != wanted:
            raise ValueError(f"the {what} has {name}={width}, the model {name}={wanted}; make them equal")


def _check_numbers(samples: int, decoded: int | None, **given: int | None) -> None:
    for what, value in {"samples": samples, "decoded": decoded, **given}.items():
        least = 0 if what == "iterations" else 1
        if value is not None and value < least:
            raise ValueError(f"{what}={value} is too few; use {least} or more")
    if decoded is not None and decoded > samples:
        raise ValueError(f"{decoded} of {samples} samples cannot be decoded; use {samples} or fewer, or None for all")


class _Reconstruction(torch.autograd.Function):
    """`MetaGMVAE.reconstruction`, differentiated chunk by chunk while it is computed: the memory is that of a chunk."""

    @staticmethod
    def forward(ctx, z, model, x, *parameters):
        losses, to_z, to_parameters = 0, [], None
        for part in model._chunks(z):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = model._chunk_loss(x, part, z.shape[2])
                first, *rest = torch.autograd.grad(loss.sum(), [part, *parameters])
            losses = losses + loss.detach()
            to_z.append(first)
            to_parameters = rest if to_parameters is None else torch._foreach_add(to_parameters, rest)
        ctx.save_for_backward(torch.cat(to_z, 2), *to_parameters)
        return losses

    @staticmethod
    def backward(ctx, g):
        check_equal_weights(g)  # gradients of parameters are those of the sum over tasks
        to_z, *to_parameters = (saved * g[0] for saved in ctx.saved_tensors)
        return to_z, None, None, *to_parameters
