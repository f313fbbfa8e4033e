"""The main job on real images: ``python -m jactri demo``.

``run`` trains a convolutional denoiser, an autoencoder and a classifier on scikit-learn's handwritten digits, computes
their Jacobians with jactri, checks them against float64 autograd, times them beside torch's own ways and draws them.
Nothing heavy is imported before ``run`` is called.
"""

from jactri.demo.main import DemoFailure, MissingExtra, run

__all__ = ["DemoFailure", "MissingExtra", "run"]
