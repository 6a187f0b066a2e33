"""Transfer learning from VGG-19: its features, and its row with vectors that are already there."""

from urllib.error import URLError

import pytest
import torch

from umeta_core import stages
from umeta_core.embeddings.vgg import VGG19
from umeta_core.experiments import run_row
from umeta_core.rows import find_row
from umeta_core.storage import save_tensors


def images(n, channels):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, channels, 28, 28), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def network():
    return VGG19(1, 28, input=32, weights=None, generator=torch.Generator().manual_seed(0))


def test_untrained_weights_are_those_of_the_generator(network):
    again = VGG19(1, 28, input=32, weights=None, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_each_image_has_its_own_vector(network):
    x = images(5, 1)
    z = network.embed(x, chunk=2)
    assert z.shape == (5, network.d) and network.d == 512
    torch.testing.assert_close(z[3:4], network.embed(x[3:4]))


def test_gray_is_all_three_colors(network):
    x = images(3, 1)
    torch.testing.assert_close(network.embed(x), network.embed(x.expand(-1, 3, -1, -1)))


def test_missing_weights_say_where_to_put_them(monkeypatch):
    def offline(weights=None):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models.vgg19", offline)
    with pytest.raises(FileNotFoundError, match=r"put https://.*vgg19-.*\.pth into .*checkpoints"):
        VGG19()


def test_the_row_trains_a_linear_layer_on_the_test_vectors_alone(tmp_path):
    row = find_row("transfer-vgg-glyphs")
    assert stages.stage_files(row, "smoke", 0, tmp_path) == [stages.vectors_file(row, "test", "smoke", tmp_path)]
    labels = stages.images_of(row, "test").labels
    centers = torch.randn(int(labels.max()) + 1, 64, generator=torch.Generator().manual_seed(0))
    z = centers[labels]  # a vector for each class
    save_tensors({"z": z}, stages.vectors_file(row, "test", "smoke", tmp_path))
    record = run_row(row, "smoke", folder=tmp_path, stages=tmp_path)
    assert [cell["accuracy"] for cell in record["cells"]] == [100.0, 100.0]
    assert record["protocol"]["inner_lr"] == 0.05 and record["embedding_fit"]["epochs"] == 0


def test_colors_are_normalized_as_torchvisions_weights_expect():
    model = VGG19(3, 32, input=32, weights=None, generator=torch.Generator().manual_seed(0))
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.encode(x), model.network((x - shift) / scale).flatten(1))
