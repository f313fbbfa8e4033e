"""A small transformer in plain torch, whose layers are called in all the ways that other people's are."""

import torch
from common import F64
from torch import nn

WIDTH, TOKENS = 6, 5


class Attention(nn.Module):
    def __init__(self, causal=True):
        super().__init__()
        self.qkv, self.out, self.causal = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            causal,
        )

    def forward(self, hidden, mask=None):
        q, k, v = self.qkv(hidden).view(*hidden.shape[:2], 2, -1).transpose(1, 2).chunk(3, -1)
        n = hidden.shape[1]
        allowed = (
            torch.ones(n, n, dtype=torch.bool).tril() if self.causal else torch.ones(n, n).bool()
        )
        if mask is not None:
            allowed = allowed & mask[:, None, None, :].bool()
        weights = (q @ k.mT / 2).masked_fill(~allowed, -1e9).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.drop = Attention(), nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))

    def forward(self, hidden, mask=None):
        mixed, weights = self.attn(hidden=self.norm1(hidden), mask=mask)
        hidden = hidden + self.drop(mixed)
        hidden = hidden + self.mlp(self.norm2(hidden))
        return hidden, {"weights": weights}


class Tiny(nn.Module):
    """Tokens, or embeddings, in; a dict out."""

    def __init__(self, depth=3, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden, _ = layer(hidden, mask=attention_mask)
        hidden = self.norm(hidden)
        return {"hidden": hidden, "logits": self.head(hidden)}


def tiny(**options):
    torch.manual_seed(0)
    return Tiny(**options).to(F64).eval().requires_grad_(False)


def ids(n=2, tokens=TOKENS):
    return torch.randint(11, (n, tokens), generator=torch.Generator().manual_seed(1))


def by_hand(model, name):
    """The layers of `Tiny` from one on, as functions: the independent truth of what goes on from there."""
    layers = list(model.layers)[int(name.split(".")[1]) + 1 :]

    def rest(hidden, mask=None):
        for layer in layers:
            hidden, _ = layer(hidden, mask=mask)
        return model.norm(hidden)

    return rest


def entering(model, name, given, mask=None):
    """What a layer of `Tiny` gives."""
    hidden = model.embed(given)
    for layer in list(model.layers)[: int(name.split(".")[1]) + 1]:
        hidden, _ = layer(hidden, mask=mask)
    return hidden


def whole(model, name, given, mask=None):
    """The whole Jacobian of the last norm in what a layer gives, ``(N, T, D, N, T, D)``, row by row of autograd."""
    rest = by_hand(model, name)
    leaf = entering(model, name, given, mask).detach().requires_grad_()
    y = rest(leaf, mask)
    rows = [torch.autograd.grad(e, leaf, retain_graph=True)[0] for e in y.flatten().unbind()]
    return torch.stack(rows).reshape(*y.shape, *leaf.shape)
