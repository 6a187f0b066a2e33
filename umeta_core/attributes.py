"""CelebA attribute tasks: a class is a conjunction of three attribute values (CACTUs, section 4 and appendix B)."""

import torch

from .episodes import Episodes, features_of, sample_without_replacement


def attribute_prototypes(images, attributes, r):
    """Task prototypes over `attributes`: int64 [P, 3, 2], for each of three attributes its column and its Boolean.

    A prototype is three attributes (in the order of `attributes`) and three Booleans, the first of them False: a task
    and the same with its two classes exchanged are one. Class 1 has all three values, class 0 has all three negated; a
    prototype is kept if each class has at least `r` images. The paper, which does not give r, counts 4287 for the first
    20 attributes on CelebA's training part, 391 for the next 10 on validation, 402 for the last 10 on test.

    images: an ImageSet with `attributes`; attributes: names or columns. ValueError: no attributes, or an unknown one.
    """
    if images.attributes is None:
        raise ValueError(f"{images.name} has no attributes: load('celeba', ...)")
    unknown = [name for name in attributes if isinstance(name, str) and name not in images.attribute_names]
    if unknown:
        raise ValueError(f"unknown attributes {', '.join(unknown)}: choose from {', '.join(images.attribute_names)}")
    columns = torch.tensor([images.attribute_names.index(a) if isinstance(a, str) else int(a) for a in attributes])
    values = images.attributes[:, columns.to(images.attributes.device)].float()
    # Literal 2a + v: attribute a has Boolean v. Counts of all triples are matrix products (exact below 2^24 images).
    literals = torch.stack([1 - values, values], dim=-1).flatten(1)
    counts = torch.stack([(literals * literal[:, None]).T @ literals for literal in literals.T]).cpu().long()
    n = len(columns)
    triples = torch.combinations(torch.arange(n), 3).repeat_interleave(4, 0)
    booleans = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]).repeat(len(triples) // 4, 1)
    first = counts[tuple((2 * triples + booleans).T)]
    second = counts[tuple((2 * triples + 1 - booleans).T)]
    kept = (first >= r) & (second >= r)
    return torch.stack([columns[triples], booleans], dim=-1)[kept]


class AttributeTasks:
    """Two-way tasks of CelebA: one of the prototypes, then R images of each of its two classes.

    images: an ImageSet with attributes; prototypes int64 [P, 3, 2] from `attribute_prototypes`, whose classes have at
    least R members; features as in `PartitionTasks`. Works without the P partitions, of which full CelebA's 4287 would
    fill 5 GB. ValueError: no prototypes, or features of other images or with NaN.
    """

    def __init__(self, images, prototypes, features=None):
        if not len(prototypes):
            raise ValueError(f"no three attributes of {images.name} {images.split} ({len(images)} images) make two "
                             "classes that are large enough; take more images, or a smaller r")
        self.images, self.features = images, features_of(images, features)
        self.prototypes = prototypes.to(images.attributes.device)

    def sample(self, tasks, way, shot, query, generator):
        """Draw `tasks` 2-way episodes. ValueError: another way, or a class with fewer than shot + query images."""
        if way != 2:
            raise ValueError(f"attribute tasks have 2 classes, not {way}; use way=2")
        values = self.images.attributes
        p = torch.randint(len(self.prototypes), (tasks,), generator=generator, device=values.device)
        columns, booleans = self.prototypes[p].unbind(2)  # [T, 3]
        agree = (values[:, columns] == booleans).sum(2).T  # [T, n]: 3 for one class, 0 for the other
        members = torch.stack([agree == 0, agree == 3], 1).cumsum(2)  # [T, 2, n]: how many there are so far
        counts = members[:, :, -1]
        if (counts < shot + query).any():
            raise ValueError(f"a class has fewer than {shot} + {query} images; make the prototypes with that r")
        chosen = sample_without_replacement(counts, shot + query, generator)
        index = torch.searchsorted(members, chosen + 1)  # where the count first is that high
        swap = torch.rand(tasks, 1, 1, generator=generator, device=values.device) < 0.5
        index = torch.where(swap, index.flip(1), index)
        shown = self.images.shown(index) if self.features is None else self.features[index]
        return Episodes(shown[:, :, :shot], shown[:, :, shot:])
