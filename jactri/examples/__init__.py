"""What jactri is used for, in short programs: ``python -m jactri.examples.NAME``.

- ``contractive``: an autoencoder whose code ignores noise, by a penalty on its encoder's Jacobian
- ``geodesic``: shortest paths between digits in a VAE's latent plane, by its decoder's metric JᵀJ
- ``kalman``: an extended Kalman filter over learned dynamics, linearised by ``jactri.compile``
- ``bundle``: cameras and points from sightings, by sparse least squares with ``jactri.normal_equations``
- ``poisson``: a network that solves Poisson's equation, by its Laplacian
- ``flow``: a continuous normalising flow with an exact trace, by the divergence of its field
- ``meanflow``: digits in one step, by ``jactri.jvp`` of a network that is its own target
- ``attention``: a transformer flow over digits with an exact trace, and what an estimate of it loses
- ``lens``: what the words of a sentence do to a language model, and how much of a word gets through its layers
- ``laplace``: a regression network that knows where it knows nothing, by its parameter Jacobian

Each takes ``--output FOLDER``, ``--quick`` and ``--no-plot``, prints a table and saves a picture.
"""
