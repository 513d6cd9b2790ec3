# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "torch==2.13.0", "matplotlib"]
# ///
"""
Do Transformers that learn linear regression in context run Newton's method, layer by layer? Train one and look.

Give a Transformer a prompt x_1, y_1, x_2, y_2, ..., x_{n+1} whose answers come from a hidden linear rule y = w.x that
changes with every prompt. Trained on enough such prompts, it learns to solve a *new* regression inside one
forward pass. Which algorithm does it run? Fu, Chen, Jia and Sharan (arXiv 2310.17086, "Fu" below) say: not gradient
descent. Each layer is worth a fixed number of steps of Iterative Newton, which, once under way, doubles its correct
digits at every step; to keep up, gradient descent needs exponentially many steps. This file trains such a Transformer
from nothing on two CPU cores in about a minute, reads a prediction out of every layer, and lays it beside the steps of
Newton and of gradient descent.

    python icl_newton.py                    everything: figures/*.png, figures/results.json and a table of claims
    python icl_newton.py --preset quick     a first look in half a minute: everything shrunk, conclusions too
    python icl_newton.py --figures rates    one figure, and only the models it needs. Only by name: recipes (how much
                                            our training saves), paper_tables, width_sweep, depth_sweep
    python icl_newton.py --help             every setting, with what it does

Parts I to III are the chapter. Part IV draws the figures; homework and command line come last.

The idea that keeps the file small: **every learner is a trajectory of predictions** of shape (steps, prompts, n+1).
Newton's steps, gradient descent's steps, a Transformer's layers: one error curve, one similarity and one best match
serve them all.

What it finds: a layer is worth about 3 steps of Newton, on a straight line (three seeds at d = 5; at Fu's own d = 20,
of two seeds, 2.6, and 2.2 on a line that flattens). So layers do converge exponentially faster than gradient descent.
But they are as *similar* to one as to the other, each at its best step; and in how they treat the eigenvalues of the
data (seen at d = 5) they are nearer to gradient descent. The table that ends a run has all claims, failed ones too.

What differs from Fu's setting, and why (`--preset laptop` and `paper` take their d, n; `paper` their model size too):
    d = 5, n = 10, not 20, 40       the same picture in a minute, not in 23 (`--preset laptop`)
    8 layers of width 64            not 12 of 256, for the same reason
    2,000 training steps            not 500,000: Muon in place of Adam, and the logarithm of each prefix's squared error
                                    in place of the squared error (section 5; `--recipe fu` trains as they do)
    GD's step size 1/lambda_max(S)  per prefix, not one fixed 0.01: the textbook's safe step, so that the race is fair
    the same norm before every probe   their code normalises only the last layer's state before the readout

Notation (Fu's symbols). Shapes in code put prompts first: (prompts, n+1, d).
    d, n          dimension of x; number of examples in a prompt. The (n+1)-th x is the last query.
    t = 0..n      prefix length: how many examples a prediction may use. Every prompt asks n+1 questions at once.
    w*            the hidden rule of one prompt, drawn from N(0, I_d)
    Sigma, kappa  covariance of x and its condition number (1: isotropic)
    S = X^T X     = sum_{i<=t} x_i x_i^T, the Gram matrix of a prefix; b = X^T y = sum_{i<=t} y_i x_i
    eta, alpha    step size of gradient descent; start of Newton, M_0 = alpha S
    k, l          a step of an algorithm; a layer of a network
In code L, K, P, W count layers, steps, prompts and width, and T tokens (in section 10 queries). Sections 11 to 13 start
their letters afresh. Hints and SOLUTION marks belong to the homework; skip them.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
import timeit
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn

matplotlib.use("Agg")  # pictures go to files: no display needed
import matplotlib.pyplot as plt

# %% [markdown]
# # Part I. The paper's claim
#
# ## 1. Settings
#
# All of them, once. The fields are the command line's flags, the comments their help.

# %%
@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. Raises ValueError, in one line, for a value that cannot work."""

    # What is learned
    d: int = 5  # dimension of x and of the hidden rule w*
    n: int = 10  # examples in a prompt
    kappa: float = 1.0  # condition number of the covariance of x; 1 is isotropic (Fu's other value: 100)
    noise: float = 0.0  # standard deviation of the noise on y (Fu's other value: 0.1)
    # Who learns it
    model: str = "transformer"  # transformer or lstm
    layers: int = 8  # its layers
    width: int = 64  # width of its residual stream
    heads: int = 2  # attention heads per layer; must divide the width
    # How it learns
    recipe: str = "muon"  # muon, or fu: the paper's, Adam at a constant 1e-4 on the mean squared error
    steps: int = 2000  # training steps
    batch: int = 64  # fresh prompts per step
    muon_lr: float = 0.007  # Muon's step size: the blocks' weight matrices
    adam_lr: float = 0.01  # AdamW's step size: embedding, positions and readout
    attention_steps: int = 600  # training steps of each linear-attention model in section 12
    curriculum: int = 0  # steps per added dimension, starting at 2; 0: all d dimensions from the start
    seed: int = 1  # of initial weights and of all prompts
    # How it is examined
    probes: int = 2048  # prompts that fit the readouts of the layers
    prompts: int = 512  # fresh prompts on which all comparisons are made
    # The run
    seeds: int = 1  # how many seeds to run, from `seed` on; the table then shows their spread
    preset: str = "default"  # default, quick (shrunk), laptop (Fu's problem, small model) or paper (for a CUDA GPU)
    figures: str = "all"  # which figures to make, by name, separated by commas
    device: str = "auto"  # cpu, cuda, or auto: CUDA where there is one
    out: str = "figures"  # folder for pictures and results.json
    checkpoints: str = "checkpoints"  # folder for trained models and for those still in training
    save_every: int = 250  # steps between checkpoints
    homework: str = ""  # write the assignment for students into this new folder, and do nothing else

    def __post_init__(self):
        check(self)  # near the end of the file, where it stands in nobody's way

    @property
    def torch_device(self):
        """The device of the networks: CUDA if there is one and it is not refused. Solvers run on the CPU."""
        use_cuda = self.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if use_cuda else "cpu")


PART_I = "solvers,convergence,heatmaps,rates,progression"
PRESETS = {
    "default": {},
    "quick": dict(d=3, n=6, layers=6, width=32, steps=500, muon_lr=0.02, adam_lr=0.02, probes=512, prompts=256,
                  attention_steps=60, out="figures/quick"),
    "laptop": dict(d=20, n=40, width=128, heads=4, steps=4600, curriculum=50, probes=512, prompts=320,
                   figures=PART_I + ",paper_tables", out="figures/d20"),
    "paper": dict(d=20, n=40, layers=12, width=256, heads=8, steps=12_000, batch=256, curriculum=50, probes=512,
                  prompts=320, figures=PART_I + ",paper_tables", out="figures/paper"),
}

# %% [markdown]
# ## 2. Prompts (Fu, section 3)
#
# w* ~ N(0, I_d),  x_i ~ N(0, Sigma),  y_i = w*.x_i + noise. A new w* for every prompt: nothing about w* can be
# memorised, so whatever predicts y_{t+1} must be an algorithm that runs on the prompt.

# %%
def sample_prompts(prompts, n, d, *, kappa=1.0, noise=0.0, generator=None):
    """Draw regression prompts: xs (prompts, n+1, d) and ys (prompts, n+1), float32, on the generator's device.

    With kappa > 1 each prompt has its own covariance: a uniformly random eigenbasis, the first d//2 eigenvalues kappa
    times the others, rescaled to trace d (Fu, section 4.3). `noise` is the standard deviation of the noise on y.
    """
    # Hint: a random eigenbasis U is the Q of a QR decomposition; U diag(sqrt(eigenvalues)) z has the right covariance.
    # (11 lines)
    # BEGIN SOLUTION
    draw = functools.partial(torch.randn, generator=generator, device=generator.device if generator else None)
    xs = draw(prompts, n + 1, d)
    if kappa != 1:
        eigenvalues = torch.ones(d, device=xs.device)
        eigenvalues[: d // 2] = kappa
        eigenvalues *= d / eigenvalues.sum()
        basis = torch.linalg.qr(draw(prompts, d, d)).Q
        xs = (xs * eigenvalues.sqrt()) @ basis.mT
    w_star = draw(prompts, d, 1)
    ys = (xs @ w_star).squeeze(-1)
    return xs, (ys + noise * draw(prompts, n + 1) if noise else ys)
    # END SOLUTION


# %% [markdown]
# ## 3. Three classical learners (Fu, section 3.1)
#
# All of them see a prefix only through S = X^T X and b = X^T y, and all prefixes of all prompts are solved at once, in
# float64. With noise of variance s^2 on y the best linear predictor takes S + s^2 I in place of S: that is `ridge`.
#
#     least squares       w = pinv(S) b               the answer; of minimum norm while t < d
#     gradient descent    w <- w - eta (S w - b)      O(kappa log 1/eps) steps to error eps; kappa is that of S
#     Iterative Newton    M <- 2M - M S M,  w = M b   O(log kappa + log log 1/eps) steps
#
# Newton looks for the inverse of S. Why it doubles its digits takes one line. With the residual R_k = I - S M_k,
#
#     R_{k+1} = I - S (2 M_k - M_k S M_k) = (I - S M_k)^2 = R_k^2,
#
# so an error of 10^-3 becomes 10^-6, then 10^-12. (M_k is a polynomial in S, so the two commute. Without noise
# b = S w*, hence w* - w_k = (I - M_k S) w* = R_k w*: the error is R_k applied to the answer.
# The log kappa steps are those until even the weakest eigenvector's residual is well below 1.) One step of gradient
# descent multiplies its error by (I - eta S), always the same factor: a fixed number of steps per digit.
#
# The catch: R_0 = I - alpha S^2 must have spectral norm below 1 on the span of the examples, so alpha < 2/||S||^2. (Fu
# prints alpha = 2/||S S^T||_2, which is exactly the edge, where one eigenvalue of R is -1 and its square, 1, never
# shrinks. Their code uses 1/||S S^T||_F, and so do we.)

# %%
TINY = 1e-30  # keeps the empty prefix, S = 0, from dividing by zero
RANK_TOLERANCE = 1e-12  # an eigenvalue below this share of the largest is rounding: the examples do not span it


def prefix_moments(xs, ys, ridge=0.0):
    """S (prompts, n+1, d, d) and b (prompts, n+1, d) of the prefixes t = 0..n, float64; S + ridge I under noise."""
    xs, ys = xs.double(), ys.double()

    def sum_before(z):  # shifted by one, so that no prediction sees its own answer
        return torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1].cumsum(1)], dim=1)

    S = sum_before(xs[..., :, None] * xs[..., None, :])
    return S + ridge * torch.eye(xs.shape[-1], dtype=S.dtype, device=S.device), sum_before(ys[..., None] * xs)


def step_counts(steps):
    """The step counts of a trajectory: an int s means 0, 1, ..., s. Raises ValueError unless 0 <= and increasing."""
    counts = list(range(steps + 1)) if isinstance(steps, int) else [int(k) for k in steps]
    if not counts or counts[0] < 0 or any(a >= b for a, b in zip(counts, counts[1:])):
        raise ValueError(f"steps must be a count or an increasing sequence of counts, not {steps}")
    return counts


def predict(weights, xs):
    """Answer each prefix's query: weights (steps, prompts, n+1, d) -> trajectory (steps, prompts, n+1)."""
    return torch.einsum("kptd,ptd->kpt", weights, xs.double())


def ols(xs, ys, ridge=0.0):
    """Ordinary least squares, w = pinv(S) b: the minimum-norm solution while t < d. A trajectory of one step."""
    S, b = prefix_moments(xs, ys, ridge)
    weights = torch.linalg.pinv(S, hermitian=True, rtol=RANK_TOLERANCE) @ b[..., None]
    return predict(weights.squeeze(-1)[None], xs)


def spectral_trajectory(xs, ys, residual, steps, w0=None, ridge=0.0):
    """The trajectory of a method whose k-th step leaves the share residual(lambda, k) of the error along an eigenvector
    of S with eigenvalue lambda. Then k steps are one formula: a million cost no more than one.

    `residual` maps eigenvalues (prompts, n+1, d), ascending, and counts (steps, 1, 1, 1) to (steps, prompts, n+1, d).
    """
    S, b = prefix_moments(xs, ys, ridge)
    eigenvalues, U = torch.linalg.eigh(S)  # eigenvectors are the columns of U

    def in_eigenbasis(z):
        return (U.mT @ z.double().expand_as(b)[..., None]).squeeze(-1)

    counts = torch.tensor(step_counts(steps), dtype=S.dtype, device=S.device)[:, None, None, None]
    left = residual(eigenvalues, counts)
    spanned = eigenvalues > RANK_TOLERANCE * eigenvalues[..., -1:]  # off the span of the examples b is zero
    solution = torch.where(spanned, in_eigenbasis(b) / eigenvalues, 0.0)
    w = (1 - left) * solution
    if w0 is not None:
        w = w + left * in_eigenbasis(w0)
    return predict(w, in_eigenbasis(xs))  # w.x is the same in every basis


def gradient_descent(xs, ys, steps, lr=None, w0=None, ridge=0.0):
    """Gradient descent, w <- w - lr (S w - b), as a trajectory (len(steps), prompts, n+1).

    `lr`, a number, defaults to 1/lambda_max(S), prefix by prefix; `w0`, the start, (d,) or (prompts, 1, d), to 0.
    Along an eigenvector of S one step multiplies the error by 1 - lr lambda. `steps` as in step_counts; `ridge` is
    added to S (prefix_moments).
    """
    # Hint: spectral_trajectory does all but the 1 - lr lambda; or write the plain loop over steps. (4 to 10 lines)
    # BEGIN SOLUTION
    def residual(eigenvalues, k):
        step_size = 1 / eigenvalues[..., -1:].clamp_min(TINY) if lr is None else lr
        return (1 - step_size * eigenvalues) ** k

    return spectral_trajectory(xs, ys, residual, steps, w0, ridge)
    # END SOLUTION


def newton_start(S):
    """A safe alpha for M_0 = alpha S, one for each S (..., d, d): 1/||S S^T||_F, as (..., 1, 1). Any alpha below
    2/lambda_max(S)^2 converges; the Frobenius norm is a cheap upper bound of lambda_max(S)^2."""
    # Hint: which norm bounds lambda_max(S)^2 from above, and costs no eigenvalues? Mind S = 0. (1 line)
    # BEGIN SOLUTION
    return 1 / torch.linalg.matrix_norm(S @ S.mT, keepdim=True).clamp_min(TINY)
    # END SOLUTION


def newton(xs, ys, steps, alpha=None, ridge=0.0):
    """Iterative Newton, M <- 2M - M S M from M_0 = alpha S, predicting with w_k = M_k b (Fu, section 3.1).

    A trajectory (len(steps), prompts, n+1); step 0 is M_0. `alpha`, a number, defaults to newton_start(S), prefix by
    prefix. `steps` as in step_counts; `ridge` is added to S (prefix_moments).
    """
    # Hint: M (prompts, n+1, d, d) holds all inverses at once; M b needs b as a column. (8 lines)
    # BEGIN SOLUTION
    counts = step_counts(steps)
    S, b = prefix_moments(xs, ys, ridge)
    M, weights = (newton_start(S) if alpha is None else alpha) * S, []
    for k in range(counts[-1] + 1):
        if k > 0:
            M = 2 * M - M @ S @ M
        if k in counts:
            weights.append((M @ b[..., None]).squeeze(-1))
    return predict(torch.stack(weights), xs)
    # END SOLUTION


# %% [markdown]
# ## 4. The Transformer
#
# A GPT-2-like decoder on interleaved tokens x_1, y_1, ..., x_{n+1}: pre-norm blocks of causal attention and an MLP,
# each adding to the residual stream. Queries and keys are normalised too, which keeps large learning rates stable; no
# norm has parameters. It predicts y_{t+1} at the token x_{t+1}, having seen t examples. Its MLPs are
# twice as wide as the stream, not four times: the same error in fewer seconds. The matrices of all layers live in one
# tensor, so that the optimiser can treat them together.

# %%
def interleave(xs, ys):
    """Prompts (prompts, n+1, d), (prompts, n+1) -> tokens (prompts, 2n+1, d): x_1, y_1, ..., x_{n+1}.

    y is zero-padded to d entries, and the last y, the answer, is left out (Fu, section 3).
    """
    # Hint: stack x and padded y along a new axis, then flatten it into time. (2 lines)
    # BEGIN SOLUTION
    y_tokens = F.pad(ys[..., None], (0, xs.shape[-1] - 1))  # (prompts, n+1, d): y, 0, ..., 0
    return torch.stack([xs, y_tokens], dim=2).flatten(1, 2)[:, :-1]
    # END SOLUTION


def normalize(h):
    """The one normalisation of the model, over the last axis and without parameters: mean 0, variance 1."""
    return F.layer_norm(h, h.shape[-1:])


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D) + mask) v for q, k, v (..., T, D): token i looks at tokens 0..i only."""
    # Hint: what the softmax must not see is -inf before it. (4 lines)
    # BEGIN SOLUTION
    T, D = q.shape[-2:]
    scores = q @ k.mT / math.sqrt(D)  # (..., T, D) x (..., D, T) -> (..., T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v
    # END SOLUTION


class Transformer(nn.Module):
    """Decoder-only Transformer for prompts of at most n examples; its sizes come from the Config."""

    def __init__(self, config):
        super().__init__()
        self.config, L, W = config, config.layers, config.width
        self.read_in = nn.Parameter(0.3 * torch.randn(W, config.d) / math.sqrt(config.d))
        self.positions = nn.Parameter(0.02 * torch.randn(2 * config.n + 1, W))
        # Standard deviations 1/sqrt(3 W), as torch.nn.Linear's.
        self.attention = nn.Parameter(torch.randn(L, 4, W, W) / math.sqrt(3 * W))  # query, key, value, output
        self.mlp = nn.Parameter(torch.randn(L, 2, 2 * W, W) / math.sqrt(3 * W))  # up, and down transposed
        self.read_out = nn.Parameter(torch.zeros(W))
        with torch.no_grad():  # what writes into the residual stream starts small
            self.attention[:, 3] /= 2
            self.mlp[:, 1] /= 2

    def residual_streams(self, xs, ys):
        """The residual stream before the first layer and after each: a list of layers+1 (prompts, 2n+1, width)."""
        h = interleave(xs, ys) @ self.read_in.mT
        h = h + self.positions[: h.shape[1]]
        streams = [h]
        for attention, (up, down) in zip(self.attention.unbind(), self.mlp.unbind()):
            h = h + self.attend(normalize(h), attention)
            h = h + F.gelu(normalize(h) @ up.mT) @ down
            streams.append(h)
        return streams

    def attend(self, h, matrices):
        """Multi-head causal attention on h (prompts, T, width); the matrices (4, width, width) are Q, K, V, O."""
        P, T, W = h.shape
        heads = F.linear(h, matrices[:3].flatten(0, 1)).view(P, T, 3, self.config.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (prompts, heads, T, width/heads)
        mixed = causal_attention(normalize(q), normalize(k), v)
        return mixed.transpose(1, 2).reshape(P, T, W) @ matrices[3].mT

    def forward(self, xs, ys):
        """Predictions (prompts, n+1) of ys: entry t is made at the token x_{t+1}, from t examples."""
        return normalize(self.residual_streams(xs, ys)[-1][:, ::2]) @ self.read_out

    def states(self, xs, ys):
        """What the probes see: the normalised stream at the x tokens, (layers+1, prompts, n+1, width)."""
        return torch.stack([normalize(h[:, ::2]) for h in self.residual_streams(xs, ys)])


MODELS = {"transformer": Transformer}  # Part II adds another

# %% [markdown]
# ## 5. Training
#
# Squared error over every prefix, on fresh prompts at every step. The paper's Adam at a constant 1e-4 on the mean
# squared error needs hundreds of thousands of steps. Two changes make it thousands (`--recipe fu` undoes both):
#
# - Each prefix counts by the *logarithm* of its mean squared error. Nobody can answer well before d examples: those
#   prefixes have errors of order 1, and noise to match. After 2d examples errors are a thousand times smaller. In a
#   plain mean they hardly count, yet they are where an algorithm shows its rate. For a network large enough to be best
#   at every prefix the optimum is the same.
# - Muon (Keller Jordan, 2024) replaces each matrix's momentum G by the nearest orthogonal matrix, so that every
#   direction is learned at the same speed. To find it, Muon runs a Newton-Schulz iteration, X <- (a I + b X X^T +
#   c (X X^T)^2) X: a relative of the very algorithm we are about to look for inside the network. With all matrices of
#   one shape in one tensor, the iteration runs on all layers at once.

# %%
def orthogonalize(G):
    """The nearest orthogonal matrix to each of (..., rows, columns), roughly: most singular values end in 0.7..1.2.

    Five Newton-Schulz steps with Muon's coefficients, tuned for speed: they push singular values up fast, not to 1.
    """
    X = G.mT if G.shape[-2] > G.shape[-1] else G  # work on the smaller side
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for parameters whose last two axes are matrices. torch.optim.Muon takes one matrix at
    a time; this one takes stacks, which is twice as fast here. The scale gives updates the size of AdamW's."""

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))
                p.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def learning_rate_factor(step, steps, warmup=100):
    """Linear warm-up, and linear decay to zero."""
    return min((step + 1) / warmup, 1) * (steps - step) / steps


def prompt_size(config, step):
    """(d, n) of the prompts of a training step.

    A curriculum (Garg et al., 2022) starts with 2 active dimensions and 2d + 2 examples, and grows both up to d and n.
    Without it, training at d = 20 does not get off the ground.
    """
    d = min(2 + step // config.curriculum, config.d) if config.curriculum else config.d
    return d, config.n if d == config.d else min(2 * d + 2, config.n)


def training_prompts(config, step, generator):
    """The fresh prompts of one step: xs (batch, n+1, d), ys (batch, n+1). Dimensions that are not active yet are 0."""
    d, n = prompt_size(config, step)
    xs, ys = sample_prompts(config.batch, n, d, kappa=config.kappa, noise=config.noise, generator=generator)
    return F.pad(xs, (0, config.d - d)), ys


def make_optimizers(model, config):
    """AdamW for embedding, positions and readout; Muon for the stacks of matrices in the blocks, if there are any."""
    if config.recipe == "fu":
        return [torch.optim.Adam(model.parameters(), 1e-4)]
    blocks, rest = ([p for p in model.parameters() if (p.ndim > 2) == stacked] for stacked in (True, False))
    adam = torch.optim.AdamW(rest, config.adam_lr, (0.9, 0.99), weight_decay=0)
    return [adam, Muon(blocks, config.muon_lr)] if blocks else [adam]


def training_step(model, optimizers, config, step, generator):
    """One step on fresh prompts. Returns their mean squared error, prefix by prefix (n+1,), on the device.

    The loop around it, which also writes checkpoints, is `train`, near the end of the file.
    """
    xs, ys = training_prompts(config, step, generator)
    error = (model(xs, ys) - ys).square().mean(0)
    (error.mean() if config.recipe == "fu" else error.clamp_min(TINY).log().mean()).backward()
    factor = 1.0 if config.recipe == "fu" else learning_rate_factor(step, config.steps)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
        optimizer.step()
    model.zero_grad()
    return error.detach()


# %% [markdown]
# ## 6. What does each layer know? (Fu, section 4.1)
#
# Freeze the model and fit, for every layer, the linear readout that predicts best from that layer's state. This asks
# what a layer has computed, wherever it keeps it. Least squares does it in closed form. The readouts are fitted on
# other prompts than those they are judged on.

# %%
def fresh_prompts(config, count, seed):
    """Prompts of the configuration's distribution that training never saw, on the CPU."""
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + seed)
    return sample_prompts(count, config.n, config.d, kappa=config.kappa, noise=config.noise, generator=generator)


@torch.no_grad()
def probe_features(model, xs, ys, chunk=512):
    """Yield, chunk by chunk of prompts, all layers' states and a constant 1: (layers+1, chunk, n+1, width+1)."""
    device = next(model.parameters()).device
    for x, y in zip(xs.split(chunk), ys.split(chunk)):
        yield F.pad(model.states(x.to(device), y.to(device)).double().cpu(), (0, 1), value=1.0)


def least_squares_readout(H, y):
    """The readout r that minimises ||H r - y||: H (..., samples, width), y (samples,) -> r (..., width), all float64.

    A layer leaves many directions of its state unused at first; the pseudo-inverse of H^T H leaves them alone too.
    """
    # Hint: the normal equations, with torch.linalg.pinv for what H^T H cannot determine. H^T y is a batch of vectors:
    # keep each a column. (torch.linalg.lstsq with its default driver is unreliable where H lacks rank.) (1 line)
    # BEGIN SOLUTION
    return (torch.linalg.pinv(H.mT @ H, hermitian=True, rtol=1e-12) @ (H.mT @ y[..., None])).squeeze(-1)
    # END SOLUTION


def fit_readouts(model, xs, ys):
    """The least-squares readout of every layer, over all prefixes at once: (layers+1, width+1), float64."""
    H = torch.cat([features.flatten(1, 2) for features in probe_features(model, xs, ys)], dim=1)
    return least_squares_readout(H, ys.double().flatten())


def default_readouts(model):
    """The readouts fitted on as many fresh prompts of the model's own distribution as its configuration says."""
    return fit_readouts(model, *fresh_prompts(model.config, model.config.probes, seed=1))


def layer_predictions(model, xs, ys, readouts=None):
    """Every layer's predictions as a trajectory (layers+1, prompts, n+1); step 0 is the embedding.

    `readouts` (layers+1, width+1) come from fit_readouts; by default they are fitted on fresh prompts.
    """
    readouts = default_readouts(model) if readouts is None else readouts
    return torch.cat([torch.einsum("lptw,lw->lpt", H, readouts) for H in probe_features(model, xs, ys)], dim=1)


# %% [markdown]
# ## 7. Comparing two learners (Fu, section 4.1)
#
# How alike are two learners? Two that are both good make small errors; that says little. Do they make the *same*
# errors? Similarity of errors is the cosine between their error vectors over the prefixes t = 1..n of a prompt,
# averaged over prompts. (At t = 0 nobody knows anything, and every method predicts about 0.)
#
# Then the question of *rate*: which step of Newton does layer l resemble most? If the best match climbs by a constant
# number of Newton steps per layer, the network converges at Newton's rate.

# %%
def error_cosines(traj_a, traj_b, ys):
    """Cosines of the error vectors, prediction - y over t = 1..n, prompt by prompt: two trajectories -> (len_a, len_b,
    prompts). An error of exactly 0 has cosine 0 with everything."""
    # Hint: normalise each error vector, then one einsum does all pairs. (3 lines)
    # BEGIN SOLUTION
    def direction(trajectory):
        return F.normalize((trajectory.double() - ys.double())[..., 1:], dim=-1)

    return torch.einsum("apt,bpt->abp", direction(traj_a), direction(traj_b))
    # END SOLUTION


def similarity_of_errors(traj_a, traj_b, ys):
    """SimE, the mean cosine of error vectors, between every step of a and every step of b: (len_a, len_b)."""
    # Hint: the mean over prompts. (1 line)
    # BEGIN SOLUTION
    return error_cosines(traj_a, traj_b, ys).mean(-1)
    # END SOLUTION


def best_match(similarity):
    """For each step of a, the index of the step of b that is most similar: (..., len_a, len_b) -> (..., len_a)."""
    # Hint: torch has it. (1 line)
    # BEGIN SOLUTION
    return similarity.argmax(-1)
    # END SOLUTION


def squared_error(trajectory, ys, d):
    """Mean squared error over d, prefix by prefix: (steps, n+1). Predicting 0 scores 1."""
    return (trajectory - ys).square().mean(1) / d


def bootstrap(values, rounds=1000):
    """Means over prompts of (..., prompts), for `rounds` resamples of the prompts: (rounds, ...).

    Every call draws the same resamples, so that the difference of two learners' bootstraps is a paired comparison.
    """
    prompts = values.shape[-1]
    drawn = torch.randint(prompts, (rounds, prompts), generator=torch.Generator().manual_seed(0))
    counts = torch.stack([row.bincount(minlength=prompts) for row in drawn]).to(values)  # how often each was drawn
    return torch.einsum("rp,...p->r...", counts / prompts, values)


def interval(samples, interpolation="linear"):
    """The middle 95% of bootstrap samples (rounds, ...): (2, ...)."""
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return torch.quantile(samples.double(), ends, dim=0, interpolation=interpolation)


def line_fit(x, y):
    """Least-squares line through (x, y) along the last axis: slope, intercept and R^2, each (...)."""
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    slope = (dx * dy).sum(-1) / dx.square().sum(-1).clamp_min(TINY)
    r2 = slope * (dx * dy).sum(-1) / dy.square().sum(-1).clamp_min(TINY)
    return slope, y.mean(-1) - slope * x.mean(-1), r2


# %% [markdown]
# ## 8. At which rate do the layers converge?
#
# The question, put as a number: through the best-matching steps of layers 3, 4, ... goes a line. Its slope is how many
# Newton steps one layer is worth, R^2 how straight it is. If the match with GD doubles from layer to layer, the log2 of
# its steps lies on a line; so for GD the line goes through log2.
#
# The two slopes are one finding, seen twice. Along an eigenvector k steps of Newton leave (1 - alpha lambda^2)^(2^k),
# about exp(-alpha lambda^2 2^k), and m steps of GD about exp(-eta lambda m). With alpha = 1/lambda_max^2 and eta =
# 1/lambda_max both reach equally far down the spectrum when m = 2^(k/2): s Newton steps are s/2 doublings of GD. (Fu's
# 2.93 and 1.42 agree with that.) What the rates can show is that layers converge *exponentially faster than GD*.
#
# The answer is figures/rates.png (`--figures rates`): dots on a line; for GD, dots on a line on a log axis. What it
# does not show is that a layer computes as Newton does. Part II goes on to ask that.

# %%
NEWTON_STEPS = list(range(33))  # float64 is safe for about 40: off the examples' span rounding doubles at every step
GD_STEPS = sorted({round(2 ** (k / 2)) for k in range(33)})  # 1, 2, 3, 4, 6, 8, 11, 16, ..., 65536
FIRST_LAYER = 3  # rates are fitted from here on, as in the paper, whose layers 1 and 2 match step 1 both


@dataclasses.dataclass
class Match:
    """How the layers 1..L of a network match the steps of an algorithm, with bootstrap intervals over prompts."""

    counts: torch.Tensor  # (K,) the algorithm's step counts
    similarity: torch.Tensor  # (L, K)
    best: torch.Tensor  # (L,) best-matching step counts
    best_interval: torch.Tensor  # (2, L)
    first: int  # the line goes through best (or its log2) from this layer on
    slope: float  # steps per layer, or doublings per layer
    intercept: float
    slope_interval: list
    r2: float

    @property
    def is_line(self):
        """Whether the matches climb on a line: R^2 at least .95, slope above 0. None where two points make the line."""
        return self.r2 >= 0.95 and self.slope_interval[0] > 0 if len(self.best) - self.first >= 2 else None

    def numbers(self):
        """All fields as JSON takes them."""
        return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}


def match_layers(layers, trajectory, counts, ys, log2=False, measure=error_cosines):
    """Match layers (layers+1, prompts, n+1), but for the embedding, to a trajectory whose step counts are `counts`.

    The line goes through the best-matching steps, or their log2, against the layer, from FIRST_LAYER on. Where a
    resample of the prompts would have chosen another step, the interval says so: near-ties are shown as ties.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    similarity = measure(layers[1:], trajectory, ys)  # (L, K, prompts)
    best, resampled = counts[best_match(similarity.mean(-1))], counts[best_match(bootstrap(similarity))]
    first = max(min(FIRST_LAYER, len(best) - 1), 1)  # a line needs two layers, where there are two

    def fit(steps):
        steps = steps[..., first - 1 :]
        return line_fit(torch.arange(first, len(best) + 1.0, dtype=torch.float64), steps.log2() if log2 else steps)

    slope, intercept, r2 = (value.item() for value in fit(best))
    slope_interval = interval(fit(resampled)[0]).tolist()
    best_interval = interval(resampled, interpolation="nearest")  # no steps that nobody took
    return Match(counts, similarity.mean(-1), best, best_interval, first, slope, intercept, slope_interval, r2)


def last_layer_similarity(layers, trajectory, ys):
    """SimE of the last layer with its best step of a trajectory, and its bootstrap samples: a number, (rounds,)."""
    cosines = error_cosines(layers[-1:], trajectory, ys)[0]  # (steps, prompts)
    return cosines.mean(-1).max().item(), bootstrap(cosines).amax(-1)


# %% [markdown]
# # Part II. The rest of the evidence, and what the paper left open
#
# ## 9. More learners
#
# Each is one function that returns a trajectory; nothing else changes.
#
#     online GD            w <- w + x_i (y_i - w.x_i) / ||x_i||^2, one example at a time, once: the newest always fits.
#                          (Each step is the projection of w onto the w's that fit example i.)
#     conjugate gradient   the best step possible with k products S v: exact after d steps. (BFGS, started from the
#                          identity with exact line search, makes the same steps on a quadratic: CG stands for both.)
#     Chebyshev            gradient descent with the best momentum fixed in advance: sqrt(kappa) steps, not kappa

# %%
def online_gradient_descent(xs, ys):
    """OGD: the examples one by one, each fitted exactly by the smallest change of w. A trajectory of one step."""
    xs, ys = xs.double(), ys.double()
    weights = [torch.zeros_like(xs[:, 0])]
    for x, y in zip(xs.unbind(1), ys.unbind(1)):  # the algorithm itself is a loop over examples
        w = weights[-1]
        miss = y - (w * x).sum(-1)
        weights.append(w + x * (miss / x.square().sum(-1).clamp_min(TINY))[:, None])
    return predict(torch.stack(weights[:-1], dim=1)[None], xs)


def conjugate_gradient(xs, ys, steps, ridge=0.0):
    """Conjugate gradient on S w = b from w = 0 (Fu, appendix), as a trajectory (len(steps), prompts, n+1)."""
    counts = step_counts(steps)
    S, b = prefix_moments(xs, ys, ridge)
    w, residual, direction, weights = torch.zeros_like(b), b, b, []
    energy = start = b.square().sum(-1, keepdim=True)  # (prompts, n+1, 1)
    for k in range(counts[-1] + 1):
        if k > 0:
            S_direction = (S @ direction[..., None]).squeeze(-1)
            solved = energy <= 1e-28 * start  # nothing left but rounding: stop there
            length = energy / (direction * S_direction).sum(-1, keepdim=True)
            w = torch.where(solved, w, w + length * direction)
            residual = torch.where(solved, residual, residual - length * S_direction)
            before, energy = energy, residual.square().sum(-1, keepdim=True)
            direction = residual + energy / before.clamp_min(TINY) * direction
        if k in counts:
            weights.append(w)
    return predict(torch.stack(weights), xs)


def chebyshev(xs, ys, steps, ridge=0.0):
    """The Chebyshev iteration with the true extreme eigenvalues of each prefix: the fastest first-order method that
    fixes its step sizes and momentum in advance. A trajectory (len(steps), prompts, n+1).

    After k steps the error along eigenvalue lambda is T_k(z) / T_k(z_0), with T_k the Chebyshev polynomial, z the map
    of [lambda_min, lambda_max] onto [1, -1], and z_0 the image of 0 (Saad, Iterative Methods, section 12.3).
    """

    def residual(eigenvalues, k):
        largest = eigenvalues[..., -1:]
        smallest = torch.where(eigenvalues > RANK_TOLERANCE * largest, eigenvalues, largest).amin(-1, keepdim=True)
        spread = (largest - smallest).clamp_min(1e-9 * largest).clamp_min(TINY)
        z, z_0 = (largest + smallest - 2 * eigenvalues) / spread, (largest + smallest) / spread
        return (k * z.clamp(-1, 1).acos()).cos() / (k * z_0.clamp_min(1).acosh()).cosh()

    return spectral_trajectory(xs, ys, residual, steps, ridge=ridge)


# %% [markdown]
# An LSTM is the contrast. It reads the examples once, in order, into a state of fixed size, and cannot go back: more
# layers should not help.

# %%
class LSTM(nn.Module):
    """A stack of LSTM layers on the Transformer's embedding, with the Transformer's interface."""

    def __init__(self, config):
        super().__init__()
        self.config, W = config, config.width
        self.read_in = nn.Parameter(torch.randn(W, config.d) / math.sqrt(config.d))
        self.positions = nn.Parameter(torch.randn(2 * config.n + 1, W))  # without them it cannot tell x from y
        self.stack = nn.ModuleList(nn.LSTM(W, W, batch_first=True) for _ in range(config.layers))
        self.read_out = nn.Parameter(torch.zeros(W))
        with torch.no_grad():
            for layer in self.stack:
                layer.bias_ih_l0[W : 2 * W] = 1  # forget gates start open

    def residual_streams(self, xs, ys):
        """The embedding and the hidden states of all layers: a list of layers+1 (prompts, 2n+1, width)."""
        h = interleave(xs, ys) @ self.read_in.mT
        streams = [h + self.positions[: h.shape[1]]]
        for layer in self.stack:
            streams.append(layer(streams[-1])[0])
        return streams

    forward = Transformer.forward
    states = Transformer.states


MODELS["lstm"] = LSTM


def negative_distance(traj_a, traj_b, ys):
    """Minus the mean squared distance of predictions over t = 1..n: (len_a, len_b, prompts); a rival of the cosine."""
    a, b = (trajectory.double()[..., 1:].transpose(0, 1) for trajectory in (traj_a, traj_b))
    return -torch.cdist(a, b).square().permute(1, 2, 0) / a.shape[-1]


def forgetting_error(learner, xs, ys):
    """Squared error / d of a learner's last answer on x_i, i = 1..n, asked again after n examples: (n,)."""
    (P, N, d), n = xs.shape, xs.shape[1] - 1
    asked = xs[:, None].repeat(1, n, 1, 1)  # (prompts, i, position, d)
    asked[:, :, n] = xs[:, :n]
    answers = learner(asked.flatten(0, 1), ys[:, None].expand(P, n, N).flatten(0, 1))[-1, :, -1].unflatten(0, (P, n))
    return (answers - ys[:, :n]).square().mean(0) / d


# %% [markdown]
# ## 10. The weights a layer has in mind
#
# A prediction is one number; the w behind it is d numbers. To see it, put T > d other queries in the place of x_{t+1}
# and fit the w that explains the answers. R^2 of that fit tells whether there is such a w at all: whether the layer's
# answer is linear in the query. For any learner, as a black box.

# %%
def induced_weights(learner, xs, ys, queries=None, chunk=16):
    """The linear rule behind a learner's answers: weights (steps, prompts, n+1, d) and their R^2 (steps, n+1).

    `learner` maps (xs, ys) to a trajectory. `queries` (T, d), T > d, all follow the same t examples; default: 4d of
    standard normal. Entry [k, b, t] holds the least-squares weights (Fu, section 4.1). `chunk` prompts go at a time.
    """
    (_, N, d), prefix, parts = xs.shape, torch.arange(xs.shape[1]), []
    queries = torch.randn(4 * d, d, generator=torch.Generator().manual_seed(0)) if queries is None else queries
    for x, y in zip(xs.split(chunk), ys.split(chunk)):
        P, T = len(x), len(queries)
        asked = x[:, None, None].repeat(1, N, T, 1, 1)  # (prompts, prefix t, query, position, d)
        asked[:, prefix, :, prefix] = queries.to(x)  # position t of prefix t asks the query; what follows is not seen
        answered = y[:, None, None].expand(P, N, T, N)
        answers = learner(asked.reshape(-1, N, d), answered.reshape(-1, N)).unflatten(1, (P, N, T))
        parts.append(answers[:, :, prefix, :, prefix].permute(1, 2, 0, 3))  # -> (steps, prompts, n+1, T)
    answers, queries = torch.cat(parts, dim=1), queries.double()
    weights = answers @ torch.linalg.pinv(queries).mT
    missed = (answers - weights @ queries.mT).square().sum((1, 3))
    return weights, 1 - missed / answers.square().sum((1, 3)).clamp_min(TINY)


def weight_cosines(weights_a, weights_b, ys=None):
    """Cosines of induced weights, prompt by prompt, means over t = 1..n: (len_a, len_b, prompts). ys is not needed."""
    a, b = (F.normalize(w[:, :, 1:], dim=-1) for w in (weights_a, weights_b))
    return torch.einsum("aptd,bptd->abp", a, b) / a.shape[2]


def similarity_of_weights(weights_a, weights_b):
    """SimW, the mean cosine over prompts and prefixes t = 1..n of induced weights: (len_a, len_b) (Fu, section 4.1)."""
    return weight_cosines(weights_a, weights_b).mean(-1)


def spectral_filter(weights, xs, ys, edges, prefixes=None, ridge=0.0):
    """How much of each eigendirection of S a learner has recovered: (steps, bins); 0 nothing, 1 all of it.

    In the bin of eigenvalues between two `edges` (bins+1,), the slope of (u.w) on (u.w_ols) over all prompts, prefixes
    and unit eigenvectors u. `weights` (steps, prompts, n+1, d) as from induced_weights; `prefixes`, the lengths that
    count, defaults to all. For Newton the filter is 1 - (1 - alpha lambda^2)^(2^k), for GD 1 - (1 - eta lambda)^k.
    """
    prefixes = range(1, xs.shape[1]) if prefixes is None else prefixes
    S, b = (z[:, prefixes] for z in prefix_moments(xs, ys, ridge))
    eigenvalues, U = torch.linalg.eigh(S)
    found = (weights[:, :, prefixes, None] @ U).squeeze(-2)  # (steps, prompts, prefixes, d) in the eigenbasis
    spanned = eigenvalues > RANK_TOLERANCE * eigenvalues[..., -1:]
    target = torch.where(spanned, (b[..., None, :] @ U).squeeze(-2) / eigenvalues, 0.0)
    bins = torch.bucketize(eigenvalues, edges.double()) - 1
    return torch.stack([(found * target)[:, bins == i].sum(1) / target[bins == i].square().sum().clamp_min(TINY)
                        for i in range(len(edges) - 1)], dim=1)


# %% [markdown]
# # Part III. Theory that runs
#
# ## 11. Newton's weights, written by hand (Fu, theorem 5.1)
#
# Can attention run Newton exactly? Yes, and these are its weights. Each example is one token [T x_j ; x_j ; y_j], of
# width 2d+1. T, Newton's M, is stored nowhere: the tokens hold T x_j, and that is enough. Attention has ReLU in place
# of softmax; two heads of opposite sign pass a score on unchanged, ReLU(s) - ReLU(-s) = s. (Fu's printed proof gives
# both heads the same value; that makes |s|.) With j over the examples, never the query:
#
#     first layer      T = alpha S         adds  alpha sum_j x_j <x_j, x_t>  to the top block
#     Newton layer     T <- 2T - T S T     adds  -1/2 sum_j T x_j <x_j, T x_t>;  the MLP doubles the top block
#     readout layer    x_q^T T b           adds  sum_j y_j <T x_j, x_q>  to the query's empty y
#
# So k steps take k + 2 layers; Fu's proof spends k + 8. What it costs, and what the theorem does not say:
#
# - alpha is a weight: one number for all prompts, small enough for the largest S. Newton's error along an eigenvector
#   is (1 - alpha lambda^2)^(2^k), about exp(-alpha lambda^2 2^k): an alpha 2^m times smaller costs m more steps.
# - Query and key are not interchangeable. The printed scores, <T x_j, x_t>, make T S T^T: the same on paper, where T is
#   symmetric. But rounding adds some antisymmetric A to T. Near T = S^-1 our next T is off by 2A - A S T - T S A = 0,
#   theirs by 2A - A S T - T S A^T = 2A: an error that doubles in every layer, fatal to float32 after 20.
# - Every example must see all others. Under a causal mask, such as our Transformer's, key j holds its own prefix's T,
#   the sum is no T S T, and the iteration soon goes astray. What a causal network does, the theorem does not say.

# %%
def relu_attention(h, heads, mask):
    """ReLU attention with its residual: h_t + sum over heads and j of mask[t, j] ReLU(<Q h_t, K h_j>) V h_j.

    h (..., T, D); heads [(Q, K, V), ...]: Q and K (any, D), V (D, D), value and output in one; mask (..., T, T).
    """
    return h + sum((mask * ((h @ Q.mT) @ (h @ K.mT).mT).relu()) @ (h @ V.mT) for Q, K, V in heads)


def relu_mlp(h, up, down):
    """h + down ReLU(up h), token by token: h (..., D), up (hidden, D), down (D, hidden)."""
    return h + (h @ up.mT).relu() @ down.mT


def token_blocks(d):
    """Matrices (d, 2d+1), (d, 2d+1), (1, 2d+1) that read T x, x and y out of a token; transposed, they write it."""
    return torch.eye(2 * d + 1, dtype=torch.float64).split([d, d, 1])


def linear_heads(Q, K, V):
    """Two ReLU heads that add sum_j <Q h_t, K h_j> V h_j, sign and all: ReLU(s) V - ReLU(-s) V = s V."""
    return [(Q, K, V), (-Q, K, -V)]


def newton_layer(d):
    """The weights of one Newton step, from tokens [T x ; x ; y] to [(2T - T S T) x ; x ; y], S = sum_j x_j x_j^T.

    Attention adds -1/2 sum_j T x_j <x_j, T x_t> to the top block, for (T - 1/2 T S T) x_t; the MLP doubles the block.
    Returns, all float64, heads, two of (Q (d, 2d+1), K (d, 2d+1), V (2d+1, 2d+1)), and mlp = (up (2d, 2d+1), down
    (2d+1, 2d)).
    """
    # Hint: V reads T x_j and writes it, times -1/2, to the top block: a product of token_blocks. linear_heads makes the
    # two heads. In the MLP, ReLU(a) - ReLU(-a) = a. (4 lines)
    # BEGIN SOLUTION
    Tx, x, _ = token_blocks(d)
    heads = linear_heads(Q=Tx, K=x, V=-0.5 * Tx.mT @ Tx)
    up = torch.cat([Tx, -Tx])  # the MLP adds ReLU(s) - ReLU(-s) = s to each entry s of the block
    return heads, (up, up.mT)
    # END SOLUTION


def construction(xs, ys, steps, alpha=None, causal=False, printed=False):
    """Newton inside ReLU attention: the trajectory of `newton`, entry k read out after 1 + k layers (Fu, theorem 5.1).

    A trajectory (len(steps), prompts, n+1). `alpha`, one number, defaults to newton's smallest on these prompts.
    To see it fail: `causal` hides later tokens from every token, `printed` swaps query and key as Fu's proof does.
    """
    counts, (_, T, d) = step_counts(steps), xs.shape
    if alpha is None:
        S, _ = prefix_moments(xs, ys)
        alpha = 1 / torch.linalg.matrix_norm(S @ S).max().clamp_min(TINY)
    Tx, x, y = token_blocks(d)
    first, readout = linear_heads(Q=x, K=x, V=alpha * Tx.mT @ x), linear_heads(Q=x, K=Tx, V=y.mT @ y)
    heads, mlp = newton_layer(d)
    if printed:
        heads = [(K, Q, V) for Q, K, V in heads]

    # Every prefix t is a sequence of its own: its examples are the tokens j < t, its query is token t.
    known = torch.ones(T, T, dtype=torch.float64).tril(-1)  # [t, j]
    mask = known[:, None] * (torch.ones(T, T).tril() if causal else 1)  # [prefix, token, key]: the query is no key
    h = torch.cat([torch.zeros_like(xs), xs, ys[..., None]], dim=-1).double()[:, None].repeat(1, T, 1, 1)
    h[..., -1] *= known  # h (prompts, prefix, token, 2d+1): the query's y is for the network to fill in
    h, trajectory = relu_attention(h, first, mask), []
    for k in range(counts[-1] + 1):
        if k > 0:
            h = relu_mlp(relu_attention(h, heads, mask), *mlp)
        if k in counts:
            answers = relu_attention(h, readout, mask)[..., -1]  # (prompts, prefix, token)
            trajectory.append(answers.diagonal(dim1=1, dim2=2))
    return torch.stack(trajectory)


# %% [markdown]
# ## 12. Linear attention is preconditioned gradient descent (Ahn, Cheng, Daneshmand, Sra, arXiv 2306.00297: "Ahn")
#
# Without the softmax, what a trained layer does can be read off its weights. A prompt is a matrix, one token a column:
#
#     Z = [ x_1 ... x_n  x_q ]      Z <- Z + (1/n) P Z M (Z^T Q Z)      M = diag(I_n, 0): the query is no example
#         [ y_1 ... y_n   0  ]      P = e e^T with e = (0, ..., 0, 1)   Q = -blockdiag(A, 0)
#
# These P and Q change only the last row, y_j <- y_j - (1/n) sum_{i<=n} y_i x_i^T A x_j. At first it holds y_j - w.x_j
# with w = 0, and 0 - w.x_q under the query. A layer subtracts (A^T r).x_j, where r = (1/n) sum_i (y_i - w.x_i) x_i, so
# the row keeps its form and w grows by A^T r. But -r is the gradient of R(w) = (1/2n) sum_i (w.x_i - y_i)^2: for a
# symmetric A, one layer is one step w <- w - A grad R(w) (lemma 1). What is left to learn is the preconditioner A.
#
# - One layer, w ~ N(0, I) (theorem 1). With H = (1/n) sum_i x_i x_i^T it predicts w.(H A x_q); E |x_q - H A x_q|^2 is
#   least at A = E[H^2]^-1 E[H]. For Gaussian x, E[H] = Sigma and E[H^2] = (n+1)/n Sigma^2 + tr(Sigma)/n Sigma. With
#   endless examples A is Sigma^-1, a Newton step. With few, it moves less along the small eigenvalues.
# - Many layers, w ~ N(0, Sigma^-1) (theorem 3). In the coordinates Sigma^-1/2 x, Sigma^1/2 w no direction is special.
#   So A_l should be a multiple of I there, and a_l Sigma^-1 here. The theorem: among matrices of that form are points
#   where the gradient is as small as you like.

# %%
def linear_attention(Z, P, Q):
    """One layer, Z + (1/n) P Z M (Z^T Q Z), on prompts Z (prompts, d+1, n+1); P and Q (d+1, d+1) (Ahn, section 2)."""
    n = Z.shape[-1] - 1
    values, keys = (P @ Z)[..., :n], Z[..., :n]  # M: every token but the query
    return Z + values @ keys.mT @ (Q / n) @ Z  # from the left: without a softmax no (n+1) x (n+1) matrix is needed


def preconditioner_weights(A):
    """P = e e^T and Q = -blockdiag(A, 0), (d+1, d+1), that make a layer a step with preconditioner A (d, d)."""
    return F.pad(A.new_ones(1, 1), (len(A), 0, len(A), 0)), F.pad(-A, (0, 1, 0, 1))


def linear_transformer(A, xs, ys):
    """The layers' answers to the last query, -[Z]_{d+1,n+1}, with preconditioners A (L, d, d): (L, prompts)."""
    Z = torch.cat([xs.mT, F.pad(ys[:, None, :-1], (0, 1))], dim=1)  # (prompts, d+1, n+1), the query's answer left out
    predictions = []
    for layer in A.unbind():
        Z = linear_attention(Z, *preconditioner_weights(layer))
        predictions.append(-Z[:, -1, -1])
    return torch.stack(predictions)


def optimal_preconditioner(Sigma, n):
    """The best A (d, d) of one layer, for n examples x ~ N(0, Sigma), Sigma (d, d), and w ~ N(0, I) (Ahn, theorem 1).

    Eigenvectors as Sigma's, which has eigenvalues lambda_i; eigenvalues 1 / ((n+1)/n lambda_i + (1/n) sum_k lambda_k).
    """
    # Hint: torch.linalg.eigh, or one inverse of a sum of two matrices. (2 lines)
    # BEGIN SOLUTION
    eigenvalues, U = torch.linalg.eigh(Sigma)
    return U / ((n + 1) / n * eigenvalues + eigenvalues.sum() / n) @ U.mT
    # END SOLUTION


def correlated_prompts(prompts, n, Sigma, w_covariance, generator):
    """x ~ N(0, Sigma), w ~ N(0, w_covariance), both (d, d); y = w.x: xs (prompts, n+1, d), ys (prompts, n+1)."""
    xs = torch.randn(prompts, n + 1, len(Sigma), generator=generator) @ torch.linalg.cholesky(Sigma).mT
    w = torch.linalg.cholesky(w_covariance) @ torch.randn(prompts, len(Sigma), 1, generator=generator)
    return xs, (xs @ w).squeeze(-1)


def train_preconditioners(layers, n, Sigma, w_covariance, lr=0.4, batch=1000, steps=600, seed=1):
    """Train A_1..A_L through the attention, on fresh prompts; P and Q keep their form, as in theorem 3. Returns A at
    every step, (steps+1, layers, d, d). Adam learns Sigma's smallest eigenvalue last; Muon treats all directions alike.
    """
    generator = torch.Generator().manual_seed(seed)
    A = (0.1 * torch.randn(layers, *Sigma.shape, generator=generator)).requires_grad_()  # at 0 all gradients are equal
    optimizer, history = Muon([A], lr, momentum=0.8), [A.detach().clone()]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        xs, ys = correlated_prompts(batch, n, Sigma, w_covariance, generator)
        optimizer.zero_grad()
        F.mse_loss(linear_transformer(A, xs, ys)[-1], ys[:, -1]).backward()
        optimizer.step()
        history.append(A.detach().clone())
    return torch.stack(history)


def distance_to_identity(M):
    """Dist(M, I) = min_a ||M - a I||_F / ||M||_F of M (..., d, d), which is 0 for multiples of I (Ahn, section 5)."""
    multiple = M.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(M.shape[-1])
    return torch.linalg.matrix_norm(M - multiple) / torch.linalg.matrix_norm(M)


def tuned_descent(preconditioner, steps, fitting, test):
    """Losses on the prompts `test` of k = 1..steps steps with one preconditioner (d, d), each step of its best size.

    Whatever their sizes, k steps from w = 0 predict a combination of the same k numbers. Steps of size 1 give a
    basis, and least squares on the prompts `fitting` the best combination.
    """
    A = preconditioner.expand(steps, -1, -1)
    basis, test_basis = (linear_transformer(A, xs, ys).mT.double() for xs, ys in (fitting, test))  # (prompts, steps)
    answers, test_answers = fitting[1][:, -1:].double(), test[1][:, -1:].double()  # (prompts, 1)
    best = [torch.linalg.lstsq(basis[:, :k], answers).solution for k in range(1, steps + 1)]
    return [F.mse_loss(test_basis[:, : len(c)] @ c, test_answers).item() for c in best]


# %% [markdown]
# ## 13. How softmax attention learns to look things up (Huang, Cheng and Liang, arXiv 2310.05249: "Huang")
#
# Fu and Ahn ask what a trained network computes; Huang, how training gets there. There are K orthonormal features
# v_1..v_K. A token is v_k with probability p_k, and its answer is w.v_k. One layer of softmax attention averages the
# answers of a prompt's N examples. Its one matrix Q starts at 0:
#
#     yhat = sum_i softmax_i(x_i^T Q x_q) y_i = sum_n a_n w.v_n        a_n: all attention on examples of feature n
#
# For a query x_q = v_k, and E w w^T = I, the loss 1/2 E (yhat - w.x_q)^2 is 1/2 [(1 - a_k)^2 + sum_{n != k} a_n^2].
# Gradient descent moves the query's column of Q and nothing else. Per step, with expectations over prompts:
#
#     A_k = Q[k,k]        dA_k = eta p_k E a_k ((1 - a_k)^2 + sum_{m != k} a_m^2)         it only grows
#     B_{k,n} = Q[n,k]    dB_{k,n} = eta p_k E a_n (sum_{m != k} a_m^2 - a_n - a_k (1 - a_k))
#
# With all p_k = 1/K there are two phases: A_k grows past log K, where one right feature outweighs K wrong ones, and
# the loss converges. With p_1 = 1/2, feature 1 is learned at once, but half of every other query's attention rests on
# it too. An under-represented feature has four phases: (I) B_{k,1} falls, (II) the lead passes to A_k, (III) A_k grows,
# (IV) convergence. The switch takes K^2 steps: once B is clearly negative, a_1 is about e^B and a_k about e^A / K, so
# that dB = -eta e^(2B) / (2K) and dA = eta e^A / (2 K^2). Integrated, e^(-2B) = eta t / K and e^(-A) = 1 -
# eta t / (2 K^2). The rates are equal when e^A = K e^(2B), that is at t = 2/3 K^2 / eta, where B = -1/2 log K +
# 1/2 log 3/2. (That is for K without end. The corrections are of order 1/sqrt(K), and large at K = 16.)

# %%
def query_losses(Q, counts):
    """The loss 1/2 E_w (yhat - w.x_q)^2 of every feature as the query, averaged over prompts: Q (K, K) -> (K,).

    Of a prompt only `counts` (prompts, K) matters, how often each feature occurs: equal tokens get equal attention.
    """
    attention = (counts.log()[:, :, None] + Q).softmax(1)  # (prompts, n, k): a_n of query v_k; log 0 hides the absent
    return (attention - torch.eye(len(Q))).square().sum(1).mean(0) / 2


ETA = 2.0  # step size of gradient descent, for every K


def train_attention(K, p_1, steps, *, eta=ETA, prompts=None, seed=1, until_switch=False):
    """Plain gradient descent on Q, on fresh prompts of N = 10 K examples at every step. Returns the path (steps, 5).

    Its columns: loss of feature 1, loss of the others, A_1, A_k, B_{k,1}; "the others" and k are means over all k > 1,
    which are alike. Each prompt asks all K queries, weighted by p_k: the expectation over x_q is exact.
    """
    p = torch.tensor([p_1] + [(1 - p_1) / (K - 1)] * (K - 1))
    shape = prompts or max(512 // K, 1), 10 * K  # fewer prompts at large K, where more features are averaged
    generator, Q = torch.Generator().manual_seed(seed), torch.zeros(K, K, requires_grad=True)
    path, lowest = [], 0.0
    for _ in range(steps):
        tokens = torch.multinomial(p.expand(shape[0], K), shape[1], replacement=True, generator=generator)
        losses = query_losses(Q, torch.zeros(shape[0], K).scatter_add_(1, tokens, torch.ones(shape)))
        (gradient,) = torch.autograd.grad(p @ losses, Q)
        with torch.no_grad():
            A, B = Q.diagonal(), Q[0, 1:].mean()
            path.append(torch.stack([losses[0], losses[1:].mean(), A[0], A[1:].mean(), B]).tolist())
            Q -= eta * gradient
        lowest = min(lowest, sum(path[-1][3:]))
        if until_switch and sum(path[-1][3:]) > lowest + 0.02:  # A + B is rising again: A_k leads
            break
    return torch.tensor(path)


def steps_above(share, loss, p_k, N):
    """For how many steps a loss (steps,) has more than a share of its first excess over its floor 1/2 (1 - p_k)^N.

    The floor is there because what is missing from the prompt cannot be looked up.
    """
    excess = loss - 0.5 * (1 - p_k) ** N
    return (excess >= share * excess[0]).sum().item()


def lead_steps(path):
    """Steps at which (phase II begins, the lead passes to A_k, phase III begins): B leads 2:1, 1:1, then A leads 2:1.

    A + B falls while -dB > dA, and is lowest at the switch: exact, and far less noisy than comparing single steps.
    """
    A, B = path[:, 3], path[:, 4]
    return [(a * A + b * B).argmin().item() for a, b in ((2, 1), (1, 1), (1, 2))]


# %% [markdown]
# ## 14. Corrections to the paper
#
# Small slips in a good paper. Each has a test in test_icl_newton.py that shows it (`pytest -k correction`).
#
# 1. Printed: Newton starts from alpha = 2/||S S^T||_2. That is the edge: along the top eigenvector the residual is -1,
#    and its square stays 1. Any smaller alpha converges; the authors' code uses 1/||S S^T||_F.
# 2. Printed: both ReLU heads of theorem 5.1 have the same value. They make |s|; the second must be minus the first.
# 3. Printed: scores <T x_j, x_t> in its Newton layer. They make T S T^T, where an antisymmetric rounding error doubles
#    in every layer. <x_j, T x_t> makes T S T and forgets it.
# 4. Newton's similarity dips again after convergence (last step of figure 8). That is float32: while t < d, rounding
#    leaks off the span of the examples and doubles at every step.
# 5. GD's similarity to Newton is capped near .99 (in an earlier version .88). That is the start: what w_0 has off the
#    span of the examples GD never corrects. From w_0 = 0 the similarity reaches 1.

# %% [markdown]
# # Part IV. The figures
#
# Nobody learns from plotting; what is worth reading stands above. A study is one configuration and what its figures
# share, each thing computed when first asked for. A figure is a function of a study; it returns the picture, the
# numbers behind it, and the claims it tests.

# %%
class Study:
    """A configuration's model, its test prompts, and the trajectories of all learners on them."""

    def __init__(self, config):
        self.config = config
        self.ridge = config.noise**2
        self.variant = functools.cache(self.variant)

    model = functools.cached_property(lambda s: train(s.config))
    readouts = functools.cached_property(lambda s: default_readouts(s.model))
    prompts = functools.cached_property(lambda s: fresh_prompts(s.config, s.config.prompts, seed=2))
    layers = functools.cached_property(lambda s: s.learner(*s.prompts))
    newton = functools.cached_property(lambda s: newton(*s.prompts, NEWTON_STEPS, ridge=s.ridge))
    gd = functools.cached_property(lambda s: gradient_descent(*s.prompts, GD_STEPS, ridge=s.ridge))
    ols = functools.cached_property(lambda s: ols(*s.prompts, ridge=s.ridge))

    def learner(self, xs, ys):
        """The network as a learner: (xs, ys) -> the trajectory of its layers."""
        return layer_predictions(self.model, xs, ys, self.readouts)

    @functools.cached_property
    def matches(self):
        """How the layers match the steps of Newton and of GD."""
        return {"Newton": match_layers(self.layers, self.newton, NEWTON_STEPS, self.prompts[1]),
                "GD": match_layers(self.layers, self.gd, GD_STEPS, self.prompts[1], log2=True)}

    @functools.cached_property
    def induced(self):
        """Prompts, as many as asking each of them 4d (n+1) times allows, and what induced_weights says of the network,
        Newton and GD on them."""
        xs, ys = (z[: max(8, 15_000 // (4 * self.config.d * (self.config.n + 1)))] for z in self.prompts)
        learners = {"Transformer": self.learner,
                    "Newton": functools.partial(newton, steps=NEWTON_STEPS, ridge=self.ridge),
                    "GD": functools.partial(gradient_descent, steps=GD_STEPS, ridge=self.ridge)}
        return xs, ys, {name: induced_weights(learner, xs, ys) for name, learner in learners.items()}

    def error(self, trajectory):
        """Squared error over d of a trajectory on the test prompts: (steps, n+1)."""
        return squared_error(trajectory, self.prompts[1], self.config.d)

    def variant(self, **changes):
        """The study of a configuration with some settings changed; the same changes give the same study."""
        same = all(getattr(self.config, name) == value for name, value in changes.items())
        return self if same else Study(dataclasses.replace(self.config, figures="all", **changes))


@dataclasses.dataclass
class Claim:
    """One claim of a paper, and what this run measured. `holds` is decided by the rule that the claim states."""

    where: str
    claim: str
    paper: str
    here: str
    value: float  # the measured number, for the spread over seeds
    holds: bool | None = None  # None: a question that the paper leaves open, and its answer


FIGURES = {}  # name -> function of a study, in the order in which they are made
NEED_NO_MODEL = {"solvers", "by_hand", "preconditioners", "stages"}
ON_DEMAND = {"paper_tables", "width_sweep", "depth_sweep", "recipes"}  # made only when asked for by name


def figure(function):
    """Register a function (study) -> (picture, numbers, claims) under its name."""
    FIGURES[function.__name__] = function
    return function


def brackets(ends, digits=2):
    """An interval as text."""
    return f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def bounds(samples, digits=2):
    """The 95% interval of bootstrap samples (rounds,), as text."""
    return brackets(interval(samples), digits)


# Okabe and Ito's palette, safe for all eyes. A learner has the same colour everywhere.
COLOR = {"Transformer": "#D55E00", "Newton": "#0072B2", "GD": "#009E73", "paper": "#888888", "OLS": "black",
         "OGD": "#999933", "LSTM": "#E69F00", "CG": "#56B4E9", "Chebyshev": "#CC79A7"}
VERMILLION, BLUE, GREEN, GRAY = list(COLOR.values())[:4]
FLOOR = 1e-7  # pictures of errors end here
plt.rcParams.update({
    "figure.dpi": 150, "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "legend.frameon": False,
    "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "figure.constrained_layout.use": True, "lines.linewidth": 1.8, "lines.markersize": 4, "image.cmap": "cividis"})


def plot_family(ax, x, curves, labels=(), legend=None, **settings):
    """An ordered family of curves over x (None: 0, 1, ...), from dark to light, and settings of legend and axes."""
    for i, curve in enumerate(curves):
        color = plt.get_cmap("viridis")(0.9 * i / max(len(curves) - 1, 1))
        ax.plot(range(len(curve)) if x is None else x, curve, "o-", color=color, label=labels[i] if labels else None)
    ax.set(**settings)
    if labels:
        ax.legend(**{"fontsize": 7, "ncols": 2 if len(labels) > 5 else 1} | (legend or {}))


def plot_matches(ax, match, **look):
    """Best-matching steps of the layers 1..L, with bars for what other prompts would say."""
    low, high = (match.best_interval - match.best).abs()
    ax.errorbar(range(1, len(match.best) + 1), match.best, (low, high), capsize=3, **look)


def plot_similarity(ax, similarity, counts, best, best_interval, ylabel):
    """Heatmap (L, K) of similarities, layers across and steps upwards; best matches as dots, 95% intervals as bars."""
    L, K = similarity.shape
    extent = (0.5, L + 0.5, -0.5, K - 0.5)
    image = ax.imshow(similarity.T, origin="lower", aspect="auto", vmin=0.5, vmax=1, extent=extent)
    middle, low, high = (torch.searchsorted(torch.as_tensor(counts).double(), x.contiguous())
                         for x in (best, *best_interval))
    ax.vlines(range(1, L + 1), low, high, color="white", linewidth=3, alpha=0.7)
    ax.plot(range(1, L + 1), middle, "o", color=VERMILLION, markeredgecolor="white", markersize=7)
    ax.set(xticks=range(1, L + 1), yticks=range(0, K, 4), yticklabels=[int(counts[i]) for i in range(0, K, 4)],
           xlabel="layer", ylabel=ylabel)
    ax.grid(False)
    return image

# %% [markdown]
# ## 15. The figures of Part I

# %%
@figure
def solvers(study):
    """Gradient descent and Newton alone: what is to be told apart. Needs no training."""
    d, n = study.config.d, study.config.n
    picture, axes = plt.subplots(1, 2, figsize=(8.5, 3.6), sharey=True)
    numbers, needed = {"gd_steps": GD_STEPS, "newton_steps": NEWTON_STEPS}, {}
    for ax, kappa in zip(axes, (1.0, 100.0)):
        xs, ys = fresh_prompts(study.variant(kappa=kappa).config, 512, seed=3)
        for name, steps, solver in (("GD", GD_STEPS, gradient_descent), ("Newton", NEWTON_STEPS, newton)):
            error = squared_error(solver(xs, ys, steps, ridge=study.ridge), ys, d)[:, n]
            numbers[f"{name}_error_kappa_{kappa:g}"] = error.tolist()
            needed[name] = min((k for k, e in zip(steps, error) if e < 1e-6), default="too many")
            ax.loglog([max(k, 0.7) for k in steps], error.clamp_min(1e-13), "o-", color=COLOR[name], label=name)
        least = squared_error(ols(xs, ys, study.ridge), ys, d)[0, n].clamp_min(1e-13)
        ax.axhline(least, color=COLOR["OLS"], linestyle=":", label="least squares")
        ax.set(title=f"condition number of the data {kappa:g}", xlabel="steps (log scale)")
    axes[0].set_ylabel(f"squared error / d after {n} examples")
    axes[1].legend(loc="lower left", bbox_to_anchor=(0, 0.1))
    picture.suptitle("Steps to an error of 1e-6 at condition number 100: Newton {Newton}, GD {GD}".format(**needed))
    return picture, numbers, []


def steps_to_equal(study):
    """How many steps Newton and GD need to be as good as the last layer after n examples; inf if more than we tried."""
    goal = study.error(study.layers)[-1, -1]

    def first(counts, run):
        return min((k for k, error in zip(counts, study.error(run)[:, -1]) if error <= goal), default=math.inf)

    return first(NEWTON_STEPS, study.newton), first(GD_STEPS, study.gd)


@figure
def convergence(study):
    """Fu, figure 2: squared error against layers, Newton's steps and gradient descent's steps."""
    d, n, L = study.config.d, study.config.n, study.config.layers
    lengths = sorted({d - 1, d, (3 * d + 1) // 2, 2 * d, n} & set(range(1, n + 1)))
    picture, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True)
    numbers = {"prefix_lengths": lengths}
    for ax, (name, unit, steps, trajectory) in zip(axes, (
        ("Transformer", "layer", list(range(L + 1)), study.layers), ("Newton", "step", NEWTON_STEPS, study.newton),
        ("GD", "step (log scale!)", GD_STEPS, study.gd),
    )):
        error = study.error(trajectory)
        numbers[name] = {"steps": steps, "error": error.tolist()}
        plot_family(ax, steps, error[:, lengths].T.clamp_min(FLOOR), [f"t = {t}" for t in lengths],
                    dict(title="after t examples", loc="lower left", fontsize=8, ncols=1), title=name, xlabel=unit,
                    yscale="log", ylim=(FLOOR, 3))
    axes[0].set_ylabel("squared error / d")
    axes[2].set_xscale("log")
    k, m = steps_to_equal(study)
    picture.suptitle(f"After {n} examples {L} layers are as good as {k} steps of Newton, or {m} of GD (on a log axis)")

    # Superlinear convergence gains more digits per layer in the later half of the layers than in the earlier half.
    first = min(FIRST_LAYER, L) - 1
    half = (L - first) / 2
    squares = (study.layers[:, :, n] - study.prompts[1][:, n]).square()  # (layers+1, prompts)

    def later_minus_earlier(error):  # (..., layers+1), in digits per layer
        digits = -error.log10()
        middle = digits[..., [math.floor(first + half), math.ceil(first + half)]].mean(-1)
        return (digits[..., L] - 2 * middle + digits[..., first]) / half

    value, gains = later_minus_earlier(squares.mean(-1)).item(), later_minus_earlier(bootstrap(squares))
    falls = (squares.mean(-1)[first:].diff() < 0).tolist()
    return picture, numbers, [
        Claim("fig. 2", f"the error after {n} examples falls at every layer from layer {first + 1} on", "falls",
              f"at {sum(falls)} of {len(falls)} layers", sum(falls) / len(falls), all(falls)),
        Claim("fig. 2", "it falls superlinearly: more digits per layer in the later half of them", "superlinear",
              f"{value:+.2f} digits per layer {bounds(gains)}", value, interval(gains)[0].item() > 0),
    ]


@figure
def heatmaps(study):
    """Fu, figures 3, 8 and 10: similarity of errors of layers against Newton's and gradient descent's steps."""
    picture, axes = plt.subplots(1, 2, figsize=(9, 4))
    numbers = {}
    for ax, (name, match) in zip(axes, study.matches.items()):
        label = f"steps of {name}" + " (log scale)" * (name == "GD")
        image = plot_similarity(ax, match.similarity, match.counts, match.best, match.best_interval, label)
        numbers[name] = {"steps": match.counts.tolist(), "similarity": match.similarity.tolist()}
    picture.colorbar(image, ax=axes, label="similarity of errors", shrink=0.9)
    picture.suptitle("Which step is a layer most like? (bars: what other prompts would say)")

    learners = {"OLS": study.ols, "Newton": study.newton, "GD": study.gd}
    last = {name: last_layer_similarity(study.layers, run, study.prompts[1]) for name, run in learners.items()}
    (least, samples), (to_newton, newton_samples), (to_gd, gd_samples) = last.values()
    lead = newton_samples - gd_samples
    return picture, numbers | {"last_layer": {name: value for name, (value, _) in last.items()}}, [
        Claim("table 1", "the last layer makes the errors of Newton's limit, least squares: SimE at least .98",
              ".991 (to Newton)", f"{least:.3f} {bounds(samples, 3)}", least, least >= 0.98),
        Claim("table 1", "it resembles Newton more than GD, each at its best step: interval of the difference above 0",
              ".991 vs .957", f"{to_newton:.4f} vs {to_gd:.4f}, difference {bounds(lead, 4)}", to_newton - to_gd,
              interval(lead)[0].item() > 0),
    ]


# Fu's Transformer (d = 20, n = 40, 12 layers): best-matching steps of layers 1..12, from figures 8 and 10 of v3. Its
# slopes are of the part that climbs: 2.93 of layers 3 to 9, 1.42 of layers 3 to 10. Ours take all layers from 3 on.
PAPER = {"Newton": [1, 1, 2, 5, 8, 10, 14, 16, 20, 20, 21, 21],
         "GD": [1, 1, 4, 8, 32, 64, 256, 512, 1024, 4096, 4096, 4096]}


@figure
def rates(study):
    """Fu, figure 3: best-matching steps against the layer. A line for Newton; for GD a line on a log axis."""
    picture, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    numbers, claims = {}, []
    for ax, (name, match), unit, law, source, paper_fit in zip(
        axes, study.matches.items(), ("steps", "doublings"),
        ("linearly with the layer", "exponentially (log2 is linear)"), ("fig. 3, 8", "fig. 3, 10"),
        ("2.93, R^2 .995 (layers 3-9)", "1.42, R^2 .993 (layers 3-10, fixed step size)"),
    ):
        layers = torch.arange(match.first, len(match.best) + 1)
        line = match.intercept + match.slope * layers
        ax.plot(range(1, 13), PAPER[name], "s--", color=COLOR["paper"], linewidth=1, label="Fu: d = 20, 12 layers")
        ax.plot(layers, line if name == "Newton" else 2**line, color=COLOR[name], alpha=0.4,
                label=f"{match.slope:.2f} {unit} per layer {brackets(match.slope_interval)}")
        plot_matches(ax, match, fmt="o", color=COLOR[name], label="best match, 95% over prompts")
        ax.set(xlabel="layer", ylabel=f"best-matching step of {name}",
               title=f"{match.slope:.1f} {unit} of {name} per layer (R$^2$ = {match.r2:.3f})")
        ax.legend(loc="lower right")
        numbers[name] = match.numbers() | {"paper": PAPER[name]}
        claims.append(Claim(source, f"best-matching {name} steps grow {law}: R^2 at least .95, slope above 0",
                            paper_fit, f"{match.slope:.2f} {brackets(match.slope_interval)}, R^2 {match.r2:.3f}",
                            match.slope, match.is_line))
    axes[1].set_yscale("log", base=2)
    plus, times = study.matches["Newton"].slope, 2**study.matches["GD"].slope
    picture.suptitle(f"Each layer adds {plus:.1f} steps of Newton, but multiplies the steps of GD by {times:.1f}")
    return picture, numbers, claims


@figure
def progression(study):
    """Fu, figure 7: squared error against the number of examples, layer by layer, beside the matching Newton steps."""
    best, t = study.matches["Newton"].best.int().tolist(), range(study.config.n + 1)
    layers, steps, least = study.error(study.layers)[1:], study.error(study.newton)[best], study.error(study.ols)[0]
    picture, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for ax, title, labels, curves in (
        (axes[0], "layers of the Transformer", [f"layer {i}" for i in range(1, len(best) + 1)], layers),
        (axes[1], "best-matching steps of Newton", [f"step {k}" for k in best], steps),
    ):
        ax.plot(t, least.clamp_min(FLOOR), ":", color=COLOR["OLS"], label="least squares")
        plot_family(ax, t, curves.clamp_min(FLOOR), labels, dict(ncols=2, loc="lower left"), title=title, yscale="log",
                    xlabel="examples in the prompt, t", ylim=(FLOOR, 3), xticks=t[:: max(len(t) // 10, 1)])
    axes[0].set_ylabel("squared error / d")
    picture.suptitle("Error by number of examples: each layer, and the Newton step it resembles most")
    numbers = {"layers": layers.tolist(), "newton": steps.tolist(), "ols": least.tolist(), "best_newton_steps": best}
    return picture, numbers, []

# %% [markdown]
# ## 16. The figures of Part II

# %%
def ill_conditioned(name, study):
    """A figure of Part I once more, for prompts with condition number 100 and a model trained on such."""
    picture, numbers, _ = FIGURES[name](study.variant(kappa=100.0))
    picture.suptitle("Condition number 100. " + picture.get_suptitle())
    return picture, numbers, []


for name in ("convergence", "heatmaps", "rates"):  # Fu, figures 4 and 15 to 17
    FIGURES[f"{name}_ill"] = functools.partial(ill_conditioned, name)


@figure
def conditioning(study):
    """Fu, figures 4, 16: what the condition number costs in steps, by similarity and by error."""
    easy, hard = study.variant(kappa=1.0), study.variant(kappa=100.0)
    picture, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    (k, g), (k_ill, g_ill) = ([m.best[-1].item() for m in s.matches.values()] for s in (easy, hard))
    (newton_1, gd_1), (newton_100, gd_100) = steps_to_equal(easy), steps_to_equal(hard)
    for ax, name in zip(axes, ("Newton", "GD")):
        for s, look in ((easy, "o-"), (hard, "s--")):
            plot_matches(ax, s.matches[name], fmt=look, color=COLOR[name], label=f"condition number {s.config.kappa:g}")
        ax.set(xlabel="layer", ylabel=f"best-matching step of {name}")
        ax.legend()
    axes[1].set_yscale("log", base=2)
    picture.suptitle(f"Condition number 100 against 1, last layer: Newton {k_ill:.0f} against {k:.0f} steps, "
                     f"GD {g_ill:.0f} against {g:.0f}")
    k_text, g_text = (brackets(m.best_interval[:, -1], 0) for m in hard.matches.values())
    numbers = {"steps_to_equal": {"isotropic": [newton_1, gd_1], "ill-conditioned": [newton_100, gd_100]}}
    return picture, numbers, [
        Claim("fig. 4", "ill-conditioned: the last layer matches at most 1.5 times as many Newton steps as isotropic",
              "21 vs 21", f"{k_ill:.0f} {k_text} vs {k:.0f}", k_ill / max(k, 1), k_ill <= 1.5 * k),
        Claim("fig. 4, 16", "ill-conditioned: it matches at least 4 times as many GD steps as isotropic", "> 2,000",
              f"{g_ill:.0f} {g_text} vs {g:.0f}", g_ill / g, g_ill >= 4 * g),
        Claim("open", f"steps to the last layer's error after {study.config.n} examples, ill-conditioned against "
              "isotropic", "not asked", f"Newton {newton_100} vs {newton_1}; GD {gd_100} vs {gd_1}", gd_100 / gd_1),
    ]


@figure
def lstm(study):
    """Fu, figures 5 and 7c, table 1. Does an LSTM improve by layers? Does it resemble online GD? Does it forget?"""
    (xs, ys), n = study.prompts, study.config.n
    # Two layers: deeper ones do not get off the ground in the same number of steps.
    networks = {"Transformer": study.variant(model="transformer"),
                "LSTM": study.variant(model="lstm", layers=2, adam_lr=0.008)}
    learners = {name: s.learner for name, s in networks.items()} | {"OGD": online_gradient_descent}
    error = {name: s.error(s.layers)[1:, n].tolist() for name, s in networks.items()}
    forgotten = {name: forgetting_error(learner, xs[:128], ys[:128]).flip(0) for name, learner in learners.items()}
    others = {"Newton": study.newton, "GD": study.gd, "OGD": online_gradient_descent(xs, ys)}
    alike = {name: {other: last_layer_similarity(s.layers, run, ys) for other, run in others.items()}
             for name, s in networks.items()}
    similarity = {name: {other: value for other, (value, _) in row.items()} for name, row in alike.items()}

    picture, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    for i, name in enumerate(networks):
        axes[0].semilogy(range(1, len(error[name]) + 1), error[name], "o-", color=COLOR[name], label=name)
        axes[1].bar([x + 0.4 * i for x in range(3)], similarity[name].values(), width=0.38, color=COLOR[name])
    for name, curve in forgotten.items():
        axes[2].semilogy(range(1, n + 1), curve.clamp_min(FLOOR), "o-", color=COLOR[name], label=name)
    axes[0].set(title="error by layer", xlabel="layer", ylabel=f"squared error / d after {n} examples")
    axes[1].set(title="similarity of errors, last layer", xticks=[0.2, 1.2, 2.2], xticklabels=others, ylim=(0.5, 1))
    axes[2].set(title="asked again about an old example", xlabel="examples ago", ylabel="squared error / d")
    for ax in axes[::2]:
        ax.legend()
    ends = ", ".join(f"{name} {error[name][-1]:.2g}" for name in networks)
    picture.suptitle(f"Does an LSTM do what a Transformer does? Last layer's error / d: {ends}")

    squares = (networks["LSTM"].layers[1:, :, n] - ys[:, n]).square()  # (2, prompts)
    gain, gains = ((e[..., 0] / e[..., -1]) for e in (squares.mean(-1), bootstrap(squares)))
    recurrent, attentive = similarity["LSTM"], similarity["Transformer"]
    newton_samples, gd_samples, ogd_samples = (samples for _, samples in alike["LSTM"].values())
    leads = ogd_samples - newton_samples.max(gd_samples)
    gaps = alike["Transformer"]["Newton"][1] - alike["Transformer"]["OGD"][1]
    numbers = {"error": error, "similarity": similarity, "forgetting": {k: v.tolist() for k, v in forgotten.items()}}
    return picture, numbers, [
        Claim("fig. 7c", "an LSTM's layers do not improve: the second's error is above a quarter of the first's",
              "plot", f"{gain:.2f} times better {bounds(gains)}", gain.item(), interval(gains)[1].item() < 4),
        Claim("table 1", "an LSTM resembles OGD more than Newton or GD: interval of the difference above 0",
              ".954 vs .920, .916", f"{recurrent['OGD']:.3f} vs {recurrent['Newton']:.3f}, {recurrent['GD']:.3f}, "
              f"difference {bounds(leads, 3)}", recurrent["OGD"] - max(recurrent["Newton"], recurrent["GD"]),
              interval(leads)[0].item() > 0),
        Claim("table 1", "a Transformer resembles Newton more than OGD: interval of the difference above 0",
              ".991 vs .806", f"{attentive['Newton']:.3f} vs {attentive['OGD']:.3f}, difference {bounds(gaps, 3)}",
              attentive["Newton"] - attentive["OGD"], interval(gaps)[0].item() > 0),
    ]


@figure
def weights(study):
    """Fu, figures 9, 13 and 27: similarity of induced weights; are answers linear in the query; the span test."""
    (xs, ys, induced), (d, n, L) = study.induced, (study.config.d, study.config.n, study.config.layers)
    layers, r2 = induced["Transformer"]
    match = match_layers(layers, induced["Newton"][0], NEWTON_STEPS, None, measure=weight_cosines)
    S, _ = prefix_moments(xs, ys)
    outside = torch.eye(d) - torch.linalg.pinv(S, hermitian=True, rtol=RANK_TOLERANCE) @ S  # projects off the span
    strayed = torch.einsum("ptij,kptj->kpti", outside, layers).square().mean(-1)[:, :, 1:d]  # (layers+1, P, t = 1..d-1)
    off_span, linear, rows = strayed[-1].mean().item(), r2[:, 1:].mean(-1), range(match.first, L + 1)

    picture, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    image = plot_similarity(axes[0], match.similarity, NEWTON_STEPS, match.best, match.best_interval, "steps of Newton")
    picture.colorbar(image, ax=axes[0])
    axes[0].set_title("similarity of induced weights")
    plot_family(axes[1], range(1, n + 1), r2[rows, 1:], [f"layer {layer}" for layer in rows],
                title="is the answer linear in the query?", xlabel="examples in the prompt, t", ylabel="R$^2$")
    plot_family(axes[2], range(1, min(d, n + 1)), strayed[rows].mean(1), title="how far do weights leave the span?",
                yscale="log", xlabel="examples in the prompt, t < d", ylabel="squared length off the span / d")
    picture.suptitle(f"Behind the answers a linear rule (R$^2$ {linear[-1]:.3f}) climbs {match.slope:.1f} Newton "
                     "steps per layer")
    numbers = match.numbers() | {"linear_in_query_r2": r2.tolist(), "off_span": strayed.mean(1).tolist()}
    return picture, numbers, [
        Claim("fig. 9", "the same with similarity of weights: linear in the layer, R^2 at least .95, slope above 0",
              "plot", f"{match.slope:.2f} {brackets(match.slope_interval)} steps per layer, R^2 {match.r2:.3f}",
              match.slope, match.is_line),
        Claim("fig. 27", "for t < d the last layer's weights lie in the examples' span: mean square off it < 1e-3",
              "MSE < 1.2e-4", f"{off_span:.1e} {bounds(bootstrap(strayed[-1].mean(-1)), 4)}", off_span,
              off_span < 1e-3 if d > 1 else None),
        Claim("open", f"is the answer linear in the query? R^2 of layers {rows[0]} to {L}", "not asked",
              " ".join(f"{x:.3f}" for x in linear[rows]), linear[-1].item()),
    ]


@figure
def filters(study):
    """New: how much of each eigendirection of S each layer has recovered, beside Newton's and GD's steps."""
    xs, ys, induced = study.induced
    layers = list(range(min(FIRST_LAYER, study.config.layers), study.config.layers + 1))
    lengths = range(min(study.config.d, study.config.n), study.config.n + 1)  # prefixes that determine w, if any does
    spectrum = torch.linalg.eigvalsh(prefix_moments(xs, ys, study.ridge)[0][:, lengths])
    edges = torch.quantile(spectrum.clamp_min(0), torch.linspace(0.02, 1, 11, dtype=torch.float64))  # as many in each
    picture, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True)
    shares = {}
    for ax, (name, counts) in zip(axes, (("Transformer", layers), ("Newton", NEWTON_STEPS), ("GD", GD_STEPS))):
        steps = layers if ax is axes[0] else study.matches[name].best[layers[0] - 1 :].int().tolist()
        rows = layers if ax is axes[0] else [counts.index(k) for k in steps]
        shares[name] = spectral_filter(induced[name][0][rows], xs, ys, edges, lengths, study.ridge)
        labels = [f"{'layer' if ax is axes[0] else 'step'} {k}" for k in steps]
        plot_family(ax, (edges[1:] * edges[:-1]).sqrt(), shares[name], labels, xscale="log", xlabel="eigenvalue of S",
                    title=name + ", best-matching steps" * (ax is not axes[0]))
        ax.axhline(1, color="black", linewidth=0.8)
    axes[0].set_ylabel("recovered share of the solution")

    network, *others = shares.values()
    to_newton, to_gd = ((network - other).square().mean().sqrt().item() for other in others)
    picture.suptitle("Which algorithm is a layer? By eigenvalue, its shape is nearer to "
                     f"{'Newton' if to_newton < to_gd else 'GD'}'s best match")
    numbers = {"eigenvalue_edges": edges.tolist(), **{name: share.tolist() for name, share in shares.items()},
               "rms_difference_from_newton": to_newton, "rms_difference_from_gd": to_gd}
    return picture, numbers, [
        Claim("open", f"whose filter do layers {layers[0]} to {layers[-1]} have? RMS difference from the best-matching "
              "steps' of Newton; of GD", "not asked", f"{to_newton:.3f}; {to_gd:.3f}", to_newton - to_gd),
        Claim("open", "do layers overshoot, as neither method can? Largest share of any layer", "Newton, GD: 1",
              f"{network.max():.3f}", network.max().item()),
    ]


def rivals(study):
    """What a layer may be worth in: name -> (trajectory, counts, log2 scale?, measure)."""
    (xs, ys), d = study.prompts, study.config.d
    largest = torch.linalg.eigvalsh(prefix_moments(xs, ys)[0][:, -1])[:, -1].max().item()
    descent = functools.partial(gradient_descent, xs, ys, GD_STEPS, ridge=study.ridge)
    fixed = [descent(lr=c / (largest + study.ridge)) for c in (0.25, 0.5, 1.0)]  # one step size for all prefixes
    best_fixed = min(fixed, key=lambda trajectory: study.error(trajectory)[:, 1:].mean())
    start = torch.rand(d, generator=torch.Generator().manual_seed(0))  # uniform [0, 1)^d: off the span of the examples
    cg_steps = list(range(2 * d + 1))
    return {
        "Newton": (study.newton, NEWTON_STEPS, False, error_cosines),
        "CG": (conjugate_gradient(xs, ys, cg_steps, study.ridge), cg_steps, False, error_cosines),
        "Chebyshev": (chebyshev(xs, ys, GD_STEPS, study.ridge), GD_STEPS, True, error_cosines),
        "GD": (study.gd, GD_STEPS, True, error_cosines),
        "GD, best fixed step size": (best_fixed, GD_STEPS, True, error_cosines),
        "GD, start off the span": (descent(w0=start / math.sqrt(d)), GD_STEPS, True, error_cosines),
        "GD, start further off": (descent(w0=start), GD_STEPS, True, error_cosines),
        "Newton, by L2 distance": (study.newton, NEWTON_STEPS, False, negative_distance),
        "GD, by L2 distance": (study.gd, GD_STEPS, True, negative_distance),
    }


@figure
def worth(study):
    """What reviewers asked: does the rate depend on GD's step size, start or momentum, or on the measure?"""
    picture, (ax, reached) = plt.subplots(1, 2, figsize=(9.5, 4.2), width_ratios=(1.2, 1))
    styles = {"GD, best fixed step size": "s--", "GD, start off the span": "^:", "GD, start further off": "v:"}
    numbers, claims = {}, []
    for name, (trajectory, counts, log2, measure) in rivals(study).items():
        match = match_layers(study.layers, trajectory, counts, study.prompts[1], log2, measure)
        layers, unit = range(1, len(match.best) + 1), "doublings" if log2 else "steps"
        cap = similarity_of_errors(trajectory, study.newton, study.prompts[1]).max().item()
        numbers[name] = match.numbers() | {"unit": unit, "largest_similarity_to_newton": cap}
        claims.append(Claim("open", f"one layer is worth, in {unit} of {name}", "not asked",
                            f"{match.slope:.2f} {brackets(match.slope_interval)}, R^2 {match.r2:.3f}; "
                            f"reaches similarity {cap:.3f} to Newton", match.slope))
        if measure is error_cosines:
            look = dict(color=COLOR[name.split(",")[0]], label=name)
            ax.plot(layers, match.best.clamp_min(1), styles.get(name, "o-"), **look)
            reached.plot(layers, match.similarity.amax(1), styles.get(name, "o-"), **look)
    ax.set(xlabel="layer", ylabel="best-matching step (log scale)", title="steps needed to match a layer")
    ax.set_yscale("log", base=2)
    ax.legend()
    reached.set(xlabel="layer", ylabel="similarity of errors at the best step", title="how well it matches")
    picture.suptitle("Does the rate depend on GD's step size, start or momentum? Steps that match a layer")
    return picture, numbers, claims


# Figures 8 and 10 of Fu, v3: similarity of errors in thousandths, three digits each; a row is a step of layers 1..12
PAPER_SIMILARITY = {
    "Newton": (range(1, 24), """
        920920912816716662634623618613620616 876876929858760702672660655651656652 829828927893805745713700694690695692
        781781911916848789755741735732735733 734734883923886834798783777774777774 691691850916912875840824817814817815
        652652814898926910878862855852854852 619619779874927935911895888885886885 591591748849919949937921915913913913
        569569723826907954956942936934935934 552552703807894953968958953950951950 539539688792882949976969965962962962
        530530677780871944979977973971971971 524524669771863938980983980978978978 520519664765857933979986985983983983
        517517660760852929977988988987986987 515515657757848926975988990989989989 513513655754846924973988992991991991
        512512653752843921972988992992992993 511511652751842920970987993993993993 511511651750840918969986992993994994
        510510649749839917967984991993993993 508508646746835913963981988989990990"""),
    "GD": ([2**k for k in range(13)], """
        953953870771692645620609605599606602 910910903826750703676665660655661657 842841913878816773746733728724728725
        759759886905876846820807801798801799 678677831895910903886873867865867865 610610768858914938934924918916917916
        563563717817897947961954950948947948 536535685786875941972971968966967966 521521666766858932973979978977977977
        513513656755847923971982984982983983 509509652749840917968982986985986986 507507648745836913964980986986987987
        506505646744834911962979985987988988"""),
}


@figure
def paper_tables(study):
    """Ours beside Fu's printed tables, figures 8 and 10: same problem, same metric. For d = 20, n = 40."""
    (xs, ys), L, numbers, claims = study.prompts, study.config.layers, {}, []
    picture, axes = plt.subplots(2, 2, figsize=(10, 8))
    for column, (name, (counts, text)) in zip(axes.T, PAPER_SIMILARITY.items()):
        printed = torch.tensor([[int(row[i : i + 3]) / 1000 for i in range(0, 36, 3)] for row in text.split()]).T
        steps = newton(xs, ys, counts) if name == "Newton" else gradient_descent(xs, ys, counts, lr=0.01)  # as in Fu
        ours, best = match_layers(study.layers, steps, counts, ys), torch.tensor(PAPER[name]).double()
        label = f"steps of {name}" + " (fixed size 0.01)" * (name == "GD")
        plot_similarity(column[0], printed, counts, best, (best, best), label)
        image = plot_similarity(column[1], ours.similarity, counts, ours.best, ours.best_interval, label)
        column[0].set_title("Fu: GPU, 12 layers of width 256")
        column[1].set_title(f"this run: {L} layers of width {study.config.width}")
        numbers[name] = ours.numbers()
        if L == 12:
            apart = (ours.best - best)[2:].abs().max().item(), (ours.similarity - printed)[2:].abs().max().item()
            claims.append(Claim("fig. 8, 10", f"largest difference from Fu's table, layers 3 to 12: {name} steps; "
                                "similarity", "0; 0", f"{apart[0]:.0f}; {apart[1]:.3f}", apart[1]))
    picture.colorbar(image, ax=axes, label="similarity of errors", shrink=0.6)
    picture.suptitle("The paper's own problem, d = 20 and n = 40: the printed tables (above) and this run (below)")
    return picture, numbers, claims


def sweep(study, field, sizes):
    """One model for each value of a setting, up to the study's own: the error by layer, and the last layer's."""
    n, own = study.config.n, getattr(study.config, field)
    values = sorted({size for size in sizes if size < own} | {own})
    errors = [s.error(s.layers)[:, n] for s in (study.variant(**{field: value}) for value in values)]
    last = [error[-1].item() for error in errors]
    picture, (ax, end) = plt.subplots(1, 2, figsize=(9, 3.8))
    plot_family(ax, None, errors, [f"{field} {value}" for value in values], yscale="log", xlabel="layer",
                ylabel=f"squared error / d after {n} examples")
    end.loglog(values, last, "o-", color=COLOR["Transformer"])
    end.set(xlabel=field, ylabel="the same, last layer", xticks=values, xticklabels=values)
    end.minorticks_off()
    picture.suptitle(f"What does {'depth' if field == 'layers' else field} buy?")
    return picture, {"last_layer_error": dict(zip(values, last))}, []


# Fu, figure 6; and the same for depth
FIGURES["width_sweep"] = lambda study: sweep(study, "width", [study.config.heads * w for w in (4, 8, 16, 32, 64)])
FIGURES["depth_sweep"] = lambda study: sweep(study, "layers", [2, 4, 6, 8, 12])


@figure
def recipes(study):
    """What the training recipe saves: error after 2d examples against prompts seen, ours and Fu's, the same model."""
    t, window = min(2 * study.config.d, study.config.n), min(50, study.config.steps)  # steps that are averaged
    picture, ax = plt.subplots(figsize=(6.5, 3.8))
    needed, seen = {}, {}  # None where 1e-2 was not reached; all prompts of the training
    for recipe, label, longer, color in (("muon", "Muon, log of error", 1, BLUE), ("fu", "Adam, 1e-4 (Fu)", 10, GRAY)):
        losses = study.variant(recipe=recipe, steps=longer * study.config.steps).model.losses
        losses = torch.where(losses > 0, losses, math.nan)  # a curriculum's prompts may be shorter than t
        error = F.avg_pool1d(losses[None, :, t], window)[0] / study.config.d
        prompts = [window * study.config.batch * (i + 1) for i in range(len(error))]
        needed[recipe] = next((p for p, e in zip(prompts, error) if e <= 1e-2), None)
        seen[recipe] = prompts[-1]
        ax.loglog(prompts, error, color=color, label=label)
    ax.axhline(1e-2, color="black", linestyle=":", linewidth=1)
    ax.set(xlabel="prompts seen in training", ylabel=f"squared error / d after {t} examples")
    ax.legend()
    ours, fus = (f"{needed[name]:,}" if needed[name] else f"more than {seen[name]:,}" for name in ("muon", "fu"))
    picture.suptitle(f"Prompts until the error is 1e-2: ours {ours}, Fu's recipe {fus}")
    ratio = (needed["fu"] or seen["fu"]) / needed["muon"] if needed["muon"] else math.nan  # or a lower bound
    return picture, {"prompts_to_1e-2": needed, "prompts_seen": seen}, [
        Claim("open", f"prompts until the error / d after {t} examples is 1e-2: Fu's recipe over ours, same model",
              "not asked", f"{fus} over {ours}" + f", ratio {ratio:.1f}" * (ratio > 0), ratio)]

# %% [markdown]
# ## 17. The figures of Part III

# %%
@figure
def by_hand(study):
    """Fu, theorem 5.1: hand-written weights against Newton; what one alpha, a causal mask and swapped Q, K cost.

    Left: the layers lie on Newton's steps, unless the mask is causal. Right: what is left is rounding, and the printed
    order of query and key doubles it at every layer.
    """
    d, n, ks = study.config.d, study.config.n, NEWTON_STEPS
    count = max(4, min(64, 25_000 // n**2))  # few: each prefix is a sequence of its own
    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    xs, ys = (z[:count] for z in study.prompts)
    norms = torch.linalg.matrix_norm(prefix_moments(xs, ys)[0].matrix_power(2))  # (prompts, n+1)
    alpha, limit, numbers, worst = 1 / norms.max(), ols(xs, ys)[0, :, n], {"steps": ks}, 0.0
    needed = [((newton(xs, ys, 48, a)[:, :, n] - limit).abs() > 1e-3).double().sum(0).mean() for a in (alpha, None)]
    numbers["extra_steps_of_one_alpha"] = cost = (needed[0] - needed[1]).item()
    numbers["log2_ratio_of_alphas"] = (norms.max() / norms[:, n]).log2().mean().item()
    for name, trajectory, look in (
        ("hand-written layers", construction(xs, ys, ks, alpha), dict(color=VERMILLION, linewidth=7, alpha=0.4)),
        ("Newton, the same alpha", newton(xs, ys, ks, alpha), dict(color=BLUE, marker="o")),
        ("Newton, alpha per prompt", newton(xs, ys, ks), dict(color=BLUE, linestyle=":")),
        ("hand-written, causal mask", construction(xs, ys, ks, alpha, causal=True), dict(color=GRAY)),
    ):
        numbers[name] = [e for e in squared_error(trajectory, ys, d)[:, n].tolist() if math.isfinite(e)]
        left.semilogy(numbers[name], label=name, **look)
    left.set(ylabel=f"squared error / d after {n} examples", ylim=(1e-16, 1e3),
             title=f"one alpha for all prompts costs {cost:.1f} steps")
    left.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.1), handlelength=1.5)

    for kappa, color in ((1.0, VERMILLION), (100.0, "black")):
        xs, ys = fresh_prompts(study.variant(kappa=kappa).config, count, seed=4)
        S, _ = prefix_moments(xs, ys)
        target = newton(xs, ys, ks, 1 / torch.linalg.matrix_norm(S @ S).max())
        for printed in (True, False):
            apart = (construction(xs, ys, ks, printed=printed) - target).abs().amax((1, 2)) / ys.square().mean().sqrt()
            numbers[f"disagreement_kappa_{kappa:g}{'_printed' * printed}"] = apart.tolist()
            label = f"{'query, key as printed' if printed else 'ours'}; condition number {kappa:g}"
            right.semilogy(ks, apart.clamp_min(1e-17), ":" if printed else "-", color=color, label=label)
            worst = worst if printed else max(worst, apart.max().item())
    right.set(ylabel="largest difference / size of y", ylim=(3e-17, 1e-2), title="difference from Newton: rounding")
    right.legend(fontsize=8, loc="upper left")
    for ax in (left, right):
        ax.set_xlabel("k, Newton layers (steps of Newton)")
    picture.suptitle("Newton fits in k + 2 layers of hand-written attention, if every example sees all others")
    return picture, numbers, [
        Claim("theorem 5.1", "layers of width O(d) can make k steps of Newton: predictions within 1e-6",
              "k + 8 layers", f"k + 2 layers of width {2 * d + 1}: within {worst:.0e}, k <= {ks[-1]}", worst,
              worst <= 1e-6),
    ]


def ahn_experiment(steps, seed):
    """Train linear attention in Ahn's sizes. Returns a dict of what theorems 1 and 3 and figure 7 are about."""
    d, n, depths = 5, 20, [1, 2, 3, 4]
    generator = torch.Generator().manual_seed(seed)
    eigenvalues, U = torch.tensor([1, 1, 1 / 4, 1 / 16, 1]), torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    Sigma, inverse, root = ((U * eigenvalues**power) @ U.mT for power in (1, -1, 0.5))
    # Theorem 1's A is smaller than those of theorem 3: smaller training steps, and more of them.
    one = train_preconditioners(1, n, Sigma, torch.eye(d), lr=0.06, steps=5 * steps // 3, seed=seed)[-1]
    trained = [train_preconditioners(L, n, Sigma, inverse, steps=steps, seed=seed) for L in depths]
    test_one = correlated_prompts(100_000, n, Sigma, torch.eye(d), generator)
    fitting, test = (correlated_prompts(50_000, n, Sigma, inverse, generator) for _ in range(2))
    learned = [(one, test_one), *((history[-1], test) for history in trained)]
    one_loss, *losses = (F.mse_loss(linear_transformer(A, *p)[-1], p[1][:, -1]).item() for A, p in learned)
    gd, whitened_gd = (tuned_descent(A, len(depths), fitting, test) for A in (torch.eye(d), inverse))
    closed = optimal_preconditioner(Sigma, n)
    A = trained[2]  # (steps+1, 3, d, d)
    whitened = root @ A @ root
    return {"one_layer": one[0], "theorem_1": closed, "one_layer_loss": one_loss,
            "theorem_1_loss": (Sigma.trace() - (Sigma @ closed @ Sigma).trace()).item(),
            "distance": distance_to_identity(A), "distance_whitened": distance_to_identity(whitened),  # (steps+1, 3)
            "three_layers": A[-1], "three_layers_whitened": whitened[-1],
            "layers": depths, "linear_attention": losses, "gd": gd, "whitened_gd": whitened_gd}


@figure
def preconditioners(study):
    """Ahn, theorems 1 and 3, figures 1, 2 and 7: trained linear attention. Its sizes are Ahn's, not the study's.

    One layer finds theorem 1's matrix, three find multiples of Sigma^-1, and L layers do as well as L steps of gradient
    descent with that preconditioner and the best step sizes.
    """
    r = remember(study.config, ahn_experiment, study.config.attention_steps, study.config.seed)
    one, closed, depths, losses, gd, whitened_gd = (
        r[name] for name in ("one_layer", "theorem_1", "layers", "linear_attention", "gd", "whitened_gd"))
    apart = (torch.linalg.matrix_norm(one - closed) / torch.linalg.matrix_norm(closed)).item()
    raw, white = r["distance"][-1], r["distance_whitened"][-1]  # after training, (3,)

    picture = plt.figure(figsize=(10, 5.4))
    upper, lower = picture.subfigures(2, 1, height_ratios=(1.8, 1))
    axes, small = upper.subplots(1, 3), lower.subplots(1, 6)
    axes[0].axline((0, 0), slope=1, color=GRAY, linewidth=1)
    axes[0].plot(closed.flatten(), one.flatten(), "o", color=VERMILLION)
    axes[0].set(title=f"one layer: the optimum, to {100 * apart:.1f}%", xlabel="entries of A in theorem 1",
                ylabel="as trained")
    for name, color, label in (("distance", GRAY, "A$_1$ to A$_3$"), ("distance_whitened", VERMILLION, "whitened")):
        lines = axes[1].plot(r[name], color=color, linewidth=0.8)
        lines[0].set_label(label)
    axes[1].axhline(0.1, color="black", linestyle=":", linewidth=1)
    axes[1].set(title="three layers, in training", xlabel="training step", ylabel="distance to a multiple of I",
                ylim=(0, 1))
    axes[1].legend(loc="center right")
    axes[2].semilogy(depths, gd, "o-", color=COLOR["GD"], label="gradient descent")
    axes[2].semilogy(depths, losses, color=VERMILLION, linewidth=7, alpha=0.4, label="linear attention")
    axes[2].semilogy(depths, whitened_gd, "o-", color=BLUE, label="GD, preconditioner Σ$^{-1}$")
    axes[2].set(title="one layer, one step", xlabel="layers (steps of GD)", ylabel="squared error", xticks=depths)
    axes[2].legend(loc="lower left")
    for ax, matrix in zip(small, (*r["three_layers"], *r["three_layers_whitened"])):
        image = ax.imshow(matrix / matrix.abs().max(), cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    for l, matrix in enumerate(r["three_layers_whitened"]):
        small[l].set_title(f"A$_{l + 1}$")
        small[l + 3].set_title(f"Σ$^{{½}}$A$_{l + 1}$Σ$^{{½}}$ ≈ {matrix.diagonal().mean():.2f} I")
    lower.colorbar(image, ax=small, label="entry / largest", shrink=0.8, pad=0.01)
    picture.suptitle(f"Linear attention learns preconditioned GD: within {100 * apart:.1f}% of theorem 1, and "
                     f"{white.max():.2f} of theorem 3")

    ratios = [loss / best for loss, best in zip(losses, whitened_gd)]
    loss_ratio = r["one_layer_loss"] / r["theorem_1_loss"]
    numbers = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in r.items()}
    return picture, numbers, [
        Claim("Ahn, theorem 1", "one layer learns the closed form: within 3% in Frobenius norm, its loss within 2%",
              f"loss {r['theorem_1_loss']:.4f}", f"{100 * apart:.1f}%, loss {r['one_layer_loss']:.4f}",
              apart, apart <= 0.03 and abs(loss_ratio - 1) <= 0.02),
        Claim("Ahn, theorem 3", "3 layers learn multiples of Sigma^-1: distance to a I < .1 whitened, >= .1 before",
              "to 0; stays", f"{', '.join(f'{x:.3f}' for x in white)}; {', '.join(f'{x:.2f}' for x in raw)}",
              white.max().item(), white.max().item() < 0.1 <= raw.min().item()),
        Claim("Ahn, fig. 7", "L layers beat L steps of tuned GD, and equal tuned Sigma^-1-GD (loss at most 1.25 times)",
              "they do", f"of GD's loss {', '.join(f'{a / b:.2f}' for a, b in zip(losses, gd))}; of Sigma^-1-GD's "
              f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} (L = {depths[0]}..{depths[-1]})",
              max(ratios), all(a < b for a, b in zip(losses, gd)) and max(ratios) <= 1.25),
    ]


SWITCH_SIZES = [8, 12, 16, 24, 32, 48, 64]  # K, the number of features


def huang_experiment(K, seed):
    """Train softmax attention with and without a dominant feature. Returns the two paths (3000, 5), and the numbers
    that the claims are about: when the phases begin, and how the time of the switch grows with K."""
    balanced, imbalanced = (train_attention(K, p_1, 3000, seed=seed) for p_1 in (1 / K, 1 / 2))
    paths = [train_attention(k, 1 / 2, 10**5, seed=seed, until_switch=True) for k in SWITCH_SIZES]
    p_k, N, (early, switch, late) = 1 / 2 / (K - 1), 10 * K, lead_steps(imbalanced)
    halved = [steps_above(0.5, path[:, 1], p, N) for path, p in ((balanced, 1 / K), (imbalanced, p_k))]  # last phase
    times = {"switch_steps": [lead_steps(p)[1] for p in paths],
             "feature_1_steps": [steps_above(0.1, p[:, 0], 1 / 2, 10 * k) for k, p in zip(SWITCH_SIZES, paths)]}
    log_K, fits = torch.tensor(SWITCH_SIZES).double().log(), {}
    for name, steps in times.items():  # (exponent, its standard error, intercept); the residuals are mostly curvature
        b, intercept, r2 = (value.item() for value in line_fit(log_K, torch.tensor(steps).double().log()))
        fits[name] = b, abs(b) * math.sqrt((1 / r2 - 1) / (len(log_K) - 2)), intercept
    return balanced, imbalanced, times | {
        "K": SWITCH_SIZES, "fits": fits, "switch": switch, "balanced_switch": lead_steps(balanced)[1],
        "phases_begin": {"balanced": halved[:1], "imbalanced": [early, late, halved[1]]},
        "A_k_B_k1_at_switch": [p[k, 3:].tolist() for p, k in zip(paths, times["switch_steps"])],
        "steps_to_a_tenth": [steps_above(0.1, imbalanced[:, i], p, N) for i, p in ((0, 1 / 2), (1, p_k))]}


def plot_phases(upper, lower, path, starts, K):
    """Losses above; A_k and B_{k,1} below, with log K and -1/2 log K. Phases II.. begin at the steps `starts`."""
    marks = sorted({round(1.1**i) for i in range(99) if 1.1**i <= len(path)})  # each point: the mean until the next one
    means = torch.stack([path[i - 1 : j - 1].mean(0) for i, j in zip(marks, marks[1:])])
    upper.loglog(marks[:-1], means[:, 1], color=VERMILLION, linewidth=3.5, label="the others, k > 1")
    upper.loglog(marks[:-1], means[:, 0], color=BLUE, linewidth=1.5, label="feature 1")
    lower.semilogx(range(1, len(path) + 1), path[:, 3], color=VERMILLION, label="$A_k$: attention to one's like")
    lower.semilogx(range(1, len(path) + 1), path[:, 4], color=GREEN, label="$B_{k,1}$: attention to feature 1")
    for height, label in ((math.log(K), "log K"), (-0.5 * math.log(K), "-½ log K")):
        lower.axhline(height, color=GRAY, linestyle=":", linewidth=1.2)
        lower.text(1.1, height + 0.15, label, color=GRAY, fontsize=8)
    edges = [1, *(start + 1 for start in starts), len(path)]
    for name, left, right in zip(("I", "II", "III", "IV"), edges, edges[1:]):
        for ax in (upper, lower):
            ax.axvspan(left, right, color=GRAY, alpha=0.22 if name in ("II", "IV") else 0.07, linewidth=0)
        lower.text(math.sqrt(left * right), 6.3, name, ha="center")
    upper.set(xlim=(1, len(path)), ylim=(3e-5, 1))
    upper.tick_params(labelbottom=False)
    lower.set(xlim=(1, len(path)), ylim=(-2.6, 7), xlabel="step of gradient descent (log scale)")


@figure
def stages(study):
    """Huang: one layer of softmax attention learns its features in stages when one of them dominates."""
    K, sizes = 16, torch.tensor(SWITCH_SIZES, dtype=torch.float64)
    balanced, imbalanced, r = remember(study.config, huang_experiment, K, study.config.seed)
    (first, others), phases, fits = r["steps_to_a_tenth"], r["phases_begin"], r["fits"]
    picture = plt.figure(figsize=(11, 5.2))
    axes = picture.subplot_mosaic([["a", "b", "when"], ["c", "d", "when"]])
    plot_phases(axes["a"], axes["c"], balanced, phases["balanced"], K)
    plot_phases(axes["b"], axes["d"], imbalanced, phases["imbalanced"], K)
    axes["a"].set(title=f"balanced: all p = 1/{K}", ylabel="loss")
    axes["b"].set(title="imbalanced: p$_1$ = 1/2")
    axes["c"].set_ylabel("entries of Q, means over k > 1")
    axes["b"].legend(fontsize=8, loc="lower left")
    axes["c"].legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.88))
    for name, label, color in (("switch_steps", "the lead passes to A$_k$", VERMILLION),
                               ("feature_1_steps", "feature 1 converges", BLUE)):
        b, error, intercept = fits[name]
        axes["when"].loglog(sizes, r[name], "o", color=color, label=f"{label}: K$^{{{b:.2f} ± {error:.2f}}}$")
        axes["when"].loglog(sizes, math.exp(intercept) * sizes**b, color=color, alpha=0.5)
    axes["when"].loglog(sizes, 2 / 3 * sizes**2 / ETA, ":", color=GRAY, label="2/3 K²/η, the limit of large K")
    axes["when"].set(title="when?", xlabel="features, K", ylabel="steps", xticks=sizes, xticklabels=SWITCH_SIZES)
    axes["when"].minorticks_off()
    axes["when"].legend(fontsize=8)
    picture.suptitle(f"A dominant feature is learned {others / first:.0f} times sooner; the others first unlearn it")

    (b, error, _), (b_first, error_first, _) = fits.values()
    (halved,), (early, late, last) = phases.values()
    A_k, B_k1 = imbalanced[min(last, len(imbalanced) - 1), 3].item(), imbalanced[r["switch"], 4].item()
    numbers = r | {"path_columns": ["loss of feature 1", "loss of the others", "A_1", "A_k", "B_{k,1}"],
                   "balanced": balanced[::10].tolist(), "imbalanced": imbalanced[::10].tolist()}
    return picture, numbers, [
        Claim("Huang", "the dominant feature converges first: steps to a tenth of its loss, against the others'",
              "first", f"{first} vs {others}, ratio {others / first:.0f}", others / first, first < others),
        Claim("Huang", "its time is nearly free of K: exponent below 0.25", "0", f"{b_first:.2f} +- {error_first:.2f}",
              b_first, abs(b_first) < 0.25),
        Claim("Huang", "balanced, A_k leads from the first step; imbalanced, phases II, III, IV begin in this order",
              "2 phases; 4", f"balanced II at {halved}; imbalanced {phases['imbalanced']}, A_k {A_k:.1f} "
              f"at IV (log K = {math.log(K):.1f}), B_k1 {B_k1:.2f} at the switch, step {r['switch']} "
              f"(-1/2 log K = {-0.5 * math.log(K):.2f})",
              r["switch"], r["balanced_switch"] == 0 and 0 < early < r["switch"] < late < last),
        Claim("Huang", "the lead switches after about K^2 steps: exponent within 0.25 of 2", "2",
              f"{b:.2f} +- {error:.2f}", b, abs(b - 2) <= 0.25),
    ]


# %% [markdown]
# # Homework
#
# `python icl_newton.py --homework FOLDER` writes the assignment: this file with the answers cut out, its tests, and a
# sheet. The sheet for lecturers goes beside the folder, not into it.

# %%
EXERCISES = [  # number, function, idea, equation, minutes, difficulty, points
    (1, "sample_prompts", "data with a given condition number", "x ~ N(0, U diag(lambda) U^T)", 20, "warm-up", 5),
    (2, "gradient_descent", "a method is a trajectory of predictions", "w <- w - eta (S w - b)", 30, "easy", 10),
    (3, "newton_start", "why alpha matters", "alpha < 2 / lambda_max(S)^2", 15, "easy", 5),
    (4, "newton", "doubling the digits", "M <- 2M - M S M", 30, "medium", 15),
    (5, "interleave", "a prompt as tokens", "x_1, y_1, ..., x_{n+1}", 15, "easy", 5),
    (6, "causal_attention", "looking back only", "softmax(q k^T / sqrt(D) + mask) v", 25, "medium", 10),
    (7, "least_squares_readout", "what does a layer know?", "r = (H^T H)^+ H^T y", 20, "medium", 10),
    (8, "similarity_of_errors", "do two learners make the same errors? (with error_cosines and best_match)",
     "mean over prompts of cos(e_a, e_b)", 30, "medium", 10),
    (9, "newton_layer", "Newton's weights, by hand", "T <- 2T - T S T", 60, "hard", 20),
    (10, "optimal_preconditioner", "what one layer of linear attention learns",
     "A = U diag(1 / ((n+1)/n lambda_i + tr/n)) U^T", 30, "hard", 10),
]

QUESTIONS = [  # to be answered before running anything
    "You raise --kappa from 1 to 100. How do the best-matching steps of the last layer change, Newton's and GD's? Why?",
    "What is the smallest squared error / d that any method can reach after t < d examples, on average, if kappa = 1? "
    "Which curve of the progression figure shows it?",
    "You train with 4 layers in place of 8 (--layers 4). What happens to the error after 2d examples, and to the "
    "number of Newton steps that one layer is worth?",
    "Halve alpha in Newton's start, and halve eta in gradient descent. How many more steps does each one need?",
    "Every layer of the Transformer makes errors as similar to the best GD step as to the best Newton step. Is that "
    "evidence that it runs gradient descent? What in the rates figure decides?",
    "Add noise 0.1 to y. Should the network converge to least squares? What is the best predictor now?",
]
ANSWERS = []
# BEGIN SOLUTION
ANSWERS = [
    "Newton's hardly change: it needs O(log kappa) steps; GD needs O(kappa). By error this shows: to be as good "
    "as the last layer after 10 examples, GD needs 362 steps against 64, Newton 18 against 12. Measured by similarity "
    "of errors GD's steps grow far less, since prefixes with t near d are ill-conditioned at any kappa. See the "
    "conditioning figure; either prediction with its reason deserves the points.",
    "1 - t/d: least squares knows w* only in the t directions it has seen. The dotted curve, least squares.",
    "Measured: the error rises about tenfold, from 1.1e-3 to 1.0e-2. Layers 2 to 4 match Newton's steps 3, 8, 13: five "
    "steps per layer in place of three. Trained end to end, a shallower network makes each layer do more.",
    "Newton one more, since 2^k absorbs a factor 2 in one step; gradient descent twice as many.",
    "No. Similarity at the best step tells only that both move along the same path from 0 to least squares. The steps "
    "needed decide: they grow linearly for Newton and exponentially for GD, so GD's rate is not the network's.",
    "No: to ridge regression with lambda = 0.1^2, the mean of the posterior. All solvers here use S + lambda I then.",
]
# END SOLUTION


def write_homework(folder):
    """Write the student's version into a folder that does not exist yet or is empty, and LECTURERS.md beside it.

    Each answer becomes a NotImplementedError that names its exercise; the part of the tests "For lecturers" stays out.
    Raises ValueError if the folder has work in it.
    """
    folder, this_file = Path(folder).resolve(), Path(__file__)
    lecturers = folder.with_name(folder.name + "-LECTURERS.md")
    if not ANSWERS:
        raise ValueError("--homework needs the lecturer's icl_newton.py; in this one the answers are cut out")
    if lecturers.exists() or folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--homework: {folder} has work in it, or {lecturers.name} exists; nothing was written")
    text, numbers = this_file.read_text("utf-8"), {name: number for number, name, *_ in EXERCISES}
    numbers |= {"error_cosines": 8, "best_match": 8}

    def blank(answer):  # in a function, an exception; at the top level, nothing
        name = re.findall(r"^def (\w+)", text[: answer.start()], re.MULTILINE)[-1]
        return f'    raise NotImplementedError("exercise {numbers[name]}: {name}")\n' if answer[1] else ""

    student = re.sub(r"^( *)# BEGIN SOLUTION\n.*?# END SOLUTION\n", blank, text, flags=re.MULTILINE | re.DOTALL)
    tests = this_file.with_name("test_icl_newton.py").read_text("utf-8").split("# For lecturers")[0].rstrip("#- \n")
    table = "| exercise | function | idea | equation | minutes | difficulty | points | test |\n|" + "---|" * 8 + "\n"
    table += "".join(f"| {' | '.join(map(str, row))} | pytest -k ex{row[0]:02} |\n" for row in EXERCISES)
    questions = "".join(f"{i}. {question}\n" for i, question in enumerate(QUESTIONS, start=1))
    answers = "".join(f"{i}. {q}\n\n   {a}\n\n" for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS), start=1))
    sheet = f"""# Which algorithm does a Transformer run?

Read icl_newton.py from the top. Where it raises NotImplementedError, write the answer: the docstring says what, a hint
how. Then

    python -m pytest -x --tb=short -k ex04       # one exercise, its first failure only
    python -m pytest --tb=no -k test_ex          # all, with points
    python icl_newton.py --figures solvers       # after exercise 4: your first figure, in seconds
    python icl_newton.py                         # once all pass: the whole study, in minutes

The tests of one exercise do not need the others. A failing test prints ICL_SEED; set it to repeat the run.

{table}
## Predict before you run

{questions}"""
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in ((folder / "icl_newton.py", student), (folder / "test_icl_newton.py", tests + "\n"),
                          (folder / "ASSIGNMENT.md", sheet),
                          (lecturers, f"# For lecturers\n\n{table}\n## Questions, with answers\n\n{answers}")):
        path.write_text(content, "utf-8")
    print(f"The assignment is in {folder}/, the answers to its questions in {lecturers}")


# %% [markdown]
# # The run
#
# The training loop with its checkpoints, the command line, and the table at the end. Nothing to learn here.

# %%
def source(*objects):
    """The program text of functions and classes; where Python has none to show, a text that matches nothing."""
    try:
        return "".join(map(inspect.getsource, objects))
    except (OSError, TypeError):
        return os.urandom(8).hex()


# The program as it was at the start: somebody may edit the file while it runs. A notebook has no file, and remembers
# nothing.
CODE = Path(__file__).read_bytes() if "__file__" in globals() else os.urandom(8)
TRAINING_CODE = source(sample_prompts, interleave, normalize, causal_attention, *MODELS.values(), orthogonalize, Muon,
                       learning_rate_factor, prompt_size, training_prompts, make_optimizers, training_step)


def training_flops(config):
    """Floating-point operations of a Transformer's whole training, in matrix products only: forward, backward, Muon."""
    W, tokens = config.width, torch.tensor([2 * prompt_size(config, step)[1] + 1 for step in range(config.steps)])
    weights, attention = 2 * 8 * W**2, 4 * tokens.double() * W  # per token, layer and prompt; attention sees all tokens
    forward = config.layers * config.batch * (tokens * (weights + attention)).sum().item()
    muon = config.layers * 5 * (4 * 6 * W**3 + 2 * 10 * W**3)  # four square matrices, two of 2W x W; five iterations
    return 3 * forward + config.steps * muon * (config.recipe == "muon")  # backward multiplies each matrix twice


def matmul_rate(size=2048):
    """Floating-point operations per second of a large float32 matrix product on the CPU: the best of a few."""
    a = torch.randn(size, size)
    return 2 * size**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=4))


def identity(config):
    """What a checkpoint is found by: the settings and the code that decide the trained weights."""
    names = "d n kappa noise model layers width heads steps batch muon_lr adam_lr curriculum recipe seed".split()
    code = hashlib.sha256(TRAINING_CODE.encode()).hexdigest()
    return {"code": code} | {name: getattr(config, name) for name in names}


def checkpoint_path(config):
    """The file of this configuration's training; its name carries a hash of the identity."""
    key = hashlib.sha256(json.dumps(identity(config)).encode()).hexdigest()[:10]
    return Path(config.checkpoints) / f"{config.model}-d{config.d}-n{config.n}-seed{config.seed}-{key}.pt"


def load_checkpoint(config):
    """The saved state of this configuration's training, or None. A file that cannot be used is kept under a new name,
    with a line on standard error."""
    path, here = checkpoint_path(config), config.torch_device.type
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["identity"] == identity(config) and (saved["done"] == config.steps or saved["device"] == here):
            return saved
        reason = f"belongs to another configuration, or is unfinished on {saved['device']}, not {here}"
    except FileNotFoundError:
        return None
    except Exception as error:  # torch.load raises half a dozen kinds for damaged files
        reason = f"is damaged ({type(error).__name__})"
    kept = next(p for i in range(1, 10**6) if not (p := path.with_suffix(f".kept-{i}")).exists())
    path.rename(kept)
    print(f"icl_newton: checkpoint {path} {reason}; kept as {kept}, training anew", file=sys.stderr)
    return None


def save_atomically(write, path):
    """Call write(temporary path), then move the result to `path` in one step: a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)


def remember(config, experiment, *arguments):
    """experiment(*arguments), from disk if this very file has computed it before; any change in it computes anew. (What
    a program that imports this file has changed in memory goes unseen.)"""
    path = Path(config.checkpoints) / f"{'-'.join(map(str, (experiment.__name__, *arguments)))}.pt"
    key = hashlib.sha256(CODE + torch.__version__.encode()).hexdigest()
    with contextlib.suppress(Exception):  # nothing saved yet, or damaged
        saved = torch.load(path, weights_only=True)
        if saved["key"] == key:
            return saved["result"]
    result = experiment(*arguments)
    save_atomically(functools.partial(torch.save, {"key": key, "result": result}), path)
    return result


def show_progress(config, step, loss, seconds_per_step):
    """One line: step, loss, rate, time left. It rewrites itself on a terminal; in a log it comes every tenth."""
    on_terminal, last = sys.stdout.isatty(), step == config.steps
    if on_terminal or last or step % max(config.steps // 10, 1) < 10:
        left = (config.steps - step) * seconds_per_step
        line = f"  step {step:>6}/{config.steps}  loss/d {loss / config.d:.4f}  {1 / seconds_per_step:5.1f} steps/s"
        print(f"{line}  {left:4.0f} s left", end="\r" if on_terminal and not last else "\n", flush=True)


def train(config):
    """Train the Transformer of `config`, or go on from its checkpoint, and return it.

    A run that was killed continues at its last checkpoint and ends with the same weights, bit for bit on the same
    machine, as one that was not. model.training_seconds and model.losses (steps, n+1), the squared error prefix by
    prefix (0 where a curriculum's prompts were shorter), describe the training. Raises FloatingPointError, with the
    step, for a loss that is not finite.
    """
    device, path = config.torch_device, checkpoint_path(config)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: ten bits of each factor, sums in float32
    torch.manual_seed(config.seed)
    model = MODELS[config.model](config).to(device)
    parts = [model, *make_optimizers(model, config)]
    generator = torch.Generator(device).manual_seed(config.seed)
    losses, done, seconds = torch.zeros(config.steps, config.n + 1, device=device), 0, 0.0
    if saved := load_checkpoint(config):
        for part, state in zip(parts, saved["parts"]):
            part.load_state_dict(state)
        generator.set_state(saved["generator"])
        losses, done, seconds = saved["losses"].to(device), saved["done"], saved["seconds"]
        print(f"  found {path}: {done} of {config.steps} steps" + " done" * (done == config.steps))

    start = time.perf_counter() - seconds
    for step in range(done, config.steps):
        error, done = training_step(model, parts[1:], config, step, generator), step + 1
        losses[step, : len(error)] = error
        save = done % config.save_every == 0 or done == config.steps
        if save or done % 10 == 0:  # not at every step: reading a number makes a GPU wait
            if not (finite := losses[:done].isfinite().all(1)).all():
                bad = finite.int().argmin().item() + 1
                raise FloatingPointError(f"the loss is not finite at step {bad}; try a smaller --muon_lr or --adam_lr")
            seconds = time.perf_counter() - start
            recent = losses[max(done - 50, 0) : done]
            show_progress(config, done, recent[recent > 0].mean().item(), seconds / done)
        if save:
            state = dict(identity=identity(config), device=device.type, done=done, seconds=seconds, losses=losses,
                         parts=[part.state_dict() for part in parts], generator=generator.get_state())
            save_atomically(functools.partial(torch.save, state), path)
    model.training_seconds, model.losses = seconds, losses.cpu()
    return model.requires_grad_(False)


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake on the command line raises ValueError with one line."""

    def error(self, message):
        raise ValueError(message)


def check(config):
    """Raise ValueError, in one line, for a configuration that cannot work."""
    for name, value in vars(config).items():
        may_be_zero = name in ("noise", "curriculum", "seed")
        if not isinstance(value, str) and not (0 <= value < math.inf and (value or may_be_zero)):
            raise ValueError(f"--{name} must be a positive number{' or 0' * may_be_zero}, not {value}")
    chosen = config.figures.split(",") if config.figures != "all" else []
    cuda_missing = config.device == "cuda" and not torch.cuda.is_available()
    not_fu = (config.d, config.n, config.kappa, config.noise) != (20, 40, 1, 0)
    heads_wrong = config.width % config.heads or config.width == config.heads
    too_short = config.steps <= config.curriculum * (config.d - 2)
    for wrong, message in (
        (heads_wrong, f"--heads must divide --width, and be smaller; not {config.heads} and {config.width}"),
        (too_short, f"--steps {config.steps} end before the curriculum does; --curriculum 0 goes without"),
        (config.seed + config.seeds > 10**12, f"--seed stays below 10^12, not {config.seed}"),
        (len(set(chosen)) < len(chosen), f"--figures names a figure twice: {config.figures}"),
        (config.kappa < 1, f"--kappa is at least 1, not {config.kappa}"),
        (set(chosen) - set(FIGURES), f"--figures is all, or some of {', '.join(FIGURES)}; not {config.figures}"),
        ("paper_tables" in chosen and not_fu, "--figures paper_tables needs --d 20 --n 40, no kappa and no noise"),
        (config.model not in MODELS, f"--model is one of {', '.join(MODELS)}, not {config.model}"),
        (config.recipe not in ("muon", "fu"), f"--recipe is muon or fu, not {config.recipe}"),
        (config.device not in ("auto", "cpu", "cuda"), f"--device is auto, cpu or cuda, not {config.device}"),
        (cuda_missing, "--device cuda: no CUDA device on this machine"),
    ):
        if wrong:
            raise ValueError(message)


def parse_config(arguments):
    """Command line -> Config. Flags and help are the fields and comments of Config; a preset sets other defaults."""
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = OneLineParser("icl_newton.py", description=__doc__.strip().split("\n\n")[0], allow_abbrev=False,
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=helps[field.name])
    preset = parser.parse_known_args([a for a in arguments if a not in ("-h", "--help")])[0].preset
    if preset not in PRESETS:
        raise ValueError(f"--preset is one of {', '.join(PRESETS)}, not {preset}")
    parser.set_defaults(**PRESETS[preset])
    return Config(**vars(parser.parse_args(arguments)))


def require_writable(*folders):
    """Raise ValueError for a folder that cannot be made or written."""
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"cannot write into folder {folder}: {error.strerror}") from None


def peak_memory():
    """The most memory this process has held, in bytes; None where the system does not tell."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_claims(runs):
    """The table at the end: every claim, the paper's number, ours with its spread, and whether they agree."""
    print("\nWhat the papers say, what this run measured (95% over prompts in brackets), and whether they agree:\n")
    for claims in zip(*runs):
        c, values = claims[0], torch.tensor([claim.value for claim in claims], dtype=torch.float64)
        verdict = {True: "agrees", False: "FAILS", None: "answer"}[c.holds]
        print(f"  {verdict:<8}{c.claim} ({c.where})\n{'':10}paper {c.paper};  here {c.here}")
        if len(runs) > 1:
            agrees = "" if c.holds is None else f", agrees in {sum(claim.holds for claim in claims)}"
            print(f"{'':10}{len(runs)} seeds: {values.mean():.4g} +- {values.std():.2g}{agrees}")


def describe(study):
    """The numbers of a study's training, if a figure asked for it."""
    if "model" not in vars(study):
        return {}
    config, seconds, error = study.config, study.model.training_seconds, study.error(study.layers)[-1]
    rate = training_flops(config) / seconds if config.model == "transformer" else None
    return {"training_seconds": seconds, "training_flops_per_second": rate,
            "error_over_d_after_2d_examples": error[min(2 * config.d, config.n)].item(),
            "error_over_d_after_n_examples": error[config.n].item()}


def run(config):
    """Make the figures that the configuration asks for, write results.json, and print the table of claims."""
    fast, out = matmul_rate(), Path(config.out)
    names = [f for f in FIGURES if f not in ON_DEMAND] if config.figures == "all" else config.figures.split(",")
    needy = set(names) - NEED_NO_MODEL
    ill = {name for name in needy if name.endswith("_ill")}
    models = bool(needy - ill) + bool(ill or "conditioning" in needy)
    models += sum({"recipes": 10, "width_sweep": 2, "depth_sweep": 2}.get(name, 0) for name in names)
    training = max(training_flops(config) / (0.4 * fast), config.steps * 0.002 * config.layers)  # small: Python's time
    estimate = config.seeds * (models * training + 2 * len(names))
    print(f"Draws {', '.join(names)} into {out}/, and trains the models they need (d = {config.d}, n = {config.n}).")
    on_cpu = f"; without checkpoints it takes about {estimate:.0f} s" * (config.torch_device.type == "cpu")
    print(f"Device {config.torch_device}, {torch.get_num_threads()} threads, {fast / 1e9:.0f} GFLOP/s in a large "
          f"matrix product{on_cpu}.")

    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        study, claims, figures, seconds = Study(dataclasses.replace(config, seed=seed)), [], {}, {}
        for name in names:
            start = time.perf_counter()
            picture, figures[name], tested = FIGURES[name](study)
            claims += tested
            if not runs:  # the first seed's pictures
                save_atomically(functools.partial(picture.savefig, format="png"), out / f"{name}.png")
            plt.close("all")
            seconds[name] = time.perf_counter() - start
            print(f"  {out / name}.png: {picture.get_suptitle()}" if not runs else f"  seed {seed}: {name}", flush=True)
        runs.append({"seed": seed, **describe(study), "claims": claims, "figures": figures, "seconds": seconds})

    results = {"config": dataclasses.asdict(config), **runs[0], "other_seeds": runs[1:],
               "peak_memory_bytes": peak_memory(), "threads": torch.get_num_threads(), "torch": torch.__version__,
               "cpu_matrix_product_flops_per_second": fast}
    text = json.dumps(results, default=dataclasses.asdict)
    text = json.dumps(json.loads(text, parse_constant=lambda word: None), indent=1)  # JSON knows no NaN
    save_atomically(lambda path: path.write_text(text, "utf-8"), out / "results.json")
    if runs[0]["claims"]:
        print_claims([run["claims"] for run in runs])
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in runs[0]["seconds"].items())
    print(f"\nNumbers in {out / 'results.json'}. Seconds, each with the training it was the first to need: {stages}")


def main(arguments=None):
    """Run the command line; returns the exit status: 0, 1 (training diverged), 2 (bad input) or 130 (Ctrl-C)."""
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments)
        if config.homework:
            write_homework(config.homework)
            return 0
        require_writable(config.out, config.checkpoints)
    except (ValueError, OSError) as error:
        print(f"icl_newton: {error}", file=sys.stderr)
        return 2
    unwritten = re.findall(r'NotImplementedError\("(exercise \d+: \w+)"\)', CODE.decode("utf-8", "ignore"))
    if unwritten and config.figures == "all":  # a student's version
        print(f"icl_newton: still to be written: {', '.join(unwritten)}", file=sys.stderr)
        return 1
    try:
        run(config)
    except NotImplementedError as error:
        print(f"icl_newton: still to be written: {error}", file=sys.stderr)
        return 1
    except (FloatingPointError, OSError) as error:
        print(f"icl_newton: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nicl_newton: stopped; the same command goes on from the last checkpoint in {config.checkpoints}/",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__" and "__file__" in globals():  # in a notebook: run(Config(figures="rates"))
    sys.exit(main())
