"""LASIUM (Khodadadeh et al., 2020): classes are neighborhoods of anchor points in a generator's latent space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .augmentation import shift
from .checks import one_of
from .data import ImageSet
from .embeddings.base import Embedding
from .episodes import Episodes, sample_without_replacement

POLICIES = ("N", "RO", "OC")
FILLS = {"ink": 1.0, "background": 0.0}
_COUNTED, _GOLDEN = 1 << 62, 0x9E3779B1


def in_class(
    z: Tensor, count: int, policy: str, strength: float, generator: torch.Generator, *,
    sign: int = 1, own_noise: float = 1.0, sphere: bool = False, redrawn: Tensor | None = None,
) -> Tensor:
    """`count` more latents of the class of each anchor: ``[T, N, L] -> [T, N, count, L]``.

    N adds noise, ``z + sigma * N(0, I)``; RO goes toward a new random latent v of its own, OC toward the anchor v of
    another class of the task: ``z + alpha * (v - z)``. OC's sample i = 1, 2, ... of class c goes to class c + i mod N.
    (eq-lasium-policies)

    Args:
        strength: sigma, a standard deviation (the paper prints its values 0.5, 1, 2 as sigma squared; its code takes
            them as sigma), or alpha.
        sign: -1 moves away from v (RO with the VAE at publication; reference code, not in the paper).
        own_noise: OC's sample i = N, 2N, ... would go to its own class and is ``z + own_noise * N(0, I)`` instead, one
            query in five of a 5-way task (reference code, not in the paper). 0: only the other classes take turns.
        sphere: latents are unit vectors (ProGAN; reference code).
        redrawn: ``[T, N, count, L]``, the anchors as OC's samples see them, if not all the same (VAE; reference code).
    """
    one_of("policy", policy, POLICIES)
    tasks, way, width = z.shape
    shape = (tasks, way, count, width)
    anchor = z.unsqueeze(2).expand(shape)
    if policy == "OC":
        made = _toward_others(anchor if redrawn is None else redrawn, sign * strength, bool(own_noise))
        if own_noise and count >= way:
            own = slice(way - 1, None, way)
            noise = torch.randn(made[:, :, own].shape, generator=generator, device=z.device)
            made[:, :, own] = anchor[:, :, own] + own_noise * noise
    else:
        noise = torch.randn(shape, generator=generator, device=z.device)
        if policy == "N":
            made = torch.add(anchor, noise, alpha=strength)
        else:
            v = F.normalize(noise, dim=-1) if sphere else noise
            made = anchor + sign * strength * (v - anchor)
    return F.normalize(made, dim=-1) if sphere else made


def _toward_others(z: Tensor, alpha: float, visit_own: bool) -> Tensor:
    """Sample i of class c of ``[T, N, count, L]`` moved toward class c + i mod N, with or without c in the round."""
    way, count = z.shape[1:3]
    i = torch.arange(count, device=z.device)
    step = i + 1 if visit_own or way == 1 else 1 + i % (way - 1)
    other = (torch.arange(way, device=z.device).unsqueeze(1) + step) % way  # [N, count]
    return z + alpha * (z[:, other, i] - z)


class LatentTasks:
    """N-way tasks out of a generator's latent space (LASIUM, Alg. 1): anchors, `in_class` samples, images.

    Args:
        images: what the generator was trained on; names the data in records, and is what "encoded" anchors are of.
        network: a generator with ``latent`` (numbers in z) and ``generate(z [n, L]) -> [n, C, H, W]`` in [0, 1]; for
            encoded anchors also ``posterior(x) -> (mean, std)`` or ``encode(x) -> mean``. Its ``sphere``, if it has
            one, says whether latents are unit vectors. It is put into evaluation mode.
        policy: "N", "RO" or "OC"; strength: sigma or alpha; sign, own_noise: see `in_class`.
        anchors: "prior" draws them from N(0, I) (GAN). "encoded" takes N images at random, which stay as the first
            sample of their class; the anchors are drawn from their posteriors, anew for each sample of OC (VAE;
            reference code), or are their codes if the generator has no `posterior`.
        epsilon: anchors of a task are redrawn until all distances between them exceed it (the paper; with L = 128 the
            code's later 246.09 is the square of such a distance). None: no such test, as in the code at publication.
        shift: queries of ``[T, N, Q]`` are moved, each on its own, by -shift..shift-1 pixels each way; 0 leaves them.
        fill: what enters at the border: "ink" (1), which is what black borders are for the code's black on white,
            "background" (0), or None, which also leaves queries in place.
        ahead: `sample` makes the tasks of so many calls in one batch and then serves them. See `sample`.

    Raises:
        ValueError: an unknown option, or a generator that does not fit.
    """

    def __init__(
        self, images: ImageSet, network, policy: str = "RO", strength: float = 0.2, *, anchors: str = "prior",
        epsilon: float | None = None, sign: int = 1, own_noise: float = 1.0, shift: int = 5, fill: str | None = "ink",
        ahead: int = 1,
    ):  # fmt: skip
        one_of("policy", policy, POLICIES)
        one_of("anchors", anchors, ("prior", "encoded"))
        one_of("sign", sign, (1, -1))
        one_of("fill", fill, (*FILLS, None))
        if ahead < 1:
            raise ValueError(f"ahead={ahead} calls cannot be made at once; use 1 or more")
        if not hasattr(network, "latent") or not hasattr(network, "generate"):
            raise ValueError(f"{type(network).__name__} is no generator: it needs `latent` and `generate(z)`")
        encode = getattr(type(network), "encode", Embedding.encode)  # which has none of its own
        if anchors == "encoded" and not hasattr(network, "posterior") and encode is Embedding.encode:
            raise ValueError(f"{type(network).__name__} cannot encode images; use anchors='prior'")
        self.images, self.network, self.policy, self.strength = images, network, policy, strength
        self.anchors, self.epsilon, self.shift, self.fill, self.ahead = anchors, epsilon, shift, fill, ahead
        self.switches = {"sign": sign, "own_noise": own_noise, "sphere": getattr(network, "sphere", False)}
        if isinstance(network, torch.nn.Module):
            network.eval()
        self._block: tuple[tuple, Episodes] | None = None

    def sample(self, tasks: int, way: int, shot: int, query: int, generator: torch.Generator) -> Episodes:
        """Draw `tasks` episodes; they depend on the state of `generator` only.

        With ``ahead`` > 1 the call also counts: it leaves the number of calls so far in the generator's seed, and the
        tasks of calls b*ahead to (b+1)*ahead - 1 come from a generator of their own, seeded with b. The state of
        `generator`, which `training.train` saves, so says which block is under way and where in it we are: a resumed
        run makes the same block again, in the same batch, and goes on in its middle. Nothing is read back from the
        device after the first call.

        Raises:
            ValueError: epsilon is out of reach, more classes than images, codes or images of the wrong shape.
        """
        if self.ahead == 1:
            return self._make(tasks, way, shot, query, generator)
        key, step = _count(generator)
        block = (key, step // self.ahead, tasks, way, shot, query, generator.device)
        if self._block is None or self._block[0] != block:
            own = torch.Generator(generator.device).manual_seed(_seed(key, -1 - block[1]))
            self._block = block, self._make(tasks * self.ahead, way, shot, query, own)
        at = step % self.ahead * tasks
        return self._block[1][at : at + tasks]

    @torch.no_grad()
    def latents(self, tasks: int, way: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Latents ``[T, N, count, L]``, each class's anchor first, and of encoded anchors the images ``[T, N]``."""
        z, *encoded = self._anchors(tasks, way, generator)
        redrawn = None
        if len(encoded) == 3 and self.policy == "OC":
            mean, std = (t.unsqueeze(2).expand(-1, -1, count - 1, -1) for t in encoded[1:])
            redrawn = self._placed(_normal(mean, std, generator))
        more = in_class(z, count - 1, self.policy, self.strength, generator, redrawn=redrawn, **self.switches)
        return torch.cat([z.unsqueeze(2), more], 2), encoded[0] if encoded else None

    def _anchors(self, tasks: int, way: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """`_draw` for tasks whose anchors are further apart than epsilon, drawn and tested many tasks at a time."""
        if self.epsilon is None:
            return self._draw(tasks, way, generator)
        kept, found, drawn, size, nearest = [], 0, 0, tasks, []
        while found < tasks:
            if drawn >= 1000 * tasks:
                raise ValueError(
                    f"{found} of {drawn} draws had {way} anchors further apart than epsilon={self.epsilon:g} (the two "
                    f"nearest are {torch.cat(nearest).mean():.3g} apart on average); lower epsilon"
                )
            parts = self._draw(size, way, generator)
            distance = torch.cdist(parts[0], parts[0], compute_mode="donot_use_mm_for_euclid_dist")
            nearest.append((distance + torch.full((way,), torch.inf, device=distance.device).diag()).amin((1, 2)))
            far = nearest[-1] > self.epsilon
            kept.append([part[far] for part in parts])
            found, drawn, size = found + int(far.sum()), drawn + size, min(2 * size, 1000)
        return tuple(torch.cat(parts)[:tasks] for parts in zip(*kept))

    def _draw(self, tasks: int, way: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Anchors ``[T, N, L]``; of encoded ones also the images ``[T, N]``, and their posteriors' mean and std."""
        shape, device = (tasks, way, self.network.latent), generator.device
        if self.anchors == "prior":
            z = torch.randn(shape, generator=generator, device=device)
            return (self._placed(z),)
        if way > len(self.images):
            raise ValueError(
                f"{way}-way tasks need {way} images; {self.images.name} {self.images.split} has {len(self.images)}"
            )
        index = sample_without_replacement(torch.full((tasks,), len(self.images), device=device), way, generator)
        parts = [self._codes(x) for x in self.images.shown(index).flatten(0, 1).split(500)]
        codes = [torch.cat(part) for part in zip(*parts)]
        if codes[0].shape[1:] != shape[2:]:
            raise ValueError(f"images have codes of {tuple(codes[0].shape[1:])} numbers but latents have {shape[2]}")
        mean, *std = (code.view(shape) for code in codes)
        if not std:
            return self._placed(mean), index
        return self._placed(_normal(mean, std[0], generator)), index, mean, std[0]

    def _codes(self, x: Tensor) -> tuple[Tensor, ...]:
        """Mean and std of the posterior of each image, or the code alone."""
        return self.network.posterior(x) if hasattr(self.network, "posterior") else (self.network.encode(x),)

    def _placed(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.switches["sphere"] else z

    @torch.no_grad()
    def _make(self, tasks: int, way: int, shot: int, query: int, generator: torch.Generator) -> Episodes:
        z, index = self.latents(tasks, way, shot + query, generator)
        z = z if index is None else z[:, :, 1:]
        x = self.network.generate(z.flatten(0, 2)).unflatten(0, z.shape[:3])
        if x.shape[3:] != self.images.images.shape[1:]:
            raise ValueError(f"the generator makes images of {tuple(x.shape[3:])} but {self.images.name} has "
                             f"{tuple(self.images.images.shape[1:])}; resize them in `generate`")  # fmt: skip
        if index is not None:
            x = torch.cat([self.images.shown(index).unsqueeze(2), x], 2)
        return Episodes(x[:, :, :shot], self._shifted(x[:, :, shot:], generator))

    def _shifted(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if not self.shift or self.fill is None:
            return x
        flat = x.flatten(0, 2)
        offset = torch.randint(-self.shift, self.shift, (2, len(flat)), generator=generator, device=x.device)
        return shift(flat, *offset, FILLS[self.fill]).view(x.shape)


def _normal(mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """Draws of N(mean, std^2); ``torch.normal`` would wait for the device to see that std is not negative."""
    return torch.addcmul(mean, std, torch.randn(mean.shape, generator=generator, device=mean.device))


def _seed(key: int, step: int) -> int:
    """A 32-bit seed for each step of each key: what a CPU generator reads of its seed."""
    return (key + step * _GOLDEN) % 2**32


def _count(generator: torch.Generator) -> tuple[int, int]:
    """The key and number of a call, kept in the generator's seed, which then holds the number of the next call.

    Bit 62 of the seed says that it is such a one; then come 30 bits of the number and 32 of `_seed`. The first call
    draws the key.
    """
    seed = generator.initial_seed()
    if seed >> 62 == 1:
        step = (seed >> 32) % 2**30
        key = _seed(seed, -step)
    else:
        key, step = int(torch.randint(2**32, (), generator=generator, device=generator.device)), 0
    generator.manual_seed(_COUNTED | (step + 1) << 32 | _seed(key, step + 1))
    return key, step
