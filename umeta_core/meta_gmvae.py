"""Meta-GMVAE (Lee et al., 2021): a VAE of sets, whose prior is a mixture of Gaussians fitted by EM to every episode.

Shapes: T episodes of M unlabeled images x, N Monte Carlo samples z of d numbers for each image, K components. What
departs from the paper is from the authors' code: the set blocks, the mean over M in the objective, weight decay and
the E-step at test time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .checks import one_of
from .data import as_floats
from .em import Mixture, em, labeled_start, random_start
from .episodes import Episodes
from .evaluation import evaluating
from .gmvae_networks import LOG_2PI, SetEncoder
from .losses import check_equal_weights
from .noise import CountedNoise, noise_of_tasks

MEMORY = 1 << 26  # numbers in the samples of sets that an inductive test handles at a time; EM needs several times that


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
        self.set_encoder = SetEncoder(features, latent, generator)

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
        device = next(self.parameters()).device
        with evaluating(self):
            return torch.cat([self.encoder(as_floats(x.to(device))) for x in images.split(chunk)])

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
        """Losses of all chunks; their gradients are kept for the backward pass, which only scales them."""
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
