"""Nothing mixes devices: on a GPU that is pretended (see `pretend_gpu`) all gives the numbers of the CPU."""

import copy

import pytest
import torch
from pretend_gpu import Generator, Mismatch, OnGPU, pretend

from umeta_core.attributes import AttributeTasks, attribute_prototypes
from umeta_core.augmentation import AugmentedTasks
from umeta_core.baselines import LinearClassifier, MLPClassifier, NearestMean, NearestNeighbors, Ridge
from umeta_core.data import ImageSet
from umeta_core.embeddings.bigan import BiGAN
from umeta_core.embeddings.simclr import SimCLR
from umeta_core.episodes import MixedTasks, PartitionTasks, UnlabeledSets
from umeta_core.evaluation import evaluate
from umeta_core.gmvae_networks import ImageDecoder, ImageEncoder
from umeta_core.leo import LEO
from umeta_core.maml import MAML
from umeta_core.meta_gmvae import MetaGMVAE
from umeta_core.networks import Conv4
from umeta_core.partitions import cluster_partitions, hyperplane_partitions
from umeta_core.protonets import ProtoNet
from umeta_core.training import train


@pytest.fixture(scope="module")
def images():
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (400, 1, 28, 28), generator=g, dtype=torch.uint8)
    attributes = (torch.rand(400, 12, generator=g) < 0.5).to(torch.uint8)
    return ImageSet(pixels, torch.arange(20).repeat_interleave(20), [str(i) for i in range(20)], [], "noise", "train",
                    attributes, [f"a{i}" for i in range(12)])  # fmt: skip


def cpu(x):
    return x.inner if isinstance(x, OnGPU) else x


def test_the_pretended_gpu_notices_mistakes():
    with pretend():
        x = torch.rand(3, 4, device="cuda", generator=Generator("cuda").manual_seed(0))
        assert x.is_cuda and (x + 1).is_cuda and not x.cpu().is_cuda and (x * torch.tensor(2.0)).is_cuda
        for mistake in (lambda: x + torch.ones(4), lambda: torch.ones(4)[x.argmax(1)], lambda: x.sum().numpy(),
                        lambda: torch.rand(3, device=x.device, generator=Generator("cpu")),
                        lambda: torch.cat([x, torch.ones(3, 4)])):  # fmt: skip
            with pytest.raises((Mismatch, TypeError)):
                mistake()


def test_every_source_draws_on_a_gpu_what_it_draws_on_the_cpu(images):
    features = torch.rand(400, 7)

    def sources(there):
        stack = torch.arange(400).remainder(8).expand(3, -1)
        plain, stacked = PartitionTasks(there), PartitionTasks(there, stack)
        prototypes = attribute_prototypes(there, there.attribute_names, 5)
        return [(plain, 4), (stacked, 4), (MixedTasks(plain, stacked, 0.5), 4), (AugmentedTasks(there), 4),
                (PartitionTasks(there, None, features), 4), (AttributeTasks(there, prototypes, features), 2),
                (UnlabeledSets(there), 4), (UnlabeledSets(there, features), 4)]  # fmt: skip

    here = [source.sample(3, way, 1, 2, torch.Generator().manual_seed(1)) for source, way in sources(images)]
    with pretend():
        for (source, way), wanted in zip(sources(images.to("cuda")), here, strict=True):
            found = source.sample(3, way, 1, 2, Generator("cuda").manual_seed(1))
            assert torch.equal(found.support.inner, wanted.support) and torch.equal(found.query.inner, wanted.query)


def learners():
    def seeded():
        return torch.Generator().manual_seed(0)

    stride = {"downsample": "stride", "head": "mean", "norm": "shift"}
    leo = dict(features=784, latent=4, generator=seeded())
    return {
        "MAML": MAML(Conv4(1, 28, 8, way=4, generator=seeded()), 0.1, 2, 3),
        "MAML, CACTUs' network": MAML(Conv4(1, 28, 8, way=6, **stride, generator=seeded()), 0.1, 2, 3),
        "MAML, Meta-SGD": MAML(Conv4(1, 28, 8, way=4, generator=seeded()), 0.1, 2, 3, meta_sgd=True, adapt_norm=True),
        "ProtoNet": ProtoNet(Conv4(1, 28, 8, generator=seeded())),
        "ProtoNet, apart": ProtoNet(Conv4(1, 28, 8, generator=seeded()), apart=True, batch_norm="transductive"),
        "LEO": LEO(**leo, dropout=0.0),
    }


@pytest.mark.parametrize("name", list(learners()))
def test_learners_have_the_losses_and_gradients_of_the_cpu(images, name):
    features = images.images.flatten(1).float() / 255 if name == "LEO" else None
    episodes = PartitionTasks(images, None, features).sample(3, 4, 2, 3, torch.Generator().manual_seed(1))
    here = learners()[name]
    there = copy.deepcopy(here)
    loss = here.loss(episodes)[0].mean()
    loss.backward()
    with pretend():
        there, moved = there.to("cuda"), episodes.to("cuda")
        found = there.loss(moved)[0].mean()
        found.backward()
        assert there.predict(moved).is_cuda
    torch.testing.assert_close(cpu(found.detach()), loss.detach(), rtol=1e-4, atol=1e-5)
    for p, q in zip(there.parameters(), here.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(cpu(p.grad), q.grad, rtol=1e-3, atol=1e-4)


def test_baselines_and_clusters_work_on_vectors_on_a_gpu(images):
    features = torch.rand(400, 12, generator=torch.Generator().manual_seed(2)) + images.labels.view(-1, 1) / 20
    task = dict(way=4, shot=2, query=3, tasks=20)
    makers = (NearestNeighbors, NearestMean, Ridge, LinearClassifier)
    here = [evaluate(make(), PartitionTasks(images, None, features), **task).mean for make in makers]
    with pretend():
        source = PartitionTasks(images.to("cuda"), None, features)
        found = [evaluate(make(), source, **task).mean for make in makers]
        evaluate(MLPClassifier(generator=Generator("cuda"), epochs=2), source, **task)
        z = features.to("cuda")
        assert cluster_partitions(z, 12, 3, Generator("cuda").manual_seed(0), least=3, way=3).is_cuda
        hyperplane_partitions(z, 3, 2, Generator("cuda").manual_seed(0), least=3, margin=0.05, planes=50)
    assert found == pytest.approx(here, abs=0.5)


@pytest.mark.parametrize("inference", ["transductive", "inductive"])
def test_meta_gmvae_trains_and_tests_on_a_gpu(images, inference):
    g = torch.Generator().manual_seed(0)
    networks = ImageEncoder(1, 28, 8, generator=g), ImageDecoder(4, 1, 28, 8, generator=g)
    model = MetaGMVAE(*networks, features=32, latent=4, components=3, samples=4, inference=inference, generator=g)
    with pretend():
        model.to("cuda")
        train(model, UnlabeledSets(images.to("cuda")), steps=2, tasks=2, way=1, shot=6, query=0, device="cuda",
              progress=False)
        tested = evaluate(model, PartitionTasks(images.to("cuda")), way=3, shot=1, query=2, tasks=20)
    assert len(tested.accuracies) == 20


def test_simclr_draws_its_views_on_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 0))
    x = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    with pretend():
        model = SimCLR(3, 32).to("cuda")
        model.fit(x.to("cuda"), epochs=1, batch=8, progress=False)
        assert model.embed(x.to("cuda")).is_cuda


def test_a_training_and_a_fit_go_on_from_their_checkpoints_on_a_gpu(images, tmp_path):
    task = dict(tasks=2, way=3, shot=1, query=2, device="cuda", progress=False, checkpoint=tmp_path / "run.pt")
    with pretend():
        there = images.to("cuda")
        source, once, twice = PartitionTasks(there), *(learners()["ProtoNet"].to("cuda") for _ in range(2))
        train(once, source, steps=2, **task)
        train(twice, source, steps=4, **task)
        assert once.training == twice.training
        fit = dict(batch=32, checkpoint=tmp_path / "fit.pt", progress=False)
        BiGAN(d=5, hidden=16).to("cuda").fit(there.images, epochs=1, **fit)
        again = BiGAN(d=5, hidden=16).to("cuda")
        again.fit(images.images, epochs=1, **fit)
        assert again.embed(there.images[:8]).is_cuda
