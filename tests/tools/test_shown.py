"""What objects say of themselves: short texts, and in a notebook the same as plain HTML."""

import copy
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from common import Cube
from torch import nn

import jactri

X = torch.linspace(-1, 1, 20).view(5, 4)
BLUR, IMAGE = nn.Conv2d(1, 2, 3, padding=1), torch.linspace(-1, 1, 36).view(1, 1, 6, 6)
NAMED = nn.Sequential()
NAMED.add_module("<b>first</b>", nn.Linear(4, 3))


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def opaque(x):
    return Cube.apply(x)


OBJECTS = {
    "explain": lambda: jactri.explain(net(), X),
    "explain a fallback": lambda: jactri.explain(opaque, X),
    "explain what is compiled": lambda: jactri.explain(net(), X, compiled=True, engine="fx"),
    "profile": lambda: jactri.profile(net(), X, repeats=1),
    "check": lambda: jactri.check(opaque, X),
    "Compiled": lambda: jactri.compile(net(), X, engine="fx"),
    "ParameterJacobian": lambda: jactri.parameter_jacobian(NAMED, X),
    "its transpose": lambda: jactri.parameter_jacobian(NAMED, X).T,
    "GGN": lambda: jactri.ggn(NAMED, X, torch.ones(5, 3)),
    "GGN of a function": lambda: jactri.ggn(NAMED, X, lambda block: block),
    "Banded": lambda: jactri.jacobian(BLUR, IMAGE, layout="banded"),
    "Banded samples": lambda: jactri.jacobian(BLUR, IMAGE, layout="banded", per_sample=True),
    "sparsity": lambda: jactri.sparsity(BLUR, IMAGE),
    "sparsity of samples": lambda: jactri.sparsity(BLUR, IMAGE, per_sample=True),
    "sparsity of nothing": lambda: jactri.sparsity(lambda x: x.detach(), X),
    "nothing in a band": lambda: jactri.jacobian(lambda x: x.detach(), X, layout="banded"),
    "Rule": lambda: jactri.rule(Cube),
}


class Read(HTMLParser):
    """The texts of HTML whose elements are closed as they were opened."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("name", OBJECTS)
def test_text_and_html_say_the_same(name):
    shown = OBJECTS[name]()
    text, page = repr(shown), shown._repr_html_()
    assert text == str(shown)
    assert "tensor(" not in text and len(text) < 3000
    read = Read(page)
    words = re.findall(r"\S+", " ".join(read.texts))
    assert words == re.findall(r"\S+", text)
    assert {tag for tag, _ in read.tags} <= {"div", "table", "tr", "th", "td", "svg", "rect"}
    for _, given in read.tags:  # the page's own colours, in the dark too
        colours = re.findall(r"#\w+|rgb\S+|(?<!-)color:\s*\S+|background\S*", str(given))
        assert colours == [] and given.get("fill", "currentColor") == "currentColor"


def test_names_are_escaped():
    page = jactri.parameter_jacobian(NAMED, X)._repr_html_()
    assert "<b>" not in page and "&lt;b&gt;first&lt;/b&gt;.weight" in page


def test_the_picture_of_a_band_has_its_entries():
    band = jactri.jacobian(BLUR, IMAGE, layout="banded")
    mask = jactri.sparsity(BLUR, IMAGE)
    there = torch.zeros(72, 36)
    tags = Read(band._repr_html_()).tags
    assert [t for t in Read(mask._repr_html_()).tags if t[0] == "rect"] == [
        t for t in tags if t[0] == "rect"
    ]
    for tag, given in tags:
        if tag == "rect":
            x, y = int(given["x"]), int(given["y"])
            there[y, x : x + int(given["width"])] = 1
    rows = torch.arange(64 * 36).view(64, 36)
    assert there[64:].sum() == 0  # at most 64 cells
    full = mask.to_dense().view(72, 36)
    cells = torch.zeros_like(rows, dtype=torch.bool)
    for i in range(72):
        cells[i * 64 // 72] |= full[i]
    assert torch.equal(there[:64].bool(), cells)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
def test_what_is_computed_of_a_pattern_is_a_plain_tensor():
    mask = jactri.sparsity(BLUR, IMAGE)
    assert repr(copy.deepcopy(mask)) == repr(mask)
    kept = io.BytesIO()
    torch.save(mask, kept)
    kept.seek(0)
    loaded = torch.load(kept, weights_only=True)
    assert torch.equal(loaded.to_dense(), mask.to_dense())
    for made in (loaded, mask.to_dense(), mask.float(), mask.coalesce().indices()):
        assert type(made) is torch.Tensor
    assert isinstance(mask, torch.Tensor) and mask.is_sparse and mask.dtype == torch.bool


def test_sizes_and_dtypes_are_told():
    band = jactri.jacobian(BLUR.double(), IMAGE.double(), layout="banded")
    BLUR.float()
    said = "torch.float64 on cpu: up to 9 entries a row, values (1, 2, 6, 6, 9) of 5.18 kB, dense 20.7 kB"
    assert said in repr(band)
    jac = repr(jactri.parameter_jacobian(net().double(), X.double()))
    assert re.search(r"0\.weight +\(8, 4\) +torch\.float64 +3\.84 kB +cotangent x activation", jac)
    assert "loss_hessian a function" in repr(OBJECTS["GGN of a function"]())


def test_explain_says_what_its_cost_is_of_and_what_can_be_done():
    plan = str(jactri.explain(opaque, X))
    assert "accumulation only, without func itself:" in plan and "tied axes: those" in plan
    assert re.search(r"fallbacks: CubeBackward: .*jactri\.rule", plan)
    assert "fallbacks: none" in str(jactri.explain(net(), X))
