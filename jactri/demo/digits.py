"""The data and the three networks of the demo."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

LATENT = 2  # a plane, so that the decoder's metric can be drawn whole
BATCH = 64
NOISE = 0.4  # of a pixel in [0, 1], standard deviation: what the denoiser is to take away


@dataclasses.dataclass(frozen=True)
class Digits:
    """8x8 grey images in [0, 1], shape (N, 1, 8, 8), and their labels, split into a training and a test part."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load(seed: int) -> Digits:
    """scikit-learn's bundled digits: 1,797 scans, a quarter of each class held back for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, random_state=seed, stratify=raw.target
    )
    return Digits(images[train], labels[train], images[test], labels[test])


class Autoencoder(nn.Module):
    """64 pixels to a point of the plane and back; smooth, so that its geometry is."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 128),
            nn.Tanh(),
            nn.Linear(128, 64),
            nn.Tanh(),
            nn.Linear(64, LATENT),
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, 64),
            nn.Tanh(),
            nn.Linear(64, 128),
            nn.Tanh(),
            nn.Linear(128, 64),
            nn.Sigmoid(),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(images))


def make_classifier() -> nn.Sequential:
    """Three 3x3 convolutions and a Linear: images (N, 1, 8, 8) to scores (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def make_denoiser() -> nn.Sequential:
    """Three 3x3 convolutions: grey images (N, 1, H, W) of any size to images of the same."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
    )


def pages(images: torch.Tensor, side: int) -> torch.Tensor:
    """Digits set ``side`` in a row and as many rows: (N, 1, 8, 8) to (N // side**2, 1, 8 side, 8 side)."""
    whole = images[: len(images) // side**2 * side**2].reshape(-1, side, side, 8, 8)
    return whole.transpose(2, 3).reshape(-1, 1, 8 * side, 8 * side)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from more threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def _fit(
    net: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    count: int,
    epochs: int,
    tick: Callable[[], None],
    size: int = BATCH,
) -> None:
    steps = epochs * -(-count // size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(count).split(size):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        tick()
    # Frozen: torch.func would otherwise record a graph in the parameters, and lose time to it in the table.
    net.eval().requires_grad_(False)


def train_classifier(data: Digits, epochs: int, tick: Callable[[], None]) -> nn.Sequential:
    """A classifier trained on noisy copies of the images, which keeps its input gradients legible."""
    net = make_classifier()

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        images = data.train_images[batch]
        return F.cross_entropy(
            net(images + 0.2 * torch.randn_like(images)), data.train_labels[batch]
        )

    _fit(net, loss_of, len(data.train_labels), epochs, tick)
    return net


def train_autoencoder(data: Digits, epochs: int, tick: Callable[[], None]) -> Autoencoder:
    """An autoencoder whose codes are jittered and pulled to the origin, so that the plane has no far islands."""
    net = Autoencoder()

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        images = data.train_images[batch]
        codes = net.encoder(images)
        decoded = net.decoder(codes + 0.15 * torch.randn_like(codes))
        return F.mse_loss(decoded, images.flatten(1)) + 1e-3 * codes.square().mean()

    _fit(net, loss_of, len(data.train_labels), epochs, tick)
    return net


def train_denoiser(data: Digits, epochs: int, tick: Callable[[], None]) -> nn.Sequential:
    """A denoiser of pages of digits."""
    net, clean = make_denoiser(), pages(data.train_images, 3)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        page = clean[batch]
        return F.mse_loss(net(page + NOISE * torch.randn_like(page)), page)

    _fit(net, loss_of, len(clean), epochs, tick, size=8)
    return net


def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images whose largest score is their label."""
    with torch.no_grad():
        return (net(images).argmax(1) == labels).float().mean().item()
