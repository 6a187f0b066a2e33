"""Embeddings, vectors and partitions as files that rows share, and rows that need them."""

import csv
import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch

from umeta_core import costs, experiments, shared_fits, stages
from umeta_core.costs import _missing_fit
from umeta_core.data import load
from umeta_core.embeddings.acai import ACAI
from umeta_core.embeddings.base import read
from umeta_core.embeddings.bigan import BiGAN
from umeta_core.embeddings.simclr import SimCLR
from umeta_core.evaluation import interval
from umeta_core.experiments import _queries, run_row, some_labels, training_tasks
from umeta_core.readers import MINI_IMAGENET
from umeta_core.results import (
    REPOSITORY,
    check_record,
    compare,
    is_reduced,
    matches,
    published,
    read_record,
    record_path,
    unpack_counts,
)
from umeta_core.rows import EMBEDDINGS, ROWS, embedding_plan, find_row
from umeta_core.rows.leo import BEST_TRIAL
from umeta_core.storage import save_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


def test_every_row_has_a_plan_for_its_embedding():
    for row in ROWS:
        if row.needs_embedding:
            assert row.plan is EMBEDDINGS[row.fitted or row.embedding, row.dataset]
    with pytest.raises(ValueError, match="no plan for 'InfoGAN' on omniglot; there are: BiGAN"):
        embedding_plan("InfoGAN", "omniglot")


def test_plans_build_embeddings_of_the_published_width():
    sizes = {"omniglot": (1, 28, 5), "mnist": (1, 28, 5), "mini_imagenet": (3, 84, 5), "celeba": (3, 84, 5)}
    sizes |= {"tiered_imagenet": (3, 84, 5), "glyphs": (1, 28, 5), "celeba_identity": (3, 84, 5)}
    widths = {"ACAI": 256, "DeepCluster": 256, "InfoGAN": 12, "PCA pixels": 256, "PCA-16 pixels": 16,
              "random network": 256, "SimCLR": 256, "features": 256}  # fmt: skip
    built = {}
    for (name, dataset), plan in EMBEDDINGS.items():
        if plan.kind == "given":
            with pytest.raises(FileNotFoundError, match="no generator .*ts: save one"):
                stages.build_embedding(plan, 3, 84)
            continue
        if plan.kind in ("vae", "msgan", "vgg19"):  # have no published width, or need a download
            continue
        if plan.kind == "file":
            with pytest.raises(ValueError, match="nothing is built for an embedding of kind 'file'"):
                stages.build_embedding(plan, 3, 224)
            continue
        channels, size, _ = sizes[dataset]
        key = (plan.kind, str(plan.options), sizes[dataset])
        width = built[key] = built.get(key) or stages.build_embedding(plan, channels, size).d
        usual = 640 if "WRN" in name else 50 if dataset == "mnist" else 200
        assert dataset == "glyphs" or width == widths.get(name.split()[-1] if plan.deviation else name, usual)


def test_views_of_an_embedding_share_its_weights(tmp_path, monkeypatch):
    """The multi-view features go on from the checkpoint of the center crop's, whose options are others; and a
    DeepCluster is whitened in two ways."""
    fits, built = [], []
    monkeypatch.setattr(stages, "build_embedding", lambda plan, *_, **__: built.append(plan.options) or Recorded())
    monkeypatch.setattr(stages, "images_of", lambda *_: load("glyphs", "val"))

    class Recorded:
        def to(self, device):
            return self

        def fit(self, images, **options):
            fits.append((options["checkpoint"], self.options))

    small = "knn-deepcluster-mini-imagenet-small"
    for slug in ("leo-1shot", "leo-multi-view-1shot", small, f"{small}-inductive"):
        stages.fit_embedding(find_row(slug), "smoke", folder=tmp_path)
    assert fits[0] == fits[1] != fits[2] == fits[3]
    assert built[2] == built[3] | {"whiten": "own"} and find_row(small).paper == "cactus"


def test_a_shared_fit_replaces_an_own_one(tmp_path, monkeypatch):
    """What is shared is the encoder, in half precision; a row takes it, says so, and gets (nearly) the own vectors."""
    small = dataclasses.replace(embedding_plan("BiGAN", "omniglot"), options={"d": 200, "hidden": 16},
                                epochs={"smoke": 1, "quick": 1, "full": 1})  # fmt: skip
    monkeypatch.setitem(EMBEDDINGS, ("BiGAN", "omniglot"), small)
    monkeypatch.setattr(shared_fits, "FOLDER", tmp_path / "fits")
    row, own, folder = find_row("nearest-mean-bigan", "glyphs"), tmp_path / "own", tmp_path / "taken"
    with pytest.raises(FileNotFoundError, match="no shared fit bigan-glyphs-full; there are: none"):
        stages.take_fit(row, folder)
    z = stages.vectors(row, "train", "full", folder=own)
    name = stages.fit_file(row, "full", own).name
    model = stages.build_embedding(small, 1, 28)
    shared_fits.share(model, own / name, tmp_path / "fits" / name)
    assert (tmp_path / "fits" / name).stat().st_size < (own / name).stat().st_size / 5
    assert "or take ours: umeta data fitted nearest-mean-bigan-glyphs)" in _missing_fit(row, "full", "cpu", folder)[0]
    with pytest.raises(ValueError, match="bigan-glyphs-full-vectors-train.pt, .* in .*own: move them away"):
        stages.take_fit(row, own)

    assert stages.take_fit(row, folder) == folder / name
    monkeypatch.setattr(BiGAN, "fit", lambda *_, **__: pytest.fail("it was fitted again"))
    taken = stages.vectors(row, "train", "full", folder=folder)
    assert 0 < (taken - z).abs().max() < 1e-2 < z.std()
    assert stages.fitted_by(row, "full", folder) == (read(own / name)["made_by"], True)
    assert stages.fitted_by(row, "full", own)[1] is False
    monkeypatch.setitem(EMBEDDINGS, ("BiGAN", "omniglot"), dataclasses.replace(small, batch=64))
    with pytest.raises(ValueError, match="the fit of another embedding .batch: 128 there, 64 here"):
        stages.fit_embedding(row, "full", folder=folder)
    with pytest.raises(ValueError, match="is of an embedding with .*'batch': 128.*, the row has .*'batch': 64"):
        stages.vectors(row, "train", "full", folder=folder)


def test_only_a_finished_fit_that_half_precision_can_hold_is_shared(tmp_path):
    model = BiGAN(d=4, hidden=8)
    state = {"epoch": 1, "config": {"epochs": 2}, "model": model.state_dict(), "made_by": [], "history": {"seconds": 1}}
    save_tensors(state, tmp_path / "own.pt")
    with pytest.raises(ValueError, match="is at epoch 1 of 2; finish"):
        shared_fits.share(model, tmp_path / "own.pt", tmp_path / "shared.pt")
    huge = {name: torch.full_like(value, 1e6) for name, value in model.state_dict().items()}
    save_tensors(state | {"epoch": 2, "model": huge}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match="e.0.weight has weights that are not finite in half precision"):
        shared_fits.share(model, tmp_path / "own.pt", tmp_path / "shared.pt")
    save_tensors(state | {"epoch": 2}, tmp_path / "own.pt")
    shared_fits.share(model, tmp_path / "own.pt", tmp_path / "shared.pt")
    shared = read(tmp_path / "shared.pt")
    with pytest.raises(ValueError, match="shared.pt is not the checkpoint of a fit"):
        shared_fits.share(model, tmp_path / "shared.pt", tmp_path / "again.pt")
    for other, why in ((BiGAN(d=5, hidden=8), "size mismatch"), (ACAI(depth=4, latent=2), "other weights")):
        with pytest.raises(ValueError, match=f"holds another network: .*{why}"):
            shared_fits.restore(other, shared, "shared.pt")


def test_a_fit_is_shared_by_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_fits, "FOLDER", tmp_path / "fits")
    images, fit = torch.zeros(8, 1, 28, 28, dtype=torch.uint8), tmp_path / "bigan-glyphs-full.pt"
    BiGAN(d=4, hidden=8).fit(images, epochs=1, batch=4, checkpoint=fit, progress=False)
    shared_fits.main([str(fit)])
    encoder = read(tmp_path / "fits" / fit.name)["encoder"]
    assert encoder and all(name.startswith("e.") for name in encoder)


@pytest.mark.parametrize(("model", "shape"), [(BiGAN(d=4, hidden=8), (1, 28, 28)), (SimCLR(3, 32), (3, 32, 32)),
                                              (ACAI(depth=4, latent=2), (1, 28, 28))])  # fmt: skip
def test_encoder_parts_are_all_that_encode_uses(model, shape):
    """Spoil everything else: the codes must stay."""
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        before = model.encode(x)
        for name, value in model.state_dict().items():
            if not name.startswith(model.encoder_parts) and value.is_floating_point():
                value.fill_(torch.nan)
        assert torch.equal(model.encode(x), before) and before.isfinite().all()


def test_centroids_of_other_vectors_are_refused(tmp_path):
    row = find_row("matching-pca-16-pixels", "glyphs")
    first = stages.centroids(row, "smoke", folder=tmp_path)
    assert torch.equal(stages.centroids(row, "smoke", folder=tmp_path), first)
    path = stages.vectors_file(row, "train", "smoke", tmp_path)
    stored = read(path)
    save_tensors(stored | {"z": stored["z"] + 1}, path)
    with pytest.raises(ValueError, match="was made of other vectors; delete it"):
        stages.centroids(row, "smoke", folder=tmp_path)


def test_partitions_of_other_vectors_are_refused(tmp_path):
    row = find_row("cactus-protonets-pca-16-pixels", "glyphs")
    first = stages.make_partitions(row, "smoke", 0, folder=tmp_path)
    assert torch.equal(stages.make_partitions(row, "smoke", 0, folder=tmp_path), first)
    path = stages.vectors_file(row, "train", "smoke", tmp_path)
    stored = read(path)
    save_tensors(stored | {"z": stored["z"].flip(0)}, path)
    with pytest.raises(ValueError, match="was made of other vectors; delete it"):
        stages.make_partitions(row, "smoke", 0, folder=tmp_path)


def test_logistic_regression_that_is_not_tuned_is_standardized_by_the_training_images(tmp_path):
    """LR (SimCLR) of Meta-GMVAE, here on other vectors."""
    row = find_row("linear-pca-16-pixels", "glyphs")
    assert "train" not in row.splits
    row = dataclasses.replace(row, options=find_row("lr-simclr-mini-imagenet").options)
    assert row.splits == ("train", "test")
    z = stages.vectors(row, "train", "smoke", folder=tmp_path)
    classifier = experiments._untuned(row, "smoke", "cpu", tmp_path)
    torch.testing.assert_close(classifier.deviation, torch.from_numpy(z.numpy().std(0)))
    assert classifier.c == 1.0 and run_row(row, "smoke", folder=tmp_path, stages=tmp_path)["cells"]


def test_rows_of_leo_on_small_features_are_short_or_long():
    short, long, trial = (find_row(f"leo-5shot-small{suffix}") for suffix in ("", "-long", "-search"))
    assert (short.budget("full"), long.budget("full"), trial.budget("full")) == (20_000, 100_000, 5000)
    assert short.steps["full"] == 100_000 and "patience" not in short.validation
    assert short.training() == long.training(), "they differ in length alone"
    assert find_row("leo-5shot").budget("full") == 100_000
    number = next(n for n in published("leo") if n["method"] == "LEO (ours)" and n["shot"] == 5)
    assert matches(number, vars(short)) and not matches(number, vars(long))


def test_leo_rows_run_on_features_and_record_their_validation(folder, tmp_path):
    row = find_row("leo-1shot", "glyphs")
    record = run_row(row, "smoke", folder=tmp_path, stages=folder)
    assert record["validation"], "validation accuracies are recorded"
    assert record["cells"][0]["query"] == 19 and record["protocol"]["train_splits"] == ["train", "val"]
    control = run_row(find_row("nearest-mean-features-1shot", "glyphs"), "smoke", folder=tmp_path, stages=folder)
    assert control["cells"][0]["query"] == 19


def write_published(folder, classes=MINI_IMAGENET, each=30):
    """What the authors of LEO published, with random vectors."""
    generator = torch.Generator().manual_seed(0)
    for split, names in classes.items():
        keys = [f"{i}-{name}-{name}_{i}.JPEG" for i, name in enumerate(names * each)]
        vectors = torch.randn(len(keys), 640, generator=generator).numpy()
        (folder / f"{split}_embeddings.pkl").write_bytes(pickle.dumps({"embeddings": vectors, "keys": keys}))


def test_published_embeddings_replace_images(tmp_path):
    row, folder = find_row("leo-1shot"), tmp_path / "stages"
    write_published(tmp_path)
    stages.import_embeddings(row, tmp_path, folder)
    for scale in ("smoke", "quick", "full"):  # nobody who has them should train a WRN-28-10
        images, z = stages.shown(row, "val", scale, folder=folder)
        assert images.n_classes == 16 and z.shape == (480, 640) and images.labels[23] == 7
        assert stages.stage_files(row, scale, 0, folder) == []
    assert images.class_names == sorted(MINI_IMAGENET["val"])
    assert torch.allclose(z.norm(dim=1), torch.ones(480), atol=1e-5)
    few = {"test_tasks": row.test_tasks | {"full": 20}, "validation": row.validation | {"tasks": 20}}
    short = dataclasses.replace(row, at_most=2, **few)
    record = run_row(short, "full", folder=tmp_path, stages=folder)
    assert record["cells"][0]["query"] == 29
    assert record["images"] == {"train": 1920, "val": 480, "test": 600}
    assert "a part of the data (1,920 of 38,400 train images" in record["deviation"]
    assert record["embedding_fit"] == {"origin": "published features"}
    small = find_row("leo-1shot-small")
    assert not stages.vectors_file(small, "val", "full", folder).exists()


def test_published_embeddings_of_another_dataset_are_refused(tmp_path):
    row, folder = find_row("leo-1shot"), tmp_path / "stages"
    write_published(tmp_path, each=2)
    with pytest.raises(ValueError, match="64/16/20 classes to train, validate and test on, tiered_imagenet has 351/97"):
        stages.import_embeddings(find_row("leo-1shot-tiered-imagenet"), tmp_path, folder)
    other = {split: [name.replace("n0", "n9") for name in names] for split, names in MINI_IMAGENET.items()}
    write_published(tmp_path, other, each=2)
    with pytest.raises(ValueError, match="has the class n9.*, which is not one of mini-ImageNet's"):
        stages.import_embeddings(row, tmp_path, folder)
    write_published(tmp_path, MINI_IMAGENET | {"val": MINI_IMAGENET["test"][:16]}, each=2)
    with pytest.raises(ValueError, match="has the class n01930112 in two splits"):
        stages.import_embeddings(row, tmp_path, folder)
    write_published(tmp_path, each=2)
    (tmp_path / "val_embeddings.pkl").unlink()
    with pytest.raises(FileNotFoundError, match="no .*val_embeddings.pkl"):
        stages.import_embeddings(row, tmp_path, folder)
    assert not folder.exists()  # nothing is imported by halves


@pytest.mark.parametrize("slug", ["ro-gan-maml-02", "oc-vae-protonets-04", "umtra-maml", "supervised-protonets"])
def test_tasks_of_generated_and_augmented_images(folder, tmp_path, slug):
    row = find_row(slug, "glyphs")
    record = run_row(row, "smoke", folder=tmp_path, stages=folder)
    assert record["cells"][0]["query"] == 15 and record["protocol"]["source"] == row.source
    assert row.source != "latent" or record["protocol"]["policy"] == row.latent["policy"]


@pytest.mark.parametrize("name", ["leo", "meta-sgd"])
def test_rows_on_small_features_have_the_settings_of_a_recorded_trial(name):
    """The best when the rows were settled; later trials do not change rows that have records."""
    row, learner = find_row(f"{name}-1shot-small"), {"leo": "leo", "meta-sgd": "maml"}[name]
    search = find_row(f"{row.slug}-search")
    path = record_path("leo", search.slug, "full", BEST_TRIAL[learner], REPOSITORY / "results")
    trial, found = read_record(path)["protocol"], search.configuration(BEST_TRIAL[learner])
    assert (row.lr, row.options) == (found.lr, found.options)
    drawn = {name: trial["outer_lr" if name == "lr" else name] for name in search.search}
    assert drawn == {name: found.options.get(name, found.lr) for name in search.search}


def test_a_search_draws_its_configuration_from_the_seed(folder, tmp_path):
    row = find_row("leo-1shot-search", "glyphs")
    first, second = (row.configuration(seed).options["kl"] for seed in (0, 1))
    assert first != second and row.configuration(0) == row.configuration(0)
    assert run_row(row, "smoke", 1, folder=tmp_path, stages=folder)["protocol"]["kl"] == second
    with pytest.raises(ValueError, match="no table 'x'"):
        compare("leo", "x", folder=tmp_path)
    assert compare("leo", "search", "glyphs", tmp_path) == []  # a table of trials: the notebook asks for it
    for seed in range(50):
        drawn = row.configuration(seed)
        assert all(least <= drawn.options.get(name, drawn.lr) <= most for name, (_, least, most) in row.search.items())


def test_trials_differ_in_their_configuration_only(folder, tmp_path):
    """Two trials of a search that draws nothing are the same, whatever their seeds; two runs of a row are not."""
    row = dataclasses.replace(find_row("leo-1shot-search", "glyphs"), search={"lr": ("uniform", 1e-3, 1e-3)})
    for trial, same in ((row, True), (dataclasses.replace(row, search={}), False)):
        found = [run_row(trial, "smoke", seed, folder=tmp_path, stages=folder) for seed in (0, 1)]
        assert (found[0]["cells"] == found[1]["cells"] and found[0]["history"] == found[1]["history"]) == same
        assert found[1]["seed"] == 1 and (found[1]["protocol"].get("draws") == "shared") == same


@pytest.mark.slow
def test_a_row_on_clusters_shares_its_stages(folder, tmp_path):
    row = find_row("cactus-protonets-bigan", "glyphs")
    assert [path.name for path in stages.stage_files(row, "smoke", 0, folder)] == [
        "bigan-glyphs-smoke-partitions-clusters-k50-P2-R16-most-seed0.pt"
    ]
    record = run_row(row, "smoke", folder=tmp_path, stages=folder)
    check_record(record)
    fit = record["embedding_fit"]
    assert {run["device"] for run in fit.pop("made_by")} == {record["device"]}
    assert fit == {"options": {"d": 200}, "epochs": 1, "batch": 128, "paper_epochs": 400, "seed": 0}
    assert record["protocol"]["partitions"] == 100 and record["steps"] == 3
    (file,) = stages.stage_files(row, "smoke", 0, folder)
    partitions = read(file)["partitions"]
    assert partitions.shape == (2, len(load("glyphs", "train"))) and int(partitions.max()) < 50
    made = file.stat().st_mtime_ns
    training_tasks(row, "smoke", 0, stages=folder)
    assert file.stat().st_mtime_ns == made


@pytest.mark.slow
def test_baselines_are_tuned_on_validation_tasks_and_the_tuning_is_recorded(folder, tmp_path):
    row = find_row("ridge-bigan", "glyphs")
    record = run_row(row, "smoke", folder=tmp_path, stages=folder)
    check_record(record)
    for cell in record["cells"]:
        tried = cell["tuned"]["validation"]
        assert tried[str(cell["tuned"]["value"])] == max(tried.values()) and len(tried) == 7
        counts = unpack_counts(cell["answers"]["correct"])
        assert len(counts) == cell["tasks"] and cell["answers"]["seed"] == 0
        right = torch.tensor(counts) / (cell["way"] * cell["query"])
        measured = 100 * right.mean().item(), interval(right)
        assert measured == pytest.approx((cell["accuracy"], cell["ci95"]), abs=1e-3)
    matching = run_row(find_row("matching-bigan", "glyphs"), "smoke", folder=tmp_path, stages=folder)
    assert "tuned" not in matching["cells"][0]


def test_a_training_does_not_go_on_with_other_partitions(tmp_path):
    row, checkpoint = find_row("cactus-protonets-pca-pixels", "glyphs"), tmp_path / "run.pt"
    experiments.train_row(dataclasses.replace(row, at_most=1), "smoke", 0, checkpoint=checkpoint, stages=tmp_path)
    (file,) = stages.stage_files(row, "smoke", 0, tmp_path)
    kept = read(file)
    save_tensors(kept | {"partitions": kept["partitions"].flip(1)}, file)
    with pytest.raises(ValueError, match="belongs to another run .stages: "):
        experiments.train_row(row, "smoke", 0, checkpoint=checkpoint, stages=tmp_path)
    save_tensors(kept, file)
    _, history = experiments.train_row(row, "smoke", 0, checkpoint=checkpoint, stages=tmp_path)
    assert history["step"][-1] == 3
    assert stages.training_mark(find_row("oracle-protonets", "glyphs"), "smoke", 0, tmp_path) == ""


def test_vectors_of_other_images_are_refused(tmp_path):
    row = find_row("knn-bigan", "glyphs")
    save_tensors({"z": torch.zeros(5, 200)}, stages.vectors_file(row, "val", "smoke", tmp_path))
    with pytest.raises(ValueError, match="embeds 5 images but glyphs val has 3080; delete it to embed again"):
        stages.vectors(row, "val", "smoke", folder=tmp_path)


def test_files_of_other_images_or_of_something_else_are_refused(tmp_path, monkeypatch):
    row, n = find_row("knn-bigan", "glyphs"), len(load("glyphs", "val"))
    path = stages.vectors_file(row, "val", "smoke", tmp_path)
    save_tensors({"vectors": torch.zeros(n, 200)}, path)
    with pytest.raises(ValueError, match="val.pt holds no vectors .* under 'z'; delete it"):
        stages.vectors(row, "val", "smoke", folder=tmp_path)
    save_tensors({"z": torch.zeros(n, 200), "images": stages.fingerprint(load("glyphs", "val"))}, path)
    assert stages.vectors(row, "val", "smoke", folder=tmp_path).shape == (n, 200)
    other = load("glyphs", "val")
    other.images = other.images.flip(0)
    monkeypatch.setattr(stages, "images_of", lambda *_: other)
    with pytest.raises(ValueError, match="val.pt was made of other images than those of glyphs val now; delete it"):
        stages.vectors(row, "val", "smoke", folder=tmp_path)
    wide, clustered = find_row("knn-bigan-mnist"), find_row("cactus-maml-bigan", "glyphs")
    save_tensors({"z": torch.zeros(n, 49)}, stages.vectors_file(wide, "val", "smoke", tmp_path))
    with pytest.raises(ValueError, match="vectors of 49 numbers but knn-bigan-mnist has d=50"):
        stages.vectors(wide, "val", "smoke", folder=tmp_path)
    path = stages.partitions_file(clustered, "smoke", 0, tmp_path)
    save_tensors({"partitions": torch.zeros(2, n), "images": "another"}, path)
    with pytest.raises(ValueError, match="was made of other images"):
        stages.make_partitions(clustered, "smoke", 0, folder=tmp_path)
    save_tensors({"partitions": torch.zeros(2, n)}, path)  # an older file
    assert stages.make_partitions(clustered, "smoke", 0, folder=tmp_path).shape == (2, n)


def test_the_vectors_of_imagenet_are_read_from_the_files_that_the_error_names(tmp_path, monkeypatch):
    row = find_row("knn-deepcluster-imagenet")
    monkeypatch.setattr(stages, "images_of", lambda *_: load("glyphs", "val"))
    with pytest.raises(FileNotFoundError, match="need the vectors of DeepCluster's VGG-16") as error:
        stages.vectors(row, "val", "full", folder=tmp_path)
    named = [word.strip(",;") for word in str(error.value).split() if word.startswith(str(tmp_path))]
    assert len(named) == 3
    for number, file in enumerate(named):
        save_tensors({"z": torch.full((3080, 256), float(number))}, file)
    for number, split in enumerate(("train", "val", "test")):
        assert (stages.vectors(row, split, "full", folder=tmp_path) == number).all()


def test_a_row_asks_for_validation_images_only_if_it_needs_them(tmp_path, monkeypatch):
    def splits(slug):
        return [path.stem.split("-")[-1] for path in stages.stage_files(find_row(slug), "full", 0, tmp_path)]

    assert splits("nearest-mean-bigan-celeba") == ["test"]
    assert splits("matching-bigan-celeba") == ["train", "test"]
    assert splits("linear-bigan-celeba") == ["val", "test"]
    assert splits("leo-1shot") == ["train", "val", "test"]
    assert splits("cactus-maml-bigan-codes-mnist")[:2] == ["train", "test"]

    def empty(name, split, **_):
        raise ValueError(f"{name} {split!r} is empty in packs")

    monkeypatch.setattr(stages, "load", empty)
    with pytest.raises(ValueError, match="'val' is empty in packs. knn-bigan-celeba needs validation images; rows of"):
        stages.vectors(find_row("knn-bigan-celeba"), "val", "full", folder=tmp_path)


def test_a_part_of_the_data_is_recorded_and_reduces_a_run(monkeypatch):
    few = {"train": range(162_770), "val": range(19_867), "test": range(120)}
    monkeypatch.setattr(experiments, "shown", lambda row, split, *_, **__: (few[split], None))
    found = experiments.images_record(find_row("cactus-maml-bigan-celeba"), "full")
    assert found["images"] == {"train": 162_770, "test": 120}
    assert found["deviation"] == "a part of the data (120 of 19,962 test images)"
    assert is_reduced({"scale": "full", "steps": 5, "paper_steps": 5, **found})
    few["test"] = range(19_962)
    found = experiments.images_record(find_row("cactus-maml-bigan-celeba"), "full")
    assert found["deviation"] == "" and not is_reduced({"scale": "full", "steps": 5, "paper_steps": 5, **found})
    five_way = experiments.images_record(find_row("oracle-maml-5way"), "full")  # any number of Omniglot's images
    assert five_way["deviation"] == "trained on 5-way tasks"


def test_a_stage_that_nobody_needs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no row needs"):
        stages.run_stage([find_row("random-maml")], "smoke", [0], tmp_path / "x.pt")


def test_random_and_pixel_tasks_need_no_embedding(tmp_path):
    row = find_row("random-maml", "glyphs")
    assert stages.stage_files(row, "smoke", 0, tmp_path) == []
    partitions = stages.make_partitions(row, "smoke", 0, folder=tmp_path)
    assert partitions.shape[0] == 2 and partitions.min() == 0 and partitions.max() == 49
    (file,) = stages.stage_files(find_row("pixels-maml", "glyphs"), "smoke", 0, tmp_path)
    assert file.name == "pixels-glyphs-smoke-partitions-clusters-k50-P1-R6-seed0.pt"


def test_more_clusters_than_can_be_large_are_no_error(monkeypatch):
    asked = []
    monkeypatch.setattr(stages.parts, "cluster_partitions", lambda z, k, many, g, **more: asked.append(more))
    for slug in ("curve-protonets-k2000", "curve-protonets-k50"):
        row, z = find_row(slug, "glyphs"), torch.zeros(len(load("glyphs", "train")), 200)
        stages._partitions(row, "quick", row.clusters, 10, row.least(), z, torch.Generator())
    assert [more["enough"] for more in asked] == [0.0, 0.8]


def test_a_share_of_the_labels():
    images = load("glyphs", "val")
    some = some_labels(images, 0.1, 0)
    classes = some[some >= 0].unique()
    assert len(classes) == round(0.1 * images.n_classes)
    assert torch.equal(some[some >= 0], images.labels[some >= 0])
    assert not torch.equal(some, some_labels(images, 0.1, 1))
    row = find_row("few-labels-protonets-10", "glyphs")
    assert int(training_tasks(row, "smoke", 0).usable(16)[1]) == round(0.1 * load("glyphs", "train").n_classes)


def test_labels_are_mixed_in_proportion_to_the_images_behind_them():
    row = find_row("mixed-protonets-10")
    assert row.share == 0.1 and row.mix == pytest.approx(1 / 11)
    assert row.protocol()["labeled_share"] == 0.1 and row.protocol()["labeled_tasks"] == row.mix
    assert find_row("semi-supervised-imagenet").mix == pytest.approx(64 / (64 + 964))  # CACTUs, App. G


def test_rows_that_cut_space_for_other_ways_do_not_share_partitions():
    twenty, five = find_row("hyperplanes-bigan"), find_row("hyperplanes-bigan-5way")
    assert twenty.way != five.way
    assert stages.partitions_file(twenty, "full", 0) != stages.partitions_file(five, "full", 0)


# What ports of LEO get wrong


def test_features_are_not_taken_as_they_come_but_scaled_to_length_1(folder):
    row = find_row("leo-1shot", "glyphs")
    raw = stages.fit_embedding(row, "smoke", folder=folder).embed(load("glyphs", "test").images)
    _, z = stages.shown(row, "test", "smoke", folder=folder)
    assert torch.allclose(z, torch.nn.functional.normalize(raw, dim=1), atol=1e-5)
    assert raw.norm(dim=1).std() > 0.01 and torch.allclose(z.norm(dim=1), torch.ones(len(z)), atol=1e-5)


def test_meta_training_does_not_leave_out_the_validation_classes(folder):
    for slug, splits in (("leo-1shot", ("train", "val")), ("leo-train-only-1shot", ("train",))):
        source = training_tasks(find_row(slug, "glyphs"), "smoke", 0, stages=folder)
        assert source.images.n_classes == sum(load("glyphs", split).n_classes for split in splits)


def test_queries_are_not_15_but_all_other_images_of_600():
    row = find_row("leo-5shot")
    for sizes, queries in (([600, 600], 595), ([732, 1300], 595), ([20, 0, 30], 15)):
        assert _queries(row, 5, SimpleNamespace(size=torch.tensor([sizes]))) == queries


def test_hyperparameters_of_leo_are_those_of_the_readme_not_of_table_6():
    names = {"outer_lr": "lr", "l2_penalty_weight": "l2", "orthogonality_penalty_weight": "orthogonality",
             "dropout_rate": "dropout", "kl_weight": "kl", "encoder_penalty_weight": "encoder_penalty"}  # fmt: skip
    with open(REPOSITORY / "results" / "paper" / "leo_hparams.csv", newline="", encoding="utf-8") as file:
        printed = [line for line in csv.DictReader(file) if line["table"] == "README"]
    assert len(printed) == 4 * len(names)
    for line in printed:
        place = {"miniImageNet": "", "tieredImageNet": "-tiered-imagenet"}[line["dataset"]]
        row = find_row(f"leo-{line['shot']}shot{place}")
        name = names[line["hyperparameter"].split("flag ")[1].rstrip(")")]
        assert ({"lr": row.lr} | row.options)[name] == float(line["value"]), (row.slug, name)


def test_rows_of_cactus_have_the_numbers_of_tables_5_and_6():
    ways = {"mnist": 10, "omniglot": 20, "mini_imagenet": 5, "celeba": 2}
    trained = [r for r in ROWS if r.paper == "cactus" and r.trained and r.dataset in ways and r.table in "7 8 9 10"]
    assert len(trained) > 40
    for row in trained:
        steps = 30_000 if row.dataset in ("mnist", "omniglot") else 60_000
        assert (row.lr, row.shot, row.test_query, row.steps["full"]) == (1e-3, 1, 5, steps), row.slug
        assert row.way == (5 if row.slug.endswith("-5way") else ways[row.dataset]), row.slug
        assert (row.tasks, row.query) == ((8, 5) if row.learner == "maml" else (1, 15)), row.slug
        if row.learner == "maml":
            inner = [row.options[name] for name in ("inner_lr", "inner_steps", "test_steps", "inner_loss")]
            assert inner == [0.05, 5, 50, "sum"], row.slug
    assert stages.spread(find_row("hyperplanes-deepcluster-mini-imagenet")) == 0
    assert stages.spread(find_row("hyperplanes-bigan")) > 0


def test_only_matrices_of_a_shared_fit_lose_digits():
    for shape, dtype in (((3, 3), torch.float16), ((3,), torch.float32), ((), torch.float32)):
        assert shared_fits._half("w", torch.full(shape, 1 / 3)).dtype == dtype


def test_a_plan_counts_the_restarts_of_k_means():
    """The best of ten for one partition, of three for each of many of a prototypical network, else one."""
    seconds = [costs._missing_partitions(find_row(slug), "full", 0, "cpu")[1] for slug in (
        "cactus-maml-bigan-p1", "cactus-protonets-bigan", "cactus-maml-bigan")]  # fmt: skip
    assert seconds == pytest.approx([1.5 * 10, 1.5 * 100 * 3, 1.5 * 100])
