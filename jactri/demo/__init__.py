"""The main job on real images: ``python -m jactri demo``.

``run`` trains a convolutional classifier and an autoencoder on scikit-learn's handwritten digits, computes their
Jacobians with jactri, checks them against float64 autograd, times them beside torch's own ways and draws them.
Nothing heavy is imported before ``run`` is called.
"""

from jactri.demo.main import DemoFailure, MissingExtra, run

__all__ = ["DemoFailure", "MissingExtra", "run"]
