"""The book's figure style and the figures that recur in it.

Everything is drawn as SVG on a transparent background, with text and axes in a gray that reads on white and on the
dark theme, and in the palette of Okabe and Ito, which color-blind readers can tell apart.
"""

import math
import sys

import matplotlib.pyplot as plt
import torch
from cycler import cycler

GRAY = "#7a7a7a"  # contrast 4.3 on white and 4.4 on #121212, the dark theme's background: readable on both
PALETTE = {
    "orange": "#E69F00", "sky": "#56B4E9", "green": "#009E73", "blue": "#0072B2",
    "vermilion": "#D55E00", "purple": "#CC79A7", "gray": "#7a7a7a",
}  # fmt: skip


def use_style() -> None:
    """Set matplotlib's defaults to the book's style; in a notebook, also draw figures as SVG."""
    order = ("blue", "orange", "green", "vermilion", "sky", "purple")
    faces = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    plt.rcParams.update(dict.fromkeys(faces, "none") | dict.fromkeys(inks, GRAY))
    plt.rcParams.update({
        "axes.prop_cycle": cycler(color=[PALETTE[name] for name in order]),
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": "medium",
        "figure.dpi": 96, "figure.figsize": (6.4, 3.4), "figure.constrained_layout.use": True, "font.size": 11,
        "grid.color": GRAY, "grid.alpha": 0.3, "legend.frameon": False, "lines.linewidth": 1.8,
        "savefig.format": "svg", "savefig.transparent": True,
        "svg.fonttype": "path", "svg.hashsalt": "umeta",  # the same figure is the same file, whatever fonts there are
    })  # fmt: skip
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg")


def _picture(image) -> dict:
    """What ``imshow`` needs for one image ``[C, H, W]``, uint8 or float in [0, 1], gray or color."""
    image = torch.as_tensor(image).detach().cpu()
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    pixels = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    return {"X": pixels.clamp(0, 1).numpy(), "cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}


def contact_sheet(images, columns: int = 20, scale: float = 0.4):
    """Many small images in rows: images ``[n, C, H, W]`` (uint8, or float in [0, 1]). Returns the figure."""
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * scale, rows * scale), squeeze=False)
    for number, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if number < len(images):
            ax.imshow(**_picture(images[number]))
    return figure


def show_clusters(images, partition, labels=None, clusters: int = 5, members: int = 12, generator=None, scale=0.5):
    """A line of members for some clusters of a partition ``[n]`` of images ``[n, C, H, W]`` (CACTUs, Fig. 2a).

    With `labels` ``[n]`` the lines go from the purest cluster to the least pure, each with its purity; else from the
    largest to the smallest, with its size. Clusters with fewer members than a line holds are left out. Returns the
    figure. ValueError: there are fewer such clusters than lines.
    """
    numbers, sizes = partition[partition >= 0].long().unique(return_counts=True)
    numbers, value = numbers[sizes >= members], sizes[sizes >= members].float()
    if len(numbers) < clusters:
        raise ValueError(f"{len(numbers)} clusters have {members} members, {clusters} are to be shown; ask for fewer")
    if labels is not None:
        value = torch.stack([(labels[partition == c] == labels[partition == c].mode().values).float().mean()
                             for c in numbers])  # fmt: skip
    order = value.argsort(descending=True, stable=True)[torch.linspace(0, len(numbers) - 1, clusters).long()]
    lines = [(partition == c).nonzero().squeeze(1) for c in numbers[order]]
    chosen = torch.cat([line[torch.randperm(len(line), generator=generator)[:members]] for line in lines])
    figure = contact_sheet(images[chosen], columns=members, scale=scale)
    for line, number in enumerate(value[order].tolist()):
        text = f"{number:.0f}" if labels is None else f"{number:.2f}"
        figure.axes[members * line].text(-0.15, 0.5, text, ha="right", va="center", fontsize=9,
                                         transform=figure.axes[members * line].transAxes)  # fmt: skip
    return figure


def show_episode(episodes, t: int = 0, queries: int = 5, predictions=None, scale: float = 0.5):
    """Task ``t`` of ``episodes``: one line per class, support left of the rule, up to ``queries`` queries right of it.

    ``predictions``: class numbers ``[N*Q]`` of the task's queries; wrong ones get a vermilion frame. Returns the
    figure.
    """
    support, query = episodes.support[t], episodes.query[t, :, :queries]
    way, shot, shown = support.shape[0], support.shape[1], query.shape[1]
    if predictions is not None:
        predictions = torch.as_tensor(predictions).cpu().reshape(way, -1)
    widths = [1] * shot + [0.3] + [1] * shown
    figure, axes = plt.subplots(
        way, len(widths), figsize=(scale * (sum(widths) + 1), scale * way + 0.3), squeeze=False, width_ratios=widths
    )
    for n in range(way):
        for ax, image in zip([*axes[n, :shot], *axes[n, shot + 1 :]], [*support[n], *query[n]], strict=True):
            ax.imshow(**_picture(image))
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(False)
        axes[n, shot].set_axis_off()
        axes[n, 0].set_ylabel(str(n), rotation=0, ha="right", va="center")
        for q in range(shown if predictions is not None else 0):
            if predictions[n, q] != n:
                for spine in axes[n, shot + 1 + q].spines.values():
                    spine.set(visible=True, color=PALETTE["vermilion"], linewidth=2)
    axes[0, 0].set_title("support", loc="left")
    axes[0, shot + 1].set_title("query", loc="left")
    return figure


def accuracy_bars(labels, means, intervals=None, published=None, chance=None, ax=None):
    """Horizontal bars of accuracies (percent) and intervals; ``published`` values as marks, ``chance`` as a line.

    ``labels``, ``means``, ``intervals`` and ``published`` have one entry per bar (None: nothing drawn there).
    Returns the axes.
    """
    ax = ax or plt.subplots(figsize=(6.4, 0.42 * len(labels) + 0.9))[1]
    places = list(range(len(labels)))
    errors = None if intervals is None else [ci or 0 for ci in intervals]
    ax.barh(places, [mean or 0 for mean in means], xerr=errors, ecolor=GRAY, height=0.6, color=PALETTE["sky"])
    if published is not None:
        marks = [place for place in places if published[place] is not None]
        if marks:
            values = [published[place] for place in marks]
            ax.plot(values, marks, "D", color=PALETTE["vermilion"], markersize=6, label="published")
    if chance is not None:
        ax.axvline(chance, color=GRAY, linestyle=":", label="chance")
    ax.set(yticks=places, yticklabels=labels, xlabel="accuracy (%)", xlim=(0, 100))
    ax.invert_yaxis()
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def curve(x, y, intervals=None, label=None, xlabel="step", ylabel="accuracy (%)", ax=None):
    """A line, with a shaded band of half-width ``intervals`` if given. Returns the axes, to draw the next line on."""
    ax = ax or plt.subplots()[1]
    (line,) = ax.plot(x, y, label=label)
    if intervals is not None:
        low, high = ([value + sign * half for value, half in zip(y, intervals, strict=True)] for sign in (-1, 1))
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True, axis="y")
    if label is not None:
        ax.legend()
    return ax
