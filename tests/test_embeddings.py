"""What every embedding promises, BiGAN's losses and updates, and the controls."""

import pytest
import torch
import torch.nn.functional as F

from umeta_core.embeddings.base import Embedding, read
from umeta_core.embeddings.bigan import BiGAN, ConvBiGAN, bigan_losses, squash
from umeta_core.embeddings.simple import PCAPixels, RandomNetwork
from umeta_core.storage import save_tensors
from umeta_core.training import NonFiniteLoss


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=64, channels=1, size=28, seed=0):
    return torch.randint(256, (n, channels, size, size), dtype=torch.uint8, generator=seeded(seed))


def small(seed=0, **options):
    return BiGAN(1, 28, 6, hidden=16, generator=seeded(seed), **options)


def states_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_fit_is_the_uninterrupted_fit(tmp_path, stop):
    images, whole, halves = pictures(), small(), small()
    history = whole.fit(images, epochs=3, batch=16, progress=False)

    class Stop(Exception):
        pass

    steps, step = [0], halves.step

    def interrupted(*args):
        steps[0] += 1
        if steps[0] > 4 * stop + 2:  # in the middle of an epoch
            raise Stop
        return step(*args)

    halves.step = interrupted
    with pytest.raises(Stop):
        halves.fit(images, epochs=3, batch=16, checkpoint=tmp_path / "b.pt", save_every=0, progress=False)
    resumed = small(seed=5)
    again = resumed.fit(images, epochs=3, batch=16, checkpoint=tmp_path / "b.pt", progress=False)
    assert states_equal(whole, resumed)
    assert again["discriminator"] == history["discriminator"] and again["epoch"] == [1, 2, 3]
    done = small(seed=6)  # a finished fit is read, not repeated
    assert done.fit(images, epochs=3, batch=16, checkpoint=tmp_path / "b.pt", progress=False) == again
    assert states_equal(whole, done)


def test_a_fit_of_another_kind_of_device_is_read_but_not_gone_on_with(tmp_path):
    """A GPU's generator has 16 bytes of state, which no processor's takes."""
    path = tmp_path / "b.pt"
    fitted = small()
    fitted.fit(pictures(), epochs=2, batch=16, checkpoint=path, progress=False)
    state = read(path) | {"generator": torch.zeros(16, dtype=torch.uint8)}
    save_tensors(state, path)
    again = small(seed=1)
    again.fit(pictures(), epochs=2, batch=16, checkpoint=path, progress=False)
    assert states_equal(again, fitted)
    save_tensors(state | {"epoch": 1}, path)
    with pytest.raises(ValueError, match="another kind of device than cpu, whose random numbers differ"):
        small().fit(pictures(), epochs=2, batch=16, checkpoint=path, progress=False)


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    path = tmp_path / "b.pt"
    small().fit(pictures(), epochs=1, batch=16, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match=r"belongs to another run \(epochs: 1 there, 2 here\)"):
        small().fit(pictures(), epochs=2, batch=16, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="holds another network"):
        BiGAN(1, 28, 7, hidden=16).restore(path)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a readable embedding; delete it"):
        small().restore(path)
    with pytest.raises(ValueError, match="64 images do not fill one batch of 65"):
        small().fit(pictures(), epochs=1, batch=65)


def test_a_loss_that_is_not_finite_stops_the_fit(tmp_path):
    model = small()
    model.step = lambda *args: {"discriminator": torch.tensor(float("nan"))}
    with pytest.raises(NonFiniteLoss, match="discriminator loss became nan in epoch 1"):
        model.fit(pictures(), epochs=1, batch=16, checkpoint=tmp_path / "b.pt", progress=False)
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize("model", [small(), PCAPixels(d=20), RandomNetwork(filters=4, generator=seeded())])
def test_vectors_do_not_depend_on_their_company(tmp_path, model):
    images = pictures()
    model.fit(images, epochs=1, batch=16, progress=False)
    z = model.embed(images)
    assert z.shape == (64, model.d) and z.dtype == torch.float32
    torch.testing.assert_close(z, torch.cat([model.embed(x) for x in images.split(7)]), rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "m.pt")
    fresh = {"BiGAN": small(9), "PCAPixels": PCAPixels(d=20), "RandomNetwork": RandomNetwork(filters=4)}
    assert torch.equal(fresh[type(model).__name__].restore(tmp_path / "m.pt").embed(images), z)


def test_the_averages_of_the_random_network_are_its_images_statistics():
    model, images = RandomNetwork(filters=4, generator=seeded()), pictures(300)
    model.fit(images)
    network = model.network
    first = torch.nn.functional.conv2d(images.float() / 255, network.weights[0], padding=1, stride=2)
    torch.testing.assert_close(network.running_mean[0], first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.running_var[0], first.var((0, 2, 3)), rtol=1e-3, atol=1e-6)
    x = images.float() / 255  # so every image is embedded as in that one batch
    torch.testing.assert_close(model.encode(x), network.embed(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("other, images", [(small(lr=0.1), pictures()), (small(), 255 - pictures())])
def test_a_checkpoint_of_other_settings_or_images_is_refused(tmp_path, other, images):
    small().fit(pictures(), epochs=1, batch=16, checkpoint=tmp_path / "fit.pt", progress=False)
    with pytest.raises(ValueError, match="belongs to another run .*(options|pixels)"):
        other.fit(images, epochs=1, batch=16, checkpoint=tmp_path / "fit.pt", progress=False)


KINDS = [small(), ConvBiGAN(1, 28, 5, width=4, crop=16), PCAPixels(d=20),
         RandomNetwork(filters=4, generator=seeded())]  # fmt: skip


@pytest.mark.parametrize("model", KINDS)
def test_images_of_another_shape_are_refused(model):
    images = pictures(40)[:, :, :1].expand(-1, -1, 29, -1)
    for use in (model.embed, lambda x: model.fit(x, epochs=1, batch=16, progress=False)):
        with pytest.raises(ValueError, match=r"takes images of \(1, 28, 28\), these are \(1, 29, 28\); resize them"):
            use(images)


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int64])
def test_images_of_another_type_are_refused_and_left_alone(model, kind):
    images = torch.ones(40, 1, 28, 28, dtype=kind)
    for use in (model.embed, lambda x: model.fit(x, epochs=1, batch=16, progress=False)):
        with pytest.raises(ValueError, match="images are uint8, 0 to 255, not torch"):
            use(images)
    assert (images == 1).all()


def test_pca_pixels_are_those_of_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    images = pictures(300)
    model = PCAPixels(d=5)
    model.fit(images)
    x = images.flatten(1).double().numpy() / 255
    theirs = torch.from_numpy(decomposition.PCA(5, whiten=True, svd_solver="full").fit(x).transform(x)).float()
    torch.testing.assert_close(model.embed(images).abs(), theirs.abs(), rtol=1e-2, atol=1e-2)  # signs are free
    with pytest.raises(ValueError, match="784 pixels, fewer than d=800"):
        PCAPixels(d=800)
    with pytest.raises(ValueError, match="5 images cannot span d=5"):
        PCAPixels(d=5).fit(images[:5])


def test_bigan_moves_each_player_on_its_own_loss():
    """One step equals plain Adam steps on literal losses, both taken at the weights before the step."""
    images, model, literal = pictures(16), small(), small()
    model.opt = model.optimizers()
    model.train(), literal.train()
    index, g = torch.arange(16), seeded(3)

    model.step(images, index, g)
    z = torch.rand(16, 6, generator=seeded(3)).mul(2).sub(1)
    x = images.float() / 255
    made, code = literal.generate(z), squash(literal._encoder(x))
    real, fake = literal.discriminate(x, code), literal.discriminate(made, z)
    theirs = -(torch.log(torch.sigmoid(real)).mean() + torch.log(1 - torch.sigmoid(fake)).mean()) / 2
    ours = -(torch.log(1 - torch.sigmoid(real)).mean() + torch.log(torch.sigmoid(fake)).mean()) / 2
    judge, players = list(literal.dis.parameters()), [*literal.g.parameters(), *literal.e.parameters()]
    grads = [*torch.autograd.grad(theirs, judge, retain_graph=True), *torch.autograd.grad(ours, players)]
    for p, grad in zip([*judge, *players], grads, strict=True):
        p.grad = grad
    torch.optim.Adam([*judge, *players], 2e-4, (0.5, 0.999), weight_decay=2.5e-5).step()
    for a, b in zip(model.parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_bigan_losses_are_the_same_with_exchanged_labels():
    a, b = torch.randn(2, 9, generator=seeded())
    assert torch.equal(bigan_losses(a, b)[0], bigan_losses(-a, -b)[1])


def test_bigan_learning_rate_falls_in_the_second_half():
    model = small()
    model.opt = model.optimizers()
    rates = []
    for epoch in range(8):
        model.start_epoch(pictures(), epoch, 8, seeded())
        rates.append(model.opt[0].param_groups[0]["lr"] / 2e-4)
    assert rates[:5] == [1] * 5 and rates[6] == pytest.approx(0.1)


def test_convolutional_bigan_trains_on_crops():
    images = pictures(12, 3, 36)
    model = ConvBiGAN(3, 36, 5, width=4, crop=32, generator=seeded())
    history = model.fit(images, epochs=1, batch=4, progress=False)
    assert len(history["generator"]) == 1 and model.embed(images).shape == (12, 5)
    assert model.generate(torch.zeros(2, 5)).shape == (2, 3, 32, 32)
    x = images.float() / 255
    crops = model._views(x, seeded())
    patches = F.unfold(x, 32).unflatten(1, (3, 32, 32))  # every place
    assert all((patches[i] == crops[i].unsqueeze(-1)).flatten(0, 2).all(0).any() for i in range(12))
    with pytest.raises(ValueError, match="28x28 images are smaller than the 64x64 crops"):
        ConvBiGAN(1, 28)


def test_an_embedding_must_say_how():
    with pytest.raises(NotImplementedError):
        Embedding().encode(torch.zeros(1))


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    first, second = small(), small()
    first.options, second.options = {"lr": 2e-4}, {"lr": 5e-2}
    first.fit(pictures(), epochs=1, batch=32, checkpoint=tmp_path / "e.pt", progress=False)
    with pytest.raises(ValueError, match="options: {'lr': 0.0002} there, {'lr': 0.05} here"):
        second.fit(pictures(), epochs=1, batch=32, checkpoint=tmp_path / "e.pt", progress=False)


@pytest.mark.parametrize("kind", [PCAPixels, RandomNetwork])
def test_a_control_that_is_there_is_read_and_not_made_again(kind, tmp_path):
    options = {"d": 5} if kind is PCAPixels else {"filters": 4}
    first = kind(1, 28, **options, generator=seeded())
    first.fit(pictures(), checkpoint=tmp_path / "e.pt", batch=8)
    before = (tmp_path / "e.pt").read_bytes()
    again = kind(1, 28, **options, generator=seeded(1))
    again.fit(pictures(seed=1), checkpoint=tmp_path / "e.pt", batch=8)
    assert states_equal(first, again) and (tmp_path / "e.pt").read_bytes() == before


class Root(Embedding):
    """A loss that is finite at 0, where its gradient is not."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=1.0)]

    def step(self, images, index, generator):
        loss = self.w.sqrt().sum()
        loss.backward()
        self.opt[0].step()
        return {"root": loss}


def test_a_fit_whose_weights_are_not_finite_is_not_saved(tmp_path):
    with pytest.raises(NonFiniteLoss, match="a weight is not finite after 1.0 epochs, though"):
        Root().fit(pictures(8), epochs=1, batch=8, checkpoint=tmp_path / "e.pt", progress=False)
    assert not (tmp_path / "e.pt").exists()


def test_convolutional_bigan_sees_pixels_around_zero_and_judges_pairs():
    """Medium gray is 0 inside, and there are no biases: what is left of it comes from the code."""
    model = ConvBiGAN(1, 28, 5, width=4, crop=16, generator=seeded()).eval()
    code = torch.randn(2, 5, generator=seeded(1))
    assert (model.encode(torch.full((2, 1, 28, 28), 0.5)) == 0).all()
    gray = torch.full((2, 1, 16, 16), 0.5)
    assert (model.discriminate(gray, 0 * code) == 0).all() and (model.discriminate(gray, code) != 0).all()


@pytest.mark.parametrize("kind, network", [(BiGAN, {"hidden": 8}), (ConvBiGAN, {"width": 4})])
def test_bigans_move_as_the_authors_do(kind, network):
    for optimizer in kind(3, 64, 4, **network, generator=seeded()).optimizers():
        known = [optimizer.defaults[name] for name in ("lr", "betas", "weight_decay")]
        assert known == [2e-4, (0.5, 0.999), 2.5e-5]


def test_components_are_those_of_all_images():
    images = pictures(1000, size=8)
    model = PCAPixels(1, 8, 4)
    model.fit(images)
    torch.testing.assert_close(model.mean, images.flatten(1).float().mean(0) / 255)
