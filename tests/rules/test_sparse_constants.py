"""Products by constant sparse matrices, in every layout, against the same product by the dense one."""

import pytest
import torch
import torch.nn.functional as F
from common import F64, MODES
from tolerances import assert_close
from torch import nn

import jactri

pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")

A = torch.tensor([
    [0.0, 2.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 3.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, -1.5], [0.0, 4.0, 0.0, 0.5, 0.0, 0.0],
], dtype=F64)  # fmt: skip


def twice(d):
    """Coordinates in which every entry comes twice."""
    at = d.nonzero().T
    return torch.sparse_coo_tensor(
        at.repeat(1, 2), d[tuple(at)].repeat(2) / 2, d.shape, check_invariants=True
    )


LAYOUTS = {
    "coo": lambda d: d.to_sparse_coo(),
    "uncoalesced": twice,
    "csr": lambda d: d.to_sparse_csr(),
    "csc": lambda d: d.to_sparse_csc(),
    "bsr": lambda d: d.to_sparse_bsr((2, 2)),
    "bsc": lambda d: d.to_sparse_bsc((2, 2)),
}
# of x (6, 3), with the matrix (4, 6)
PRODUCTS = {
    "matmul": lambda m, x: m @ x.sin(),
    "sparse.mm": lambda m, x: torch.sparse.mm(m, x.sin()) if sparse(m) else m @ x.sin(),
    "from_the_right": lambda m, x: (x.cos().mT[:, :4] @ m).square(),
    "linear": lambda m, x: F.linear(x.mT.exp(), m),
    "vector": lambda m, x: m @ x[:, 0].sin(),
    "mv": lambda m, x: torch.mv(m, x.prod(1)),
    "vector_from_the_right": lambda m, x: x[:4, 0].sin() @ m,
    "addmm": lambda m, x: torch.addmm(x[:4], m, x.cos(), beta=2.0, alpha=-3.0),
    "addmv": lambda m, x: torch.addmv(x[:4, 0], m, x[:, 1].cos(), beta=2.0, alpha=-3.0),
    "transposed": lambda m, x: (m.mT @ x[:4].sin()) * x,
    "twice": lambda m, x: torch.tanh(m.mT @ torch.tanh(m @ x)),
}


def sparse(m):
    return m.layout is not torch.strided


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, layout):
    """First and second derivatives in every strategy."""
    product, matrix, x = PRODUCTS[name], LAYOUTS[layout](A), torch.randn(6, 3, dtype=F64)
    try:
        product(matrix, x)
    except RuntimeError as error:
        pytest.skip(f"torch has no such product: {str(error).partition(chr(10))[0]}")

    def func(x):
        return product(matrix, x)

    def dense(x):
        return product(A, x)

    truth = torch.autograd.functional.jacobian(dense, x)
    for mode in MODES:
        assert_close(jactri.jacobian(func, x, strategy=mode), truth, F64, what=mode)
    assert_close(jactri.jacobian(func, x, chunk_size=2), truth, F64)
    _, pushed = jactri.jvp(func, x, x)
    assert_close(pushed, (truth * x).sum((-2, -1)), F64)
    leaf = x.clone().requires_grad_()
    for mode in MODES[1:]:
        J = jactri.jacobian(func, leaf, create_graph=True, strategy=mode)
        ours = jactri.jacobian_of(J, leaf)
        flat = [torch.autograd.functional.hessian(lambda z, i=i: dense(z).flatten()[i], x)
                for i in range(func(x).numel())]  # fmt: skip
        second = torch.stack(flat).reshape(ours.shape)
        assert_close(ours, second, F64, what=f"second {mode}")
    lap = jactri.laplacian(lambda z: func(z.reshape(6, 3)), x.flatten())
    size = second.abs().max().item()
    assert_close(
        lap, second.flatten(-4, -3).flatten(-2).diagonal(0, -2, -1).sum(-1), F64, scale=size
    )


def test_a_batch_of_matrices():
    x = torch.randn(2, 6, 3, dtype=F64)
    matrices = torch.stack([A, A.flip(0)])
    many = matrices.to_sparse_coo()
    for mode in MODES:
        J = jactri.jacobian(lambda x: torch.bmm(many, x.sin()), x, strategy=mode)
        truth = torch.autograd.functional.jacobian(lambda x: matrices @ x.sin(), x)
        assert_close(J, truth, F64, what=mode)
        J = jactri.jacobian(lambda x: torch.bmm(many, x.sin()), x, strategy=mode, per_sample=True)
        assert_close(J, truth[torch.arange(2), :, :, torch.arange(2)], F64)


class Network(nn.Module):
    """Of the nodes of one graph, ``(1, nodes, features)``, or of samples of ``(N, nodes)``."""

    def __init__(self, matrix, nodes_first):
        super().__init__()
        self.matrix, self.nodes_first = matrix, nodes_first
        n = 3 if nodes_first else 6
        self.first, self.second = nn.Linear(n, 6), nn.Linear(6, 2)

    def forward(self, x):
        if self.nodes_first:
            return (self.matrix @ self.second(torch.tanh(self.matrix @ self.first(x[0]))))[None]
        return self.second(torch.tanh(self.first(x) @ self.matrix))


@pytest.mark.parametrize("nodes_first", [True, False])
@pytest.mark.parametrize("layout", [k for k in LAYOUTS if k[0] != "b"])
def test_networks(layout, nodes_first):
    """Their parameters, and what compile makes of them."""
    torch.manual_seed(1)
    net = Network(LAYOUTS[layout](A.mT @ A), nodes_first).double()
    twin = Network(A.mT @ A, nodes_first).double()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(*((1, 6, 3) if nodes_first else (4, 6)), dtype=F64)
    y = twin(x)
    found = jactri.parameter_jacobian(net, x).dense()
    for name, p in twin.named_parameters():
        rows = [torch.autograd.grad(v, p, retain_graph=True)[0] for v in y.flatten()]
        assert_close(found[name], torch.stack(rows).reshape(found[name].shape), F64, what=name)
    truth = torch.autograd.functional.jacobian(twin, x)
    call = jactri.compile(net, x)
    for _ in range(2):
        assert_close(call(x), truth, F64)


def test_edge_weights_outside_of_the_input():
    """A graph of the Jacobian leads to the values of a sparse matrix that require grad."""
    at = A.nonzero().T
    w, x = A[tuple(at)].clone().requires_grad_(), torch.randn(6, 3, dtype=F64)

    def func(x):
        return torch.sparse_coo_tensor(at, w, A.shape, check_invariants=True) @ x.sin()

    def dense(x):
        return torch.zeros_like(A).index_put(tuple(at), w) @ x.sin()

    for mode in MODES[1:]:
        J = jactri.jacobian(func, x, create_graph=True, strategy=mode)
        T = torch.autograd.functional.jacobian(dense, x, create_graph=True)
        (ours,) = torch.autograd.grad(J.square().sum(), w)
        (theirs,) = torch.autograd.grad(T.square().sum(), w)
        assert_close(ours, theirs, F64, what=mode)


def test_a_sparse_matrix_times_the_input_entry_by_entry():
    m = (A.mT @ A).to_sparse_coo()
    x = torch.randn(6, 6, dtype=F64)
    for mode in MODES:
        J = jactri.jacobian(lambda x: (m * x.sin()) @ torch.ones(6, 2, dtype=F64), x, strategy=mode)
        truth = torch.autograd.functional.jacobian(
            lambda x: (m.to_dense() * x.sin()) @ torch.ones(6, 2, dtype=F64), x
        )
        assert_close(J, truth, F64, what=mode)


def test_what_a_compile_keeps_of_values_of_a_sparse_matrix():
    m = (A.mT @ A).to_sparse_coo().coalesce()
    (rows, columns), w = m.indices(), m.values()
    x = torch.randn(6, 2, dtype=F64)

    def func(x):
        return torch.zeros(6, 2, dtype=F64).index_add(0, rows, w[:, None] * x[columns])

    call = jactri.compile(func, x)
    for _ in range(2):
        assert_close(call(x), torch.autograd.functional.jacobian(func, x), F64)


def test_sparse_tensors_made_of_the_input():
    """By autograd, row by row; and no second derivative where it does not record one."""
    at, x = (A.mT @ A).nonzero().T, torch.randn(6, 6, dtype=F64)
    shape = (6, 6)

    def coordinates(x):
        values = x.sin().flatten()[: at.shape[1]]
        return torch.sparse_coo_tensor(at, values, shape, check_invariants=True) @ x

    def twin(x):
        values = x.sin().flatten()[: at.shape[1]]
        return torch.zeros(shape, dtype=F64).index_put(tuple(at), values) @ x

    def rows(x):
        return x.sin().to_sparse_csr().values().square()

    for func, dense in ((coordinates, twin), (rows, lambda x: x.sin().square().flatten())):
        truth = torch.autograd.functional.jacobian(dense, x)
        for mode in MODES:
            assert_close(jactri.jacobian(func, x, strategy=mode), truth, F64, what=mode)
        assert_close(jactri.jvp(func, x, x)[1], (truth * x).sum((-2, -1)), F64)
        for second in (
            lambda f=func: jactri.laplacian(lambda z: f(z.reshape(6, 6)), x.flatten()),
            lambda f=func: jactri.func.hessian(lambda z: f(z).sum())(x),
            lambda f=func: jactri.jacobian(lambda z: jactri.jacobian(f, z, create_graph=True), x),
        ):
            with pytest.raises(RuntimeError, match=r"Sparse.* has no second derivative"):
                second()
    assert_close(  # a dense result's backward is dense, and recorded
        jactri.func.hessian(lambda z: z.sin().to_sparse().to_dense().sum())(x).reshape(36, 36),
        torch.diag(-x.sin().flatten()),
        F64,
    )


def test_jvp_through_ops_whose_backward_has_no_derivative():
    """The double product fails for these with errors of torch's own."""
    x, eye = torch.randn(2, 2, dtype=F64), torch.eye(2, dtype=F64)

    def masked(x):
        return x.sin().sparse_mask(eye.to_sparse()).to_dense()

    def sampled(x):
        return torch.sparse.sampled_addmm(eye.to_sparse_csr(), x, x.sin()).to_dense()

    for func, dense in (
        (masked, lambda x: x.sin() * eye),
        (sampled, lambda x: x @ x.sin() * eye + eye),
    ):
        truth = torch.autograd.functional.jacobian(dense, x)
        assert_close(jactri.jvp(func, x, x)[1], (truth * x).sum((-2, -1)), F64)


def test_sparse_gradients_are_a_layout_alone():
    """``sparse=True`` of an embedding: its gradients are sparse for autograd, blocks are dense."""
    i, w = torch.tensor([0, 2, 0]), torch.randn(3, 2, dtype=F64)

    def bag(w):
        return F.embedding_bag(i[None], w, sparse=True, mode="mean").exp()

    at = i[:, None].expand(3, 2)
    for func, dense in (
        (lambda w: F.embedding(i, w, sparse=True) ** 2, lambda w: w[i] ** 2),
        (lambda w: torch.gather(w, 0, at, sparse_grad=True) ** 2, lambda w: w[i] ** 2),
        (bag, lambda w: w[i].mean(0, keepdim=True).exp()),
    ):
        truth = torch.autograd.functional.jacobian(dense, w)
        for mode in MODES:
            assert_close(jactri.jacobian(func, w, strategy=mode), truth, F64, what=mode)
        assert_close(jactri.jvp(func, w, w)[1], (truth * w).sum((-2, -1)), F64)
    hessian = torch.autograd.functional.hessian(lambda w: w[i].sin().sum(), w)
    made = jactri.func.hessian(lambda w: F.embedding(i, w, sparse=True).sin().sum())(w)
    assert_close(made, hessian, F64)
    table = nn.Embedding(3, 2, sparse=True, dtype=F64)
    truth = torch.autograd.functional.jacobian(lambda w: w[i], table.weight.detach())
    assert_close(jactri.parameter_jacobian(table, i).dense()["weight"], truth, F64)


def test_parameters_of_a_module_with_a_sparse_buffer():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.eye(3, dtype=F64).to_sparse())
            self.w = nn.Parameter(torch.randn(2, 2, dtype=F64))

        def forward(self, x):
            return torch.sparse.mm(self.a, x @ self.w).tanh()

    net, x = Layer(), torch.randn(3, 2, dtype=F64)
    truth = torch.autograd.functional.jacobian(lambda w: (x @ w).tanh(), net.w.detach())
    assert_close(jactri.parameter_jacobian(net, x).dense()["w"], truth, F64)
