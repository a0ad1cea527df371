"""Inputs and checks for the losses, shared by the CPU, interpreter and GPU tests."""

from __future__ import annotations

import torch
from torch.nn import functional

from tests.references import cross_entropy as reference
from tests.references.yardstick import assert_as_good_as

IGNORE = reference.IGNORE
# (scale, soft-cap), as families have them: most, Cohere and Granite, Gemma 2, both
BENDS = [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)]
# Rows, or numbers that err each on its own, to judge together on a GPU. The largest error is a matter of luck: of 40
# rows, a kernel as good as stock's errs twice as much in up to 1 pool of 60; of these, in less than 1 of 1,000.
POOL = 2000


def even(*shape, generator):
    """Factors of errors: of either sign, from 0.5 to 1. Of normal ones a few would outweigh all others."""
    x = torch.rand(shape, generator=generator) - 0.5
    return x + 0.5 * x.sign()


def make_logits(rows, vocabulary, dtype=torch.float32, device="cpu", layout="contiguous", seed=0):
    """z (rows, vocabulary), labels with a -100 in every fifth row, and dloss."""
    generator = torch.Generator().manual_seed(seed + rows + vocabulary)
    z = (3 * torch.randn(rows, vocabulary, generator=generator)).to(device, dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator).to(device)
    labels[::3] = z[::3].float().argmax(-1)
    if rows > 1:
        labels[1::5] = IGNORE
    if layout == "sliced":
        wide = torch.full((rows, vocabulary + 9), 1e4, dtype=dtype, device=device)
        wide[:, 4 : 4 + vocabulary] = z
        z = wide[:, 4 : 4 + vocabulary]
    elif layout == "transposed":
        z = z.T.contiguous().T
    return z, labels, even(rows, generator=generator).to(device)


def num_seeds(rows, pool=0):
    """How many inputs of ``rows`` rows are judged together, see ``check_all``: about ``pool`` rows or more."""
    return max(pool // rows, 200 if rows == 1 else 12 if rows <= 16 else 4)


def several(make, rows, *arguments, pool=0, **options):
    """Inputs of ``make(rows, ...)`` from several seeds."""
    return [make(rows, *arguments, seed=seed, **options) for seed in range(num_seeds(rows, pool))]


def stock_loss(z, labels, scale, cap):
    """What transformers writes: scaled and capped in the model's dtype, the loss in float32."""
    return functional.cross_entropy(reference.bent(z, scale, cap).float(), labels, reduction="none")


def differentiate(function, inputs, g):
    """The value of ``function(*inputs)`` and the gradients of ``(value * g).sum()``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, g.to(value.dtype))


def check_all(names, results):
    """Hold results ``(ours, stock, exact)`` of several inputs against one another, each a tuple like ``names``.

    The numbers of all inputs are judged together: on the few of a single row stock may be exact by luck.
    """
    for index, name in enumerate(names):
        columns = zip(*results, strict=True)
        one, other, truth = (
            torch.cat([tensors[index].flatten() for tensors in column]) for column in columns
        )
        assert_as_good_as(one, other, truth, name)


def check_loss(function, cases, scale, cap):
    """Hold (loss, dz) of ``function(z, labels, g, scale, cap)`` against the reference and stock PyTorch."""

    def judge(z, labels, g):
        exact = differentiate(lambda z: -reference.scores(z, labels, scale, cap)[0], (z.double(),), g)
        stock = differentiate(lambda z: stock_loss(z, labels, scale, cap), (z,), g)
        return function(z, labels, g, scale, cap), stock, exact

    check_all(("loss", "dz"), [judge(*case) for case in cases])


def make_head(rows, width, vocabulary, dtype=torch.float32, device="cpu", weight_dtype=None, seed=0):
    """h (rows, width), weight (vocabulary, width), labels, and what comes from above."""
    generator = torch.Generator().manual_seed(seed + rows + vocabulary)
    h = torch.randn(rows, width, generator=generator).to(device, dtype)
    weight = (2 * torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device, dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator).to(device)
    labels[::3] = (h.float() @ weight.float().T).argmax(-1)[::3]  # some are the most likely token
    g = even(rows, generator=generator).to(device)
    return h, weight.to(weight_dtype or dtype), labels, g


def check_head(function, cases, scale, cap, trained, piece=None):
    """The same for (log_probs, dh[, dW]) of ``function(h, weight, labels, g, scale, cap, trained)``.

    Stock PyTorch computes ``piece`` rows at a time, where that is given: how a library sums up a product in float32,
    and so how much it errs, depends on how many rows it has.
    """

    def judge(h, weight, labels, g):
        def exact(h, w):
            return reference.scores(h @ w.T, labels, scale, cap)[0]

        def stock(h, w):
            w = w.to(h.dtype).T
            parts = zip(h.split(piece or len(h)), labels.split(piece or len(h)), strict=True)
            return torch.cat([-stock_loss(part @ w, there, scale, cap) for part, there in parts])

        truths = differentiate(exact, (h.double(), weight.double()), g.double())
        theirs = differentiate(stock, (h, weight), g)
        return function(h, weight, labels, g, scale, cap, trained), theirs, truths

    check_all(("log_probs", "dh", "dW")[: 3 if trained else 2], [judge(*case) for case in cases])
