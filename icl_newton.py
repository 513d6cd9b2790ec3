# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "torch==2.13.0", "matplotlib"]
# ///
"""
Transformers that learn linear regression in context run Newton's method, layer by layer. Watch one do it.

Give a Transformer a prompt x_1, y_1, x_2, y_2, ..., x_{n+1} whose answers come from a hidden linear rule y = w.x that
changes with every prompt. Trained on millions of such prompts, it learns to solve a *new* regression inside one
forward pass. Which algorithm does it run? Fu, Chen, Jia and Sharan (arXiv 2310.17086, "Fu" below) say: not gradient
descent. Each layer is worth a fixed number of steps of Iterative Newton, and every Newton step doubles the number of
correct digits; to keep up, gradient descent needs exponentially many steps. This file trains such a Transformer from
nothing on two CPU cores in about two minutes, reads a prediction out of every layer, and lays it beside the steps of
Newton and of gradient descent.

    python icl_newton.py                    everything: figures/*.png, figures/results.json and a table of claims
    python icl_newton.py --preset quick     a first look in half a minute: everything shrunk, conclusions too
    python icl_newton.py --figures rates    one figure, and only the models it needs
    python icl_newton.py --help             every setting, with what it does

The idea that keeps the file small: **every learner is a trajectory of predictions** of shape (steps, prompts, n+1).
Newton's steps, gradient descent's steps, a Transformer's layers: one error curve, one similarity and one best match
serve them all.

What differs from Fu's setting, and why (their own setting is `--preset paper`, for a GPU):
    d = 5, n = 10, not 20, 40       the same picture for a hundredth of the arithmetic
    8 layers of width 64            not 12 of 256, for the same reason
    Muon, batch 64, 2,500 steps     not Adam, 500,000 steps: see section 4
    GD's step size 1/lambda_max(S)  per prefix, not one fixed 0.01: GD at its textbook best, so that the race is fair
    the same norm before every probe   their code normalises only the last layer's state before the readout

Notation (Fu's symbols). Shapes in code put prompts first: (prompts, n+1, d).
    d, n          dimension of x; number of examples in a prompt. The (n+1)-th x is the last query.
    t = 0..n      prefix length: how many examples a prediction may use. Every prompt asks n+1 questions at once.
    w*            the hidden rule of one prompt, drawn from N(0, I_d)
    Sigma, kappa  covariance of x and its condition number (1: isotropic)
    S = X^T X     = sum_{i<=t} x_i x_i^T, the Gram matrix of a prefix; b = X^T y = sum_{i<=t} y_i x_i
    eta, alpha    step size of gradient descent; start of Newton, M_0 = alpha S
    k, l          a step of an algorithm; a layer of a network
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
    steps: int = 2500  # training steps
    batch: int = 64  # fresh prompts per step
    muon_lr: float = 0.007  # Muon's step size: the blocks' weight matrices
    adam_lr: float = 0.01  # AdamW's step size: embedding, positions and readout
    curriculum: int = 0  # steps per added dimension, starting at 2; 0: all d dimensions from the start
    seed: int = 1  # of initial weights and training prompts
    # How it is examined
    probes: int = 2048  # prompts that fit the readouts of the layers
    prompts: int = 512  # fresh prompts on which all comparisons are made
    # The run
    preset: str = "default"  # default, quick (shrunk, half a minute) or paper (Fu's sizes, for a CUDA GPU)
    figures: str = "all"  # which figures to make, by name, separated by commas
    device: str = "auto"  # cpu, cuda, or auto: CUDA where there is one
    out: str = "figures"  # folder for pictures and results.json
    checkpoints: str = "checkpoints"  # folder for trained models and for those still in training
    save_every: int = 250  # steps between checkpoints
    homework: str = ""  # write the assignment for students into this new folder, and do nothing else

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("noise", "curriculum", "seed")
            if field.type in (int, float) and not (0 <= value < math.inf and (value or may_be_zero)):
                raise ValueError(f"--{field.name} must be a positive number{' or 0' * may_be_zero}, not {value}")
        if self.width % self.heads:
            raise ValueError(f"--heads must divide --width, but {self.heads} does not divide {self.width}")
        if self.kappa < 1 or (self.kappa > 1 and self.d == 1):
            raise ValueError("--kappa is at least 1, and 1 where d = 1")
        if unknown := set(self.figures.split(",")) - {"all", *FIGURES}:
            raise ValueError(f"--figures: no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
        if self.model not in MODELS:
            raise ValueError(f"--model is one of {', '.join(MODELS)}, not {self.model}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device is auto, cpu or cuda, not {self.device}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: no CUDA device on this machine")

    @property
    def torch_device(self):
        use_cuda = self.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if use_cuda else "cpu")


PRESETS = {
    "default": {},
    "quick": dict(d=3, n=6, layers=6, width=32, heads=2, steps=500, probes=512, prompts=256),
    "paper": dict(d=20, n=40, layers=12, width=256, heads=8, steps=30_000, curriculum=50, prompts=320),
}

# The setting of one training run, and so the name of its checkpoint; nothing else changes the trained weights.
TRAINING_FIELDS = ("d n kappa noise model layers width heads steps batch muon_lr adam_lr curriculum seed").split()

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
    # Hint: A random eigenbasis is the Q of a QR decomposition; x = U diag(sqrt(eigenvalues)) z has covariance U diag U^T. (9 lines)
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
    return xs, ys + noise * draw(prompts, n + 1) if noise else ys
    # END SOLUTION


# %% [markdown]
# ## 3. Three classical learners (Fu, section 3.1)
#
# All of them see a prefix only through S = X^T X and b = X^T y, and all prefixes of all prompts are solved at once, in
# float64.
#
#     least squares       w = pinv(S) b               the answer; of minimum norm while t < d
#     gradient descent    w <- w - eta (S w - b)      O(kappa log 1/eps) steps to error eps
#     Iterative Newton    M <- 2M - M S M,  w = M b   O(log kappa + log log 1/eps) steps
#
# Newton looks for the inverse of S. Why it doubles its digits takes one line. With the residual R_k = I - S M_k,
#
#     R_{k+1} = I - S (2 M_k - M_k S M_k) = (I - S M_k)^2 = R_k^2,
#
# so an error of 10^-3 becomes 10^-6, then 10^-12. One step of gradient descent multiplies its error by (I - eta S),
# always the same factor: a fixed number of steps per digit. The catch: R_0 = I - alpha S^2 must have norm below 1 on
# the span of the examples, so alpha < 2/||S||^2. (Fu prints alpha = 2/||S S^T||_2, which is exactly the edge, where one
# eigenvalue of R is -1 and its square, 1, never shrinks. Their code uses 1/||S S^T||_F, and so do we.)

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
    return predict(w, in_eigenbasis(xs))


def gradient_descent(xs, ys, steps, lr=None, w0=None, ridge=0.0):
    """Gradient descent, w <- w - lr (S w - b), as a trajectory (len(steps), prompts, n+1).

    `lr` defaults to 1/lambda_max(S), prefix by prefix; `w0`, the start, (d,) or (prompts, 1, d), to 0. Along an
    eigenvector of S one step multiplies the error by 1 - lr lambda.
    """
    # Hint: In the eigenbasis of S one step multiplies the error by 1 - lr lambda; or just write the loop. (4 to 10 lines)
    # BEGIN SOLUTION
    def residual(eigenvalues, k):
        step_size = 1 / eigenvalues[..., -1:].clamp_min(TINY) if lr is None else lr
        return (1 - step_size * eigenvalues) ** k

    return spectral_trajectory(xs, ys, residual, steps, w0, ridge)
    # END SOLUTION


def newton_start(S):
    """A safe alpha for M_0 = alpha S, one for each S (..., d, d): 1/||S S^T||_F, as (..., 1, 1). Any alpha below
    2/lambda_max(S)^2 converges; the Frobenius norm is a cheap upper bound of lambda_max(S)^2."""
    # Hint: Which norm bounds lambda_max(S)^2 from above, and costs no eigenvalues? Mind S = 0. (1 line)
    # BEGIN SOLUTION
    return 1 / torch.linalg.matrix_norm(S @ S.mT, keepdim=True).clamp_min(TINY)
    # END SOLUTION


def newton(xs, ys, steps, alpha=None, ridge=0.0):
    """Iterative Newton, M <- 2M - M S M from M_0 = alpha S, predicting with w_k = M_k b (Fu, section 3.1).

    A trajectory (len(steps), prompts, n+1); step 0 is M_0. `alpha` defaults to 1/||S S^T||_F, prefix by prefix.
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
# A GPT-2-like decoder on interleaved tokens x_1, y_1, ..., x_{n+1}: pre-norm blocks of causal attention and an MLP, each
# adding to the residual stream. It predicts y_{t+1} at the token x_{t+1}, having seen t examples. All layers' matrices
# of one shape live in one tensor, so that the optimiser can treat them together.


# %%
def interleave(xs, ys):
    """Prompts (prompts, n+1, d), (prompts, n+1) -> tokens (prompts, 2n+1, d): x_1, y_1, ..., x_{n+1}.

    y is zero-padded to d entries, and the last y, the answer, is left out (Fu, section 3).
    """
    # Hint: Stack x and padded y along a new axis, then flatten it into time. (2 lines)
    # BEGIN SOLUTION
    y_tokens = F.pad(ys[..., None], (0, xs.shape[-1] - 1))  # (prompts, n+1, d): y, 0, ..., 0
    return torch.stack([xs, y_tokens], dim=2).flatten(1, 2)[:, :-1]
    # END SOLUTION


def normalize(h):
    """The one normalisation of the model, over the last axis and without parameters: mean 0, variance 1."""
    return F.layer_norm(h, h.shape[-1:])


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D) + mask) v for q, k, v (..., T, D): token i looks at tokens 0..i only."""
    # Hint: What the softmax must not see is -inf before it. (4 lines)
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
# Mean squared error over every prefix, on fresh prompts at every step. The paper's Adam at a constant 1e-4 needs
# hundreds of thousands of steps; Muon (Keller Jordan, 2024) makes it thousands. Muon replaces each matrix's momentum G
# by the nearest orthogonal matrix, so that every direction is learned at the same speed. To find it, Muon runs a
# Newton-Schulz iteration, X <- X (a I + b X X^T + c (X X^T)^2): a relative of the very algorithm we are about to find
# inside the network. With all matrices of one shape in one tensor, the iteration runs on all layers at once.


# %%
def orthogonalize(G):
    """The nearest orthogonal matrix to each of (..., rows, columns), roughly: singular values end in 0.7..1.2.

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
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / warmup, 1) * (steps - step) / steps


def training_prompts(config, step, generator):
    """The fresh prompts of one step: xs (batch, n+1, d), ys (batch, n+1).

    A curriculum (Garg et al., 2022) starts with 2 active dimensions, the other entries zero, and 2d + 2 examples, and
    grows both up to d and n. Without it, training at d = 20 does not get off the ground.
    """
    d, n = config.d, config.n
    if config.curriculum:
        d = min(2 + step // config.curriculum, config.d)
        n = min(2 * d + 2, config.n) if d < config.d else config.n
    xs, ys = sample_prompts(config.batch, n, d, kappa=config.kappa, noise=config.noise, generator=generator)
    return F.pad(xs, (0, config.d - d)), ys


def flops_per_step(config):
    """Floating-point operations of one training step's matrix products: forward, backward and Muon."""
    W, T = config.width, 2 * config.n + 1
    forward = config.layers * config.batch * T * (2 * 8 * W**2 + 4 * T * W)  # weights, and attention's T x T
    muon = config.layers * 5 * (4 * 6 * W**3 + 2 * 10 * W**3)  # four square matrices, two of 2W x W; five iterations
    return 3 * forward + muon  # the backward pass multiplies each matrix twice


def matmul_rate(size=2048, repeats=4):
    """Floating-point operations per second of a large float32 matrix product on the CPU: the best of a few."""
    a, seconds = torch.randn(size, size), []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def identity(config):
    """What a checkpoint is found by: the settings that decide the trained weights."""
    return {name: getattr(config, name) for name in TRAINING_FIELDS}


def checkpoint_path(config):
    key = hashlib.sha256(json.dumps(identity(config)).encode()).hexdigest()[:10]
    return Path(config.checkpoints) / f"{config.model}-d{config.d}-n{config.n}-seed{config.seed}-{key}.pt"


def load_checkpoint(config):
    """The saved state of this configuration's training, or None. A file that cannot be used is kept under a new name,
    with a line on standard error."""
    path = checkpoint_path(config)
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        reason = None if saved["identity"] == identity(config) else "belongs to another configuration"
    except Exception as error:  # torch.load raises half a dozen kinds for damaged files
        reason = f"is damaged ({type(error).__name__})"
    if reason is None:
        return saved
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


def show_progress(config, step, loss, seconds_per_step):
    """One line: step, loss, rate, time left. It rewrites itself on a terminal; in a log it comes every tenth."""
    on_terminal, last = sys.stdout.isatty(), step == config.steps
    if on_terminal or last or step % max(config.steps // 10, 1) < 10:
        left = (config.steps - step) * seconds_per_step
        line = f"  step {step:>6}/{config.steps}  loss/d {loss / config.d:.4f}  {1 / seconds_per_step:5.1f} steps/s  {left:4.0f} s left"
        print(line, end="\r" if on_terminal and not last else "\n", flush=True)


def train(config):
    """Train the Transformer of `config`, or go on from its checkpoint, and return it.

    A run that was killed continues at its last checkpoint and ends with the same weights, bit for bit on the same
    machine, as one that was not. model.training_seconds and model.losses (steps,) describe the training. Raises
    FloatingPointError, with the step, for a loss that is not finite.
    """
    device, path = config.torch_device, checkpoint_path(config)
    torch.manual_seed(config.seed)
    model = MODELS[config.model](config).to(device)
    blocks, rest = [p for p in model.parameters() if p.ndim > 2], [p for p in model.parameters() if p.ndim <= 2]
    optimizers = [torch.optim.AdamW(rest, config.adam_lr, (0.9, 0.99), weight_decay=0)]
    if blocks:
        optimizers.append(Muon(blocks, config.muon_lr))
    peak_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator(device).manual_seed(config.seed)
    losses, done, seconds = torch.full((config.steps,), math.nan, device=device), 0, 0.0
    if saved := load_checkpoint(config):
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"])
        losses, done, seconds = saved["losses"].to(device), saved["done"], saved["seconds"]
        print(f"  found {path}: {done} of {config.steps} steps" + " done" * (done == config.steps))

    start = time.perf_counter() - seconds
    for step in range(done, config.steps):
        for optimizer, lr in zip(optimizers, peak_rates):
            optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step, config.steps)
        xs, ys = training_prompts(config, step, generator)
        loss = (model(xs, ys) - ys).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses[step] = loss.detach()

        done = step + 1
        save = done % config.save_every == 0 or done == config.steps
        if save or done % 10 == 0:  # not at every step: reading a number makes a GPU wait
            if not losses[: done].isfinite().all():
                bad = (~losses[: done].isfinite()).nonzero()[0].item() + 1
                raise FloatingPointError(f"the loss is not finite at step {bad}; try a smaller --muon_lr or --adam_lr")
            seconds = time.perf_counter() - start
            show_progress(config, done, losses[max(done - 50, 0) : done].mean().item(), seconds / done)
        if save:
            state = dict(identity=identity(config), done=done, seconds=seconds, losses=losses, model=model.state_dict(),
                         optimizers=[o.state_dict() for o in optimizers], generator=generator.get_state())
            save_atomically(functools.partial(torch.save, state), path)
    model.training_seconds, model.losses = seconds, losses.cpu()
    return model.requires_grad_(False)


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
    """States of all layers with a constant 1 beside them, in chunks of prompts: (layers+1, chunk, n+1, width+1)."""
    device = next(model.parameters()).device
    for x, y in zip(xs.split(chunk), ys.split(chunk)):
        yield F.pad(model.states(x.to(device), y.to(device)).double().cpu(), (0, 1), value=1.0)


def least_squares_readout(H, y):
    """The readout r that minimises ||H r - y||: H (..., samples, width), y (samples,) -> r (..., width), float64.

    A layer leaves many directions of its state unused at first; the pseudo-inverse of H^T H leaves them alone too.
    """
    # Hint: The normal equations, with torch.linalg.pinv for what H^T H cannot determine. (1 line)
    # BEGIN SOLUTION
    return (torch.linalg.pinv(H.mT @ H, hermitian=True, rtol=1e-12) @ (H.mT @ y[..., None])).squeeze(-1)
    # END SOLUTION


def fit_readouts(model, xs, ys):
    """The least-squares readout of every layer, over all prefixes at once: (layers+1, width+1), float64."""
    H = torch.cat([features.flatten(1, 2) for features in probe_features(model, xs, ys)], dim=1)
    return least_squares_readout(H, ys.double().flatten())


def layer_predictions(model, xs, ys, readouts=None):
    """Every layer's predictions as a trajectory (layers+1, prompts, n+1); step 0 is the embedding.

    `readouts` (layers+1, width+1) come from fit_readouts; by default they are fitted on fresh prompts.
    """
    if readouts is None:
        readouts = fit_readouts(model, *fresh_prompts(model.config, model.config.probes, seed=1))
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
    """Cosines of the error vectors over t = 1..n, prompt by prompt: (len_a, len_b, prompts)."""
    # Hint: Normalise each error vector, then one einsum does all pairs. (3 lines)
    # BEGIN SOLUTION
    def direction(trajectory):
        return F.normalize((trajectory.double() - ys.double())[..., 1:], dim=-1)

    return torch.einsum("apt,bpt->abp", direction(traj_a), direction(traj_b))
    # END SOLUTION


def similarity_of_errors(traj_a, traj_b, ys):
    """SimE, the mean cosine of error vectors, between every step of a and every step of b: (len_a, len_b)."""
    # Hint: The mean over prompts. (1 line)
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
    """Means over prompts of (..., prompts), for `rounds` resamples of the prompts: (rounds, ...)."""
    prompts = values.shape[-1]
    drawn = torch.randint(prompts, (rounds, prompts), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(rounds, prompts, dtype=values.dtype).scatter_add_(1, drawn, torch.ones_like(drawn).to(values))
    return torch.einsum("rp,...p->r...", counts / prompts, values)


def interval(samples):
    """The middle 95% of bootstrap samples (rounds, ...): (2, ...)."""
    return torch.quantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)


def line_fit(x, y):
    """Least-squares line through (x, y) along the last axis: slope, intercept and R^2, each (...)."""
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    slope = (dx * dy).sum(-1) / dx.square().sum(-1)
    r2 = (slope * (dx * dy).sum(-1) / dy.square().sum(-1).clamp_min(TINY))
    return slope, y.mean(-1) - slope * x.mean(-1), r2


# %% [markdown]
# ## 8. One study, many figures
#
# A study is one configuration with everything its figures share, each thing computed when a figure first asks for it.

# %%
NEWTON_STEPS = list(range(0, 33))
GD_STEPS = sorted({round(2 ** (k / 2)) for k in range(0, 33)})  # 1, 2, 3, 4, 6, 8, 11, 16, ..., 65536
FIRST_LAYER = 3  # rates are fitted from here on: layers 1 and 2 only bring each y to its x, in the paper too

# Fu's Transformer (d = 20, n = 40, 12 layers): best-matching steps of layers 1..12, from figures 8 and 10 of v3
PAPER_NEWTON_STEPS = [1, 1, 2, 5, 8, 10, 14, 16, 20, 20, 21, 21]
PAPER_GD_STEPS = [1, 1, 4, 8, 32, 64, 256, 512, 1024, 4096, 4096, 4096]


@dataclasses.dataclass
class Match:
    """How the layers 1..L of a network match the steps of an algorithm, with bootstrap intervals over prompts."""

    counts: torch.Tensor  # (K,) the algorithm's step counts
    similarity: torch.Tensor  # (L, K) SimE
    best: torch.Tensor  # (L,) best-matching step counts
    best_interval: torch.Tensor  # (2, L)
    slope: float  # steps per layer, or doublings per layer, from FIRST_LAYER on
    intercept: float
    slope_interval: list
    r2: float


def match_layers(layers, trajectory, counts, ys, log2=False, measure=error_cosines):
    """Match layers (layers+1, prompts, n+1), but for the embedding, to a trajectory whose step counts are `counts`.

    The line is fitted to the best-matching steps, or to their log2, against the layer.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    similarity = measure(layers[1:], trajectory, ys)
    best = counts[best_match(similarity.mean(-1))]
    resampled = counts[best_match(bootstrap(similarity))]  # (rounds, L)
    first = min(FIRST_LAYER, len(best) - 1)
    numbers = torch.arange(first, len(best) + 1, dtype=torch.float64)

    def fit(steps):
        y = steps[..., first - 1 :]
        return line_fit(numbers, y.log2() if log2 else y)

    slope, intercept, r2 = (value.item() for value in fit(best))
    slopes = interval(fit(resampled)[0]).tolist()
    return Match(counts, similarity.mean(-1), best, interval(resampled), slope, intercept, slopes, r2)


class Study:
    """A configuration's model, its test prompts and the trajectories of all learners on them."""

    def __init__(self, config, clock):
        self.config, self.clock = config, clock
        self.ridge = config.noise**2  # under noise the best linear predictor is ridge regression with lambda = noise^2

    @functools.cached_property
    def model(self):
        with self.clock("training"):
            return train(self.config)

    @functools.cached_property
    def prompts(self):
        return fresh_prompts(self.config, self.config.prompts, seed=2)

    @functools.cached_property
    def learner(self):
        """The network as a learner: a function (xs, ys) -> trajectory of its layers."""
        model = self.model
        with self.clock("probing"):
            readouts = fit_readouts(model, *fresh_prompts(self.config, self.config.probes, seed=1))
            return functools.partial(layer_predictions, model, readouts=readouts)

    @functools.cached_property
    def layers(self):
        learner = self.learner
        with self.clock("probing"):
            return learner(*self.prompts)

    @functools.cached_property
    def newton(self):
        with self.clock("solvers"):
            return newton(*self.prompts, NEWTON_STEPS, ridge=self.ridge)

    @functools.cached_property
    def gd(self):
        with self.clock("solvers"):
            return gradient_descent(*self.prompts, GD_STEPS, ridge=self.ridge)

    @functools.cached_property
    def ols(self):
        with self.clock("solvers"):
            return ols(*self.prompts, ridge=self.ridge)

    @functools.cached_property
    def newton_match(self):
        return match_layers(self.layers, self.newton, NEWTON_STEPS, self.prompts[1])

    @functools.cached_property
    def gd_match(self):
        return match_layers(self.layers, self.gd, GD_STEPS, self.prompts[1], log2=True)

    @functools.cache
    def variant(self, **changes):
        """The study of a configuration with some settings changed; the same changes give the same study."""
        return Study(dataclasses.replace(self.config, **changes), self.clock)

    def error(self, trajectory):
        """Squared error over d of a trajectory on the test prompts: (steps, n+1)."""
        return squared_error(trajectory, self.prompts[1], self.config.d)


# %% [markdown]
# ## 9. The figures of Part I
#
# Each figure is one function of a study. It returns the picture, the numbers behind it, and the claims it tests.


# %%
@dataclasses.dataclass
class Claim:
    """One claim of a paper, and what this run measured. `holds` is decided by the rule that `claim` states."""

    where: str
    claim: str
    paper: str
    here: str
    holds: bool | None  # None: a question that the paper leaves open, and its answer


BLUE, VERMILLION, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#888888"  # Okabe and Ito's palette, safe for all eyes
COLOR = {"Transformer": VERMILLION, "Newton": BLUE, "GD": GREEN, "paper": GRAY, "OLS": "black", "OGD": "#CC79A7",
         "LSTM": "#E69F00", "CG": "#56B4E9", "Chebyshev": "#F0E442"}
STYLE = {"figure.dpi": 150, "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "legend.frameon": False,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "figure.constrained_layout.use": True, "lines.linewidth": 1.8, "lines.markersize": 4}
plt.rcParams.update(STYLE)

FIGURES = {}  # name -> function of a study, in the order in which they are made


def figure(function):
    """Register a function (study) -> (picture, numbers, claims) under its name."""
    FIGURES[function.__name__] = function
    return function


def shades(count):
    """`count` colours from dark to light, for an ordered family of curves."""
    return plt.get_cmap("viridis")(torch.linspace(0, 0.9, count).numpy())


@figure
def solvers(study):
    """Gradient descent and Newton alone: what is to be told apart. Needs no training."""
    d, n, picture = study.config.d, study.config.n, plt.figure(figsize=(8, 3.4))
    axes, numbers = picture.subplots(1, 2, sharey=True), {"gd_steps": GD_STEPS, "newton_steps": NEWTON_STEPS}
    for ax, kappa in zip(axes, (1.0, 100.0)):
        xs, ys = fresh_prompts(dataclasses.replace(study.config, kappa=kappa if d > 1 else 1.0), 512, seed=3)
        for name, steps, solver in (("GD", GD_STEPS, gradient_descent), ("Newton", NEWTON_STEPS, newton)):
            error = squared_error(solver(xs, ys, steps, ridge=study.ridge), ys, d)[:, n]
            numbers[f"{name.lower()}_error_kappa_{kappa:g}"] = error.tolist()
            ax.loglog(steps, error.clamp_min(1e-13), "o-", color=COLOR[name], label=name)
        floor = squared_error(ols(xs, ys, study.ridge), ys, d)[0, n].clamp_min(1e-13)
        ax.axhline(floor, color=COLOR["OLS"], linestyle=":", label="least squares (to float32 data)")
        ax.set(title=f"condition number {kappa:g}", xlabel="steps of the algorithm (log scale)")
    axes[0].set_ylabel(f"squared error / d after {n} examples")
    axes[0].legend()
    picture.suptitle("Newton needs a dozen steps where gradient descent needs hundreds, or many thousands")
    return picture, numbers, []


@figure
def convergence(study):
    """Fu, figure 2: squared error against layers, Newton's steps and gradient descent's steps."""
    config, picture = study.config, plt.figure(figsize=(10, 3.6))
    lengths = sorted({config.d - 1, config.d, (3 * config.d + 1) // 2, 2 * config.d, config.n} & set(range(1, config.n + 1)))
    panels = [("Transformer", "layers", range(config.layers + 1), study.layers),
              ("Newton", "steps", NEWTON_STEPS, study.newton), ("GD", "steps", GD_STEPS, study.gd)]
    numbers = {"prefix_lengths": lengths}
    for ax, (name, unit, steps, trajectory) in zip(picture.subplots(1, 3, sharey=True), panels):
        error = study.error(trajectory)
        numbers[name] = {"steps": list(steps), "error": error.tolist()}
        for t, color in zip(lengths, shades(len(lengths))):
            ax.semilogy(steps, error[:, t].clamp_min(1e-7), "o-", color=color, label=f"t = {t}")
        ax.set(title=f"{name}", xlabel=f"{unit} of {name}")
    ax.set(xscale="log", xlabel="steps of GD (log scale!)", ylim=(1e-7, 3))
    picture.axes[0].set_ylabel("squared error / d")
    ax.legend(title="after t examples", fontsize=8)
    picture.suptitle("Layer by layer, the Transformer's error falls as Newton's does; GD needs a log axis to be seen falling")
    return picture, numbers, []


def plot_similarity(ax, match, ylabel):
    """Heatmap of SimE, layers across and steps upwards; best matches as dots, their 95% intervals as bars."""
    L, K = match.similarity.shape
    image = ax.imshow(match.similarity.T, origin="lower", aspect="auto", cmap="cividis", vmin=0.5, vmax=1,
                      extent=(0.5, L + 0.5, -0.5, K - 0.5))
    rows = [torch.searchsorted(match.counts, x.contiguous()) for x in (match.best, *match.best_interval)]
    for layer, (best, low, high) in enumerate(zip(*rows), start=1):
        ax.plot([layer, layer], [low, high], color="white", linewidth=3, alpha=0.7, solid_capstyle="round")
        ax.plot(layer, best, "o", color=VERMILLION, markeredgecolor="white", markersize=7)
    ticks = range(0, K, 4)
    ax.set(xticks=range(1, L + 1), yticks=ticks, yticklabels=[f"{match.counts[i]:.0f}" for i in ticks])
    ax.set(xlabel="layer of the Transformer", ylabel=ylabel)
    ax.grid(False)
    return image


@figure
def heatmaps(study):
    """Fu, figures 3, 8 and 10: similarity of errors of layers against Newton's and gradient descent's steps."""
    picture = plt.figure(figsize=(9, 4))
    axes = picture.subplots(1, 2)
    plot_similarity(axes[0], study.newton_match, "steps of Newton")
    image = plot_similarity(axes[1], study.gd_match, "steps of GD (log scale)")
    picture.colorbar(image, ax=axes, label="similarity of errors", shrink=0.9)
    picture.suptitle("The ridge climbs straight on a linear axis of Newton steps, and on a logarithmic axis of GD steps")
    newton_match, gd_match = study.newton_match, study.gd_match
    numbers = {"newton_steps": NEWTON_STEPS, "newton_similarity": newton_match.similarity.tolist(),
               "gd_steps": GD_STEPS, "gd_similarity": gd_match.similarity.tolist()}
    ys = study.prompts[1]
    last = error_cosines(study.layers[-1:], torch.cat([study.ols, study.newton, study.gd]), ys)[0]  # (steps, prompts)
    split = 1 + len(NEWTON_STEPS)
    low, high = interval(bootstrap(last[0])).tolist()
    lead = bootstrap(last[1:split]).amax(-1) - bootstrap(last[split:]).amax(-1)
    low_lead, high_lead = interval(lead).tolist()
    numbers |= {"last_layer_to_ols": last[0].mean().item(), "last_layer_to_newton": last[1:split].mean(-1).max().item(),
                "last_layer_to_gd": last[split:].mean(-1).max().item()}
    return picture, numbers, [
        Claim("table 1", "the last layer makes the errors of Newton's limit, least squares: SimE >= .98", ".991",
              f"{numbers['last_layer_to_ols']:.3f} [{low:.3f}, {high:.3f}]", numbers["last_layer_to_ols"] >= 0.98),
        Claim("table 1", "it resembles Newton more than GD: SimE at the best step, interval of the difference above 0",
              ".991 vs .957", f"{numbers['last_layer_to_newton']:.4f} vs {numbers['last_layer_to_gd']:.4f}, "
              f"difference [{low_lead:.4f}, {high_lead:.4f}]", low_lead > 0),
    ]


@figure
def rates(study):
    """Fu, figure 3: best-matching steps against the layer. A line for Newton, a line on a log axis for GD."""
    picture = plt.figure(figsize=(9, 3.8))
    axes, numbers, claims = picture.subplots(1, 2), {}, []
    rows = [("Newton", study.newton_match, PAPER_NEWTON_STEPS, "steps", "2.93, R^2 .995"),
            ("GD", study.gd_match, PAPER_GD_STEPS, "doublings", "1.42, R^2 .993")]
    for ax, (name, match, paper, unit, paper_fit) in zip(axes, rows):
        layers = torch.arange(1, len(match.best) + 1)
        reach = (match.best_interval - match.best).abs()
        line = match.intercept + match.slope * layers[FIRST_LAYER - 1 :]
        fit = f"{match.slope:.2f} {unit} per layer [{match.slope_interval[0]:.2f}, {match.slope_interval[1]:.2f}]"
        ax.plot(range(1, 13), paper, "s--", color=COLOR["paper"], markersize=4, linewidth=1, label="Fu: d = 20, 12 layers")
        ax.plot(layers[FIRST_LAYER - 1 :], line if name == "Newton" else 2**line, color=COLOR[name], alpha=0.5, label=f"{fit}")
        ax.errorbar(layers, match.best, reach, fmt="o", color=COLOR[name], capsize=3, label="best match, 95% over prompts")
        ax.set(xlabel="layer of the Transformer", ylabel=f"best-matching step of {name}", title=f"{match.slope:.1f} {unit} of {name} per layer (R$^2$ = {match.r2:.3f})")
        ax.legend(fontsize=8)
        numbers[name] = {"layers": layers.tolist(), "best": match.best.tolist(), "interval": match.best_interval.tolist(),
                         "slope": match.slope, "slope_interval": match.slope_interval, "r2": match.r2, "paper": paper}
        shape = "grow linearly, as steps" if name == "Newton" else "grow exponentially, as log2 steps"
        claims.append(Claim("fig. 3, 8" if name == "Newton" else "fig. 3, 10",
                            f"best-matching {name} steps {shape} per layer with R^2 >= .95", paper_fit,
                            f"{match.slope:.2f} [{match.slope_interval[0]:.2f}, {match.slope_interval[1]:.2f}], R^2 {match.r2:.3f}",
                            match.r2 >= 0.95 and match.slope_interval[0] > 0))
    axes[1].set_yscale("log", base=2)
    picture.suptitle("What one layer is worth: a few steps of Newton, but a multiplication of the steps of GD")
    return picture, numbers, claims


@figure
def progression(study):
    """Fu, figure 7: squared error against the number of examples, layer by layer, beside the matching Newton steps."""
    config, match = study.config, study.newton_match
    picture, colors, t = plt.figure(figsize=(9, 3.8)), shades(config.layers), range(config.n + 1)
    layers, steps, least = study.error(study.layers), study.error(study.newton), study.error(study.ols)[0]
    best = [NEWTON_STEPS.index(int(k)) for k in match.best]
    axes = picture.subplots(1, 2, sharey=True)
    for l, k in enumerate(best, start=1):
        axes[0].semilogy(t, layers[l].clamp_min(1e-7), "o-", color=colors[l - 1], label=f"layer {l}")
        axes[1].semilogy(t, steps[k].clamp_min(1e-7), "o-", color=colors[l - 1], label=f"step {NEWTON_STEPS[k]}")
    for ax, title in zip(axes, ("layers of the Transformer", "best-matching steps of Newton")):
        ax.semilogy(t, least.clamp_min(1e-7), ":", color=COLOR["OLS"], label="least squares")
        ax.axvline(config.d, color=GRAY, linewidth=0.8)
        ax.set(xlabel="examples in the prompt, t", title=title, ylim=(1e-7, 3))
        ax.legend(fontsize=7, ncols=2)
    axes[0].set_ylabel("squared error / d")
    picture.suptitle("Each layer knows as much as its Newton step, however many examples there are")
    return picture, {"best_newton_steps": match.best.tolist(), "layers": layers.tolist(), "ols": least.tolist()}, []


# %% [markdown]
# # Part II. The rest of the evidence, and what the paper left open
#
# ## 10. More learners
#
# Each is one function that returns a trajectory; nothing else changes.
#
#     online GD            w <- w + x_i (y_i - w.x_i) / ||x_i||^2, one example at a time, once: the newest always fits
#     conjugate gradient   the best step possible with k products S v: exact after d steps. (BFGS, started from the
#                          identity with exact line search, makes the same steps on a quadratic: CG stands for both.)
#     Chebyshev            gradient descent with the best possible momentum: sqrt(kappa) steps in place of kappa


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
    energy = floor = b.square().sum(-1, keepdim=True)  # (prompts, n+1, 1)
    for k in range(counts[-1] + 1):
        if k > 0:
            S_direction = (S @ direction[..., None]).squeeze(-1)
            solved = energy <= 1e-28 * floor  # nothing left but rounding: stop there
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
# An LSTM is the paper's contrast: trained on the same prompts, just as deep as it likes, it should not have the means.


# %%
class LSTM(nn.Module):
    """A stack of LSTM layers on the same tokens, with the same interface as the Transformer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        sizes = [config.d] + [config.width] * config.layers
        self.stack = nn.ModuleList(nn.LSTM(i, o, batch_first=True) for i, o in zip(sizes, sizes[1:]))
        self.read_out = nn.Parameter(torch.zeros(config.width))

    def residual_streams(self, xs, ys):
        """The hidden states of all layers, (prompts, 2n+1, width) each; the tokens stand for layer 0."""
        h = interleave(xs, ys)
        streams = [F.pad(h, (0, self.config.width - self.config.d))]
        for layer in self.stack:
            h = layer(h)[0]
            streams.append(h)
        return streams

    forward = Transformer.forward
    states = Transformer.states


MODELS["lstm"] = LSTM


# %% [markdown]
# ## 11. The weights a layer has in mind
#
# A prediction is one number; the w behind it is d numbers. To see it, put T >> d other queries in the place of x_{t+1}
# and fit the w that explains the answers. R^2 of that fit tells whether there is such a w at all: whether the layer's
# answer is linear in the query. For any learner, as a black box.


# %%
def induced_weights(learner, xs, ys, queries=None):
    """The linear rule behind a learner's answers: weights (steps, prompts, n+1, d) and their R^2 (steps, n+1).

    `learner` maps (xs, ys) to a trajectory. `queries` (T, d), T > d, all follow the same t examples; default: 4d of
    standard normal. Entry [k, b, t] holds the least-squares weights (Fu, section 4.1).
    """
    (P, N, d), generator = xs.shape, torch.Generator().manual_seed(0)
    queries = torch.randn(4 * d, d, generator=generator) if queries is None else queries
    T, prefix = len(queries), torch.arange(N)
    asked = xs[:, None, None].repeat(1, N, T, 1, 1)  # (prompts, prefix t, query, position, d)
    asked[:, prefix, :, prefix] = queries.to(xs)  # position t of prefix t asks the query; what follows is not seen
    answered = ys[:, None, None].expand(P, N, T, N)
    answers = learner(asked.reshape(-1, N, d), answered.reshape(-1, N)).unflatten(1, (P, N, T))
    answers = answers[:, :, prefix, :, prefix].permute(1, 2, 0, 3)  # -> (steps, prompts, n+1, T)
    weights = answers @ torch.linalg.pinv(queries.double()).mT
    missed = (answers - weights @ queries.double().mT).square().sum((1, 3))
    return weights, 1 - missed / answers.square().sum((1, 3)).clamp_min(TINY)


def similarity_of_weights(weights_a, weights_b):
    """SimW, the mean cosine over prompts and prefixes t = 1..n of induced weights: (len_a, len_b) (Fu, section 4.1)."""
    a, b = (F.normalize(w[:, :, 1:], dim=-1) for w in (weights_a, weights_b))
    return torch.einsum("aptd,bptd->ab", a, b) / a[0, :, :, 0].numel()


def spectral_filter(weights, xs, ys, edges, prefixes=None, ridge=0.0):
    """How much of each eigendirection of S a learner has recovered: (steps, bins); 0 nothing, 1 all of it.

    In the bin of eigenvalues between two `edges` (bins+1,), the slope of (u.w) on (u.w_ols) over all prompts, prefixes
    and unit eigenvectors u. `weights` (steps, prompts, n+1, d) as from induced_weights; `prefixes`, the lengths that
    count, defaults to all. For Newton the filter is 1 - (1 - alpha lambda^2)^(2^k), for GD 1 - (1 - eta lambda)^k.
    """
    prefixes = range(1, xs.shape[1]) if prefixes is None else prefixes
    S, b = (z[:, prefixes] for z in prefix_moments(xs, ys, ridge))
    weights = weights[:, :, prefixes]
    eigenvalues, U = torch.linalg.eigh(S)
    found = (weights[..., None, :] @ U).squeeze(-2)  # (steps, prompts, n+1, d) in the eigenbasis
    target = (b[..., None, :] @ U).squeeze(-2) / eigenvalues.clamp_min(TINY)
    bins = (torch.bucketize(eigenvalues, edges.double()) - 1).flatten()
    inside = (bins >= 0) & (bins < len(edges) - 1)

    def total(values):  # (steps, ...) -> (steps, bins)
        values = values.flatten(1)[:, inside]
        return values.new_zeros(len(values), len(edges) - 1).index_add_(1, bins[inside], values)

    return total(found * target) / total(target.square()[None]).clamp_min(TINY)


# %% [markdown]
# ## 12. The figures of Part II


# %%
def ill_conditioned(study):
    """The same study on prompts with condition number 100: a second model (Fu, section 4.3)."""
    return study.variant(kappa=100.0)


@figure
def convergence_ill(study):
    """Fu, figure 15: convergence on ill-conditioned prompts."""
    return convergence(ill_conditioned(study))


@figure
def heatmaps_ill(study):
    """Fu, figure 16: similarity of errors on ill-conditioned prompts."""
    picture, numbers, _ = heatmaps(ill_conditioned(study))
    return picture, numbers, []


@figure
def rates_ill(study):
    """Fu, figures 4 and 17: best-matching steps on ill-conditioned prompts, against the isotropic model's."""
    ill = ill_conditioned(study)
    picture, numbers, _ = rates(ill)
    (newton_1, newton_100), (gd_1, gd_100) = (
        [s.newton_match.best[-1].item() for s in (study, ill)], [s.gd_match.best[-1].item() for s in (study, ill)])
    low, high = (s.gd_match.best_interval[:, -1].tolist() for s in (study, ill))
    return picture, numbers, [
        Claim("fig. 4", "ill-conditioned: the last layer matches at most 1.5 times as many Newton steps as isotropic", "21 vs 21",
              f"{newton_100:.0f} vs {newton_1:.0f}", newton_100 <= 1.5 * newton_1),
        Claim("fig. 4, 16", "ill-conditioned: it matches many times (at least 4 x) more GD steps than isotropic", "> 2,000",
              f"{gd_100:.0f} [{high[0]:.0f}, {high[1]:.0f}] vs {gd_1:.0f} [{low[0]:.0f}, {low[1]:.0f}]", gd_100 >= 4 * gd_1),
    ]


def forgetting_error(learner, xs, ys):
    """Squared error / d of a learner's last answer on x_i, i = 1..n, asked again after n examples: (n,)."""
    (P, N, d), n = xs.shape, xs.shape[1] - 1
    asked = xs[:, None].repeat(1, n, 1, 1)  # (prompts, i, position, d)
    asked[:, :, n] = xs[:, :n]
    answers = learner(asked.flatten(0, 1), ys[:, None].expand(P, n, N).flatten(0, 1))[-1, :, -1].unflatten(0, (P, n))
    return (answers - ys[:, :n]).square().mean(0) / d


@figure
def lstm(study):
    """Fu, figures 5 and 7c, table 1: an LSTM's layers do not improve; it resembles online GD, and it forgets."""
    recurrent = study.variant(model="lstm", layers=3, heads=1)
    xs, ys = study.prompts
    picture, n = plt.figure(figsize=(11, 3.6)), study.config.n
    axes = picture.subplots(1, 3)
    numbers = {"similarity": {}}
    for name, s in (("Transformer", study), ("LSTM", recurrent)):
        error = s.error(s.layers)[1:, n]
        numbers[f"error_{name}"] = error.tolist()
        axes[0].semilogy(range(1, len(error) + 1), error, "o-", color=COLOR[name], label=name)
        forgotten = forgetting_error(s.learner, xs[:128], ys[:128]).flip(0)
        numbers[f"forgetting_{name}"] = forgotten.tolist()
        axes[2].semilogy(range(1, n + 1), forgotten.clamp_min(1e-7), "o-", color=COLOR[name], label=name)
    others = {"Newton": study.newton, "GD": study.gd, "OGD": online_gradient_descent(xs, ys)}
    forgotten = forgetting_error(online_gradient_descent, xs[:128], ys[:128]).flip(0)
    axes[2].semilogy(range(1, n + 1), forgotten.clamp_min(1e-7), "o-", color=COLOR["OGD"], label="OGD")
    for i, (name, s) in enumerate((("Transformer", study), ("LSTM", recurrent))):
        row = {other: similarity_of_errors(s.layers[-1:], t, ys).max().item() for other, t in others.items()}
        numbers["similarity"][name] = row
        axes[1].bar([x + 0.4 * i for x in range(3)], row.values(), width=0.38, color=COLOR[name], label=name)
    axes[0].set(title="error by layer", xlabel="layer", ylabel=f"squared error / d after {n} examples")
    axes[1].set(title="similarity of errors, last layer", xticks=[0.2, 1.2, 2.2], xticklabels=list(others), ylim=(0.5, 1))
    axes[2].set(title="asked again about an old example", xlabel="examples ago", ylabel="squared error / d")
    axes[0].legend()
    axes[2].legend()
    picture.suptitle("An LSTM's layers do not converge: it works like online gradient descent, and it forgets")
    sim, gains = numbers["similarity"], numbers["error_LSTM"]
    return picture, numbers, [
        Claim("fig. 7c", "an LSTM's layers do not improve: its last error is above 1/4 of its first layer's", "plot",
              f"{gains[0]:.2f} -> {gains[-1]:.2f}", gains[-1] > gains[0] / 4),
        Claim("table 1", "an LSTM resembles OGD more than Newton or GD", ".954 vs .920, .916",
              f"{sim['LSTM']['OGD']:.3f} vs {sim['LSTM']['Newton']:.3f}, {sim['LSTM']['GD']:.3f}",
              sim["LSTM"]["OGD"] > max(sim["LSTM"]["Newton"], sim["LSTM"]["GD"])),
        Claim("table 1", "a Transformer resembles Newton more than OGD", ".991 vs .806",
              f"{sim['Transformer']['Newton']:.3f} vs {sim['Transformer']['OGD']:.3f}",
              sim["Transformer"]["Newton"] > sim["Transformer"]["OGD"]),
    ]


@functools.cache
def study_weights(study):
    """Induced weights and R^2 of the network's layers, Newton and GD on a few prompts: name -> (weights, r2), prompts."""
    config = study.config
    few = min(config.prompts, max(8, 60_000 // (4 * config.d * (config.n + 1))))
    xs, ys = (z[:few] for z in study.prompts)
    learners = {"Transformer": study.learner,
                "Newton": functools.partial(newton, steps=NEWTON_STEPS, ridge=study.ridge),
                "GD": functools.partial(gradient_descent, steps=GD_STEPS, ridge=study.ridge)}
    with study.clock("induced weights"):
        return {name: induced_weights(learner, xs, ys) for name, learner in learners.items()}, (xs, ys)


@figure
def weights(study):
    """Fu, figures 9, 13 and 27: similarity of induced weights; are answers linear in the query; the span test."""
    induced, (xs, ys) = study_weights(study)
    layers, r2 = induced["Transformer"]
    prefixes, L, d = range(1, study.config.n + 1), study.config.layers, study.config.d
    similarity = similarity_of_weights(layers, induced["Newton"][0])[1:]
    S, _ = prefix_moments(xs, ys)
    outside = torch.eye(d) - torch.linalg.pinv(S, hermitian=True, rtol=RANK_TOLERANCE) @ S  # projects off the span
    strayed = torch.einsum("ptij,kptj->kpti", outside, layers).square().mean((1, 3))  # (layers+1, n+1)
    picture = plt.figure(figsize=(11, 3.6))
    axes = picture.subplots(1, 3)
    image = axes[0].imshow(similarity.T, origin="lower", aspect="auto", cmap="cividis", vmin=0.5, vmax=1,
                           extent=(0.5, L + 0.5, -0.5, len(NEWTON_STEPS) - 0.5))
    best = best_match(similarity)
    axes[0].plot(range(1, L + 1), best, "o", color=VERMILLION, markeredgecolor="white", markersize=7)
    axes[0].set(title="similarity of induced weights", xlabel="layer", ylabel="steps of Newton")
    axes[0].grid(False)
    picture.colorbar(image, ax=axes[0])
    for layer, color in zip(range(FIRST_LAYER, L + 1), shades(L - FIRST_LAYER + 1)):
        axes[1].plot(prefixes, r2[layer, 1:], "o-", color=color, label=f"layer {layer}")
        axes[2].semilogy(range(1, d), strayed[layer, 1:d], "o-", color=color)
    axes[1].set(title="is the answer linear in the query?", xlabel="examples in the prompt, t", ylabel="R$^2$ of the fit")
    axes[1].legend(fontsize=8)
    axes[2].set(title="how far do weights leave the span?", xlabel="examples in the prompt, t < d", ylabel="squared length off the span / d")
    slope, _, line_r2 = (v.item() for v in line_fit(torch.arange(FIRST_LAYER, L + 1.0), best[FIRST_LAYER - 1 :].float()))
    last_off, last_linear = strayed[-1, 1:d].mean().item(), r2[:, 1:].mean(-1).tolist()
    picture.suptitle("Behind the answers stands a linear rule, and it climbs Newton's steps too")
    numbers = {"similarity_of_weights": similarity.tolist(), "best_newton_steps": best.tolist(), "slope": slope, "r2": line_r2,
               "linear_in_query_r2": r2.tolist(), "off_span": strayed.tolist()}
    return picture, numbers, [
        Claim("fig. 9", "the same trend with similarity of weights: linear in the layer with R^2 >= .95", "plot",
              f"{slope:.2f} steps per layer, R^2 {line_r2:.3f}", line_r2 >= 0.95),
        Claim("fig. 27", "induced weights lie in the span of the examples for t < d: mean square off it below 1e-3",
              "MSE < 1.2e-4", f"{last_off:.1e}", last_off < 1e-3),
        Claim("open", "is the answer linear in the query? R^2, layer 3 to the last", "not asked",
              " ".join(f"{x:.3f}" for x in last_linear[FIRST_LAYER:]), None),
    ]


@figure
def filters(study):
    """New: how much of each eigendirection of S each layer has recovered, beside Newton's and GD's steps."""
    induced, (xs, ys) = study_weights(study)
    layers, steps, descent = (induced[name][0] for name in ("Transformer", "Newton", "GD"))
    picture, numbers = plt.figure(figsize=(11, 3.8)), {}
    S, _ = prefix_moments(xs, ys)
    eigenvalues = torch.linalg.eigvalsh(S)
    edges = torch.quantile(eigenvalues[eigenvalues > 1e-6], torch.linspace(0.02, 1, 13, dtype=torch.float64))
    centers = (edges[1:] * edges[:-1]).sqrt()
    chosen = sorted(set(range(FIRST_LAYER, study.config.layers + 1)))
    best = lambda match, counts: [counts.index(int(k)) for k in match.best[FIRST_LAYER - 1 :]]
    panels = [("Transformer", layers, chosen, "layer {}", chosen),
              ("Newton", steps, best(study.newton_match, NEWTON_STEPS), "step {}", NEWTON_STEPS),
              ("GD", descent, best(study.gd_match, GD_STEPS), "step {}", GD_STEPS)]
    for ax, (name, weights, rows, label, counts) in zip(picture.subplots(1, 3, sharey=True), panels):
        curves = spectral_filter(weights, xs, ys, edges, ridge=study.ridge)
        numbers[name] = curves.tolist()
        for color, row in zip(shades(len(rows)), rows):
            ax.semilogx(centers, curves[row], "o-", color=color, label=label.format(row if name == "Transformer" else counts[row]))
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(title=name, xlabel="eigenvalue of S", ylim=(-0.1, 1.25))
        ax.legend(fontsize=8)
    picture.axes[0].set_ylabel("recovered share of the solution")
    numbers["eigenvalue_edges"] = edges.tolist()
    overshoot = max(max(row) for row in numbers["Transformer"][FIRST_LAYER:])
    picture.suptitle(f"Newton and GD approach 1 from below. The trained layers overshoot: up to {overshoot:.2f}")
    return picture, numbers, []


def negative_distance(traj_a, traj_b, ys):
    """Minus the mean squared distance of predictions over t = 1..n: (len_a, len_b, prompts); a rival of the cosine."""
    a, b = (trajectory.double()[..., 1:] for trajectory in (traj_a, traj_b))
    return -torch.cdist(a.transpose(0, 1), b.transpose(0, 1)).square().permute(1, 2, 0) / a.shape[-1]


def rivals(study):
    """What a layer may be worth in: name -> (trajectory, counts, log2 scale?, measure)."""
    xs, ys = study.prompts
    d, generator = study.config.d, torch.Generator().manual_seed(0)
    eta = 1 / torch.linalg.eigvalsh(prefix_moments(xs, ys)[0][:, -1])[:, -1].max().item()
    descent = functools.partial(gradient_descent, xs, ys, GD_STEPS, ridge=study.ridge)
    fixed = min((descent(lr=lr) for lr in (eta, 0.5 * eta, 0.25 * eta)), key=lambda t: study.error(t)[:, 1:].mean())
    start = torch.rand(d, generator=generator)  # uniform [0, 1)^d: off the span of the examples
    cg_steps = list(range(2 * d + 1))
    return {
        "Newton": (study.newton, NEWTON_STEPS, False, error_cosines),
        "CG": (conjugate_gradient(xs, ys, cg_steps, study.ridge), cg_steps, False, error_cosines),
        "Chebyshev": (chebyshev(xs, ys, GD_STEPS, study.ridge), GD_STEPS, True, error_cosines),
        "GD": (study.gd, GD_STEPS, True, error_cosines),
        "GD, one fixed step size": (fixed, GD_STEPS, True, error_cosines),
        "GD, start off the span": (descent(w0=start / math.sqrt(d)), GD_STEPS, True, error_cosines),
        "GD, start further off": (descent(w0=start), GD_STEPS, True, error_cosines),
        "Newton, L2 distance": (study.newton, NEWTON_STEPS, False, negative_distance),
        "GD, L2 distance": (study.gd, GD_STEPS, True, negative_distance),
    }


@figure
def worth(study):
    """What reviewers asked: does the rate depend on GD's step size, start or momentum, or on the measure?"""
    picture, numbers, ys = plt.figure(figsize=(9, 4)), {}, study.prompts[1]
    ax, reached = picture.subplots(1, 2, width_ratios=(1.2, 1))
    for name, (trajectory, counts, log2, measure) in rivals(study).items():
        match = match_layers(study.layers, trajectory, counts, ys, log2, measure)
        layers, base = range(1, len(match.best) + 1), name.split(",")[0]
        cap = similarity_of_errors(trajectory, study.newton, ys).max().item()
        numbers[name] = {"best": match.best.tolist(), "interval": match.best_interval.tolist(), "slope": match.slope,
                         "slope_interval": match.slope_interval, "r2": match.r2, "largest_similarity_to_newton": cap,
                         "unit": "doublings per layer" if log2 else "steps per layer"}
        if "L2" not in name:
            style = {"GD": "o-", "GD, one fixed step size": "s--", "GD, start off the span": "^:", "GD, start further off": "v:"}
            ax.plot(layers, match.best.clamp_min(1), style.get(name, "o-"), color=COLOR[base], label=name)
            reached.plot(layers, match.similarity.amax(1), style.get(name, "o-"), color=COLOR[base])
    ax.set(xlabel="layer", ylabel="best-matching step", title="steps needed to match a layer")
    ax.set_yscale("log", base=2)
    ax.legend(fontsize=8)
    reached.set(xlabel="layer", ylabel="similarity of errors at the best step", title="how well it matches")
    picture.suptitle("A layer is worth a fixed number of Newton steps, but ever more steps of every first-order method")
    return picture, numbers, [
        Claim("open", f"one layer is worth, in {row['unit'].split()[0]} of {name}", "not asked",
              f"{row['slope']:.2f} [{row['slope_interval'][0]:.2f}, {row['slope_interval'][1]:.2f}], R^2 {row['r2']:.3f}; "
              f"largest similarity to Newton {row['largest_similarity_to_newton']:.3f}", None)
        for name, row in numbers.items()
    ]


# %% [markdown]
# # Part III. Theory that runs
#
# ## 13. Newton's weights, written by hand (Fu, theorem 5.1)
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
    Returns heads, two of (Q (d, 2d+1), K (d, 2d+1), V (2d+1, 2d+1)), and mlp = (up (2d, 2d+1), down (2d+1, 2d)).
    """
    # Hint: V writes where it reads, through -1/2 of token_blocks; linear_heads gives the two heads. (4 lines)
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
# The figure of this chapter. Left: the layers lie on Newton's steps, unless the mask is causal. Right: what is left is
# rounding, and the printed order of query and key doubles it at every layer.


# %%
@figure
def by_hand(study):
    """Fu, theorem 5.1: hand-written weights against Newton; what one alpha, a causal mask and swapped Q, K cost."""
    d, n, ks = study.config.d, study.config.n, NEWTON_STEPS
    picture, numbers, worst = plt.figure(figsize=(10, 4)), {"steps": ks}, 0.0
    axes = picture.subplots(1, 2)
    count = max(4, min(64, 25_000 // n**2))  # few: each prefix is a sequence of its own
    xs, ys = (z[:count] for z in study.prompts)
    S, _ = prefix_moments(xs, ys)
    norms = torch.linalg.matrix_norm(S @ S)  # (prompts, n+1)
    alpha, limit = 1 / norms.max(), ols(xs, ys)[0, :, n]
    needed = [((newton(xs, ys, 48, a)[:, :, n] - limit).abs() > 1e-3).double().sum(0).mean() for a in (alpha, None)]
    numbers["extra_steps_of_one_alpha"] = cost = (needed[0] - needed[1]).item()
    numbers["log2_ratio_of_alphas"] = (norms.max() / norms[:, n]).log2().mean().item()
    for name, trajectory, look in (
        ("hand-written layers", construction(xs, ys, ks, alpha), dict(color=VERMILLION, linewidth=7, alpha=0.4)),
        ("Newton, the same alpha", newton(xs, ys, ks, alpha), dict(color=BLUE, marker="o")),
        ("Newton, alpha per prompt", newton(xs, ys, ks), dict(color=BLUE, linestyle=":")),
        ("hand-written, causal mask", construction(xs, ys, ks, alpha, causal=True), dict(color=GRAY)),
    ):
        error = [e for e in squared_error(trajectory, ys, d)[:, n].tolist() if math.isfinite(e)]
        numbers[name] = error
        axes[0].semilogy(range(len(error)), error, label=name, **look)
    axes[0].set(ylabel=f"squared error / d after {n} examples", ylim=(1e-16, 1e3),
                title=f"one alpha for all prompts costs {cost:.1f} steps")
    axes[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.1), handlelength=1.5)

    for kappa, color in ((1.0, VERMILLION), (100.0, "black")):
        xs, ys = fresh_prompts(dataclasses.replace(study.config, kappa=kappa if d > 1 else 1.0), count, seed=4)
        S, _ = prefix_moments(xs, ys)
        target = newton(xs, ys, ks, 1 / torch.linalg.matrix_norm(S @ S).max())
        for printed in (True, False):
            apart = (construction(xs, ys, ks, printed=printed) - target).abs().amax((1, 2))
            apart = apart / ys.square().mean().sqrt()
            numbers[f"disagreement_kappa_{kappa:g}{'_printed' * printed}"] = apart.tolist()
            label = f"{'query, key as printed' if printed else 'ours'}; condition number {kappa:g}"
            axes[1].semilogy(ks, apart.clamp_min(1e-17), ":" if printed else "-", color=color, label=label)
            worst = worst if printed else max(worst, apart.max().item())
    axes[1].set(ylabel="largest difference / size of y", ylim=(3e-17, 1e-2), title="difference from Newton: rounding")
    axes[1].legend(fontsize=8, loc="upper left")
    for ax in axes:
        ax.set_xlabel("k, Newton layers (steps of Newton)")
    picture.suptitle("Newton fits in k + 2 layers of hand-written attention, if every example sees all others")
    return picture, numbers, [
        Claim("theorem 5.1", "layers of width O(d) can make k steps of Newton: predictions within 1e-6",
              "k + 8 layers", f"k + 2 layers of width {2 * d + 1}: within {worst:.0e}, k <= {ks[-1]}", worst <= 1e-6),
    ]


# %% [markdown]
# ## 15. How softmax attention learns to look things up (Huang, Cheng and Liang, arXiv 2310.05249: "Huang")
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
# With all p_k = 1/K there are two phases: A_k grows to about log K, where one right feature outweighs K wrong ones, and
# the loss converges. With p_1 = 1/2, feature 1 is learned at once, but half of every other query's attention rests on
# it too. An under-represented feature has four phases: (I) B_{k,1} falls, (II) the lead passes to A_k, (III) A_k grows,
# (IV) convergence. The switch takes K^2 steps: early on, a_1 is about e^B and a_k about e^A / K, so that
# dB = -eta e^2B / 2K and dA = eta e^A / 2K^2. They are equal at t = 2/3 K^2 / eta, where B = -1/2 log K + 0.2. (That is
# for K without end. The corrections are of order 1/sqrt(K), and large at K = 16.)


# %%
def query_losses(Q, counts):
    """The loss 1/2 E_w (yhat - w.x_q)^2 of every feature as the query, averaged over prompts: Q (K, K) -> (K,).

    Of a prompt only `counts` (prompts, K) matters, how often each feature occurs: equal tokens get equal attention.
    """
    attention = (counts.log()[:, :, None] + Q).softmax(1)  # (prompts, n, k): a_n of query v_k; log 0 hides the absent
    return (attention - torch.eye(len(Q))).square().sum(1).mean(0) / 2


def train_attention(K, p_1, steps, *, eta=2.0, prompts=None, seed=1, until_switch=False):
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


# %%
SWITCH_SIZES = [8, 12, 16, 24, 32, 48, 64]  # K, the number of features


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
    K, seed, sizes = 16, study.config.seed, torch.tensor(SWITCH_SIZES, dtype=torch.float64)
    with study.clock("stages"):
        balanced, imbalanced = (train_attention(K, p_1, 3000, seed=seed) for p_1 in (1 / K, 1 / 2))
        paths = [train_attention(k, 1 / 2, 10**5, seed=seed, until_switch=True) for k in SWITCH_SIZES]
    p_k, N = 1 / 2 / (K - 1), 10 * K
    first, others = steps_above(0.1, imbalanced[:, 0], 1 / 2, N), steps_above(0.1, imbalanced[:, 1], p_k, N)
    # The last phase, convergence, begins when half of the loss is gone.
    halved, (early, switch, late) = steps_above(0.5, balanced[:, 1], 1 / K, N), lead_steps(imbalanced)
    starts = [early, late, steps_above(0.5, imbalanced[:, 1], p_k, N)]

    picture = plt.figure(figsize=(11, 5.2))
    axes = picture.subplot_mosaic([["a", "b", "when"], ["c", "d", "when"]])
    plot_phases(axes["a"], axes["c"], balanced, [halved], K)
    plot_phases(axes["b"], axes["d"], imbalanced, starts, K)
    axes["a"].set(title=f"balanced: all p = 1/{K}", ylabel="loss")
    axes["b"].set(title="imbalanced: p$_1$ = 1/2")
    axes["c"].set_ylabel("entries of Q, means over k > 1")
    axes["b"].legend(fontsize=8, loc="lower left")
    axes["c"].legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.88))
    times = {"the lead passes to A$_k$": [lead_steps(p)[1] for p in paths],
             "feature 1 converges": [steps_above(0.1, p[:, 0], 1 / 2, 10 * k) for k, p in zip(SWITCH_SIZES, paths)]}
    fits = []  # (exponent, its standard error); the residuals behind it are curvature more than noise
    for (name, steps), color in zip(times.items(), (VERMILLION, BLUE)):
        b, intercept, r2 = line_fit(sizes.log(), torch.tensor(steps).double().log())
        fits.append((b.item(), (b.abs() * ((1 / r2 - 1) / (len(sizes) - 2)).sqrt()).item()))
        axes["when"].loglog(sizes, steps, "o", color=color, label=f"{name}: K$^{{{b:.2f} ± {fits[-1][1]:.2f}}}$")
        axes["when"].loglog(sizes, (intercept + b * sizes.log()).exp(), color=color, alpha=0.5)
    axes["when"].loglog(sizes, sizes**2 / 3, ":", color=GRAY, label="2/3 K²/η, the limit of large K")
    axes["when"].set(title="when?", xlabel="features, K", ylabel="steps", xticks=SWITCH_SIZES, xticklabels=SWITCH_SIZES)
    axes["when"].minorticks_off()
    axes["when"].legend(fontsize=8)
    picture.suptitle("A dominant feature is learned at once; the others must first unlearn it: about K² steps")

    (b, error), (b_first, error_first) = fits
    numbers = {"path_columns": ["loss of feature 1", "loss of the others", "A_1", "A_k", "B_{k,1}"],
               "balanced": balanced[::10].tolist(), "imbalanced": imbalanced[::10].tolist(),
               "phases_begin": {"balanced": [halved], "imbalanced": starts}, "steps_to_a_tenth": [first, others],
               "K": SWITCH_SIZES, "switch_steps": list(times.values())[0], "feature_1_steps": list(times.values())[1],
               "exponents_and_errors": fits, "A_k_B_k1_at_switch": [p[lead_steps(p)[1], 3:].tolist() for p in paths]}
    return picture, numbers, [
        Claim("Huang", "the dominant feature converges first: steps to a tenth of its loss, against the others'",
              "first", f"{first} vs {others}, ratio {others / first:.0f}", first < others),
        Claim("Huang", "its time is nearly free of K: exponent below 0.25", "0", f"{b_first:.2f} +- {error_first:.2f}",
              abs(b_first) < 0.25),
        Claim("Huang", "balanced, A_k leads from the first step; imbalanced, phases II, III, IV begin in this order",
              "2 phases; 4", f"balanced II at {halved}; imbalanced {starts}, A_k {imbalanced[starts[2], 3]:.1f} at IV "
              f"(log K = {math.log(K):.1f}), B_k1 {imbalanced[switch, 4]:.2f} at the switch, step {switch} "
              f"(-1/2 log K = {-0.5 * math.log(K):.2f})",
              lead_steps(balanced)[1] == 0 and 0 < early < switch < late < starts[2]),
        Claim("Huang", "the lead switches after about K^2 steps: exponent within 0.25 of 2", "2",
              f"{b:.2f} +- {error:.2f}", abs(b - 2) <= 0.25),
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

QUESTIONS = [  # to be answered before running anything; each has its answer below
    "You raise --kappa from 1 to 100. How do the best-matching steps of the last layer change, Newton's and GD's? Why?",
    "What is the smallest squared error / d that any method can reach after t < d examples, on average, if kappa = 1? "
    "Which curve of the progression figure shows it?",
    "You train with 4 layers in place of 8 (--layers 4). What happens to the error after 2d examples, and to the number "
    "of Newton steps that one layer is worth?",
    "Halve alpha in Newton's start, and halve eta in gradient descent. How many more steps does each one need?",
    "Every layer of the Transformer makes errors as similar to the best GD step as to the best Newton step. Is that "
    "evidence that it runs gradient descent? What in the rates figure decides?",
    "Add noise 0.1 to y. Should the network converge to least squares? What is the best predictor now?",
]
# BEGIN SOLUTION
ANSWERS = [
    "Newton's hardly change: it needs O(log kappa) steps. GD's grow manyfold: it needs O(kappa). See rates_ill.",
    "1 - t/d: least squares knows w* only in the t directions it has seen. The dotted curve, least squares.",
    "The error rises by far more than twofold, since convergence is superlinear: the last layers do most. The matched "
    "steps per layer stay about the same or rise a little, but there are fewer layers to climb; run it and compare.",
    "Newton one more, since 2^k absorbs a factor 2 in one step; gradient descent twice as many.",
    "No. Similarity at the best step tells only that both move along the same path from 0 to least squares. The steps "
    "needed decide: they grow linearly for Newton and exponentially for GD, so GD's rate is not the network's.",
    "No: to ridge regression with lambda = 0.1^2, the mean of the posterior. All solvers here use S + lambda I then.",
]
# END SOLUTION


def write_homework(folder):
    """Write the student's version into a folder that does not exist yet or is empty, and LECTURERS.md beside it.

    Answers become `raise NotImplementedError("exercise 4: newton")`; what stands in the test file after the line
    "For lecturers" stays out. Raises ValueError if the folder has work in it.
    """
    folder, source = Path(folder), Path(__file__)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--homework: {folder} has work in it; nothing was written")
    numbers = {name: number for number, name, *_ in EXERCISES} | {"error_cosines": 8, "best_match": 8}
    lines, name, hidden = [], None, False
    for line in source.read_text().splitlines():
        if found := re.match(r"def (\w+)", line):
            name = found[1]
        if line.strip() == "# BEGIN SOLUTION":
            hidden = True
            if line != line.lstrip():
                lines.append(f'    raise NotImplementedError("exercise {numbers[name]}: {name}")')
        elif line.strip() == "# END SOLUTION":
            hidden = False
        elif not hidden:
            lines.append(line)
    header = "| exercise | function | idea | equation | minutes | difficulty | points | test |\n|" + "---|" * 8 + "\n"
    table = header + "".join(f"| {row[0]} | " + " | ".join(f"{x}" for x in row[1:]) + f" | pytest -k ex{row[0]:02} |\n"
                             for row in EXERCISES)
    questions = "".join(f"{i}. {question}\n" for i, question in enumerate(QUESTIONS, start=1))
    sheet = (f"# Which algorithm does a Transformer run?\n\nRead icl_newton.py from the top. Where it raises "
             f"NotImplementedError, write the answer: the docstring says what, a hint how. Then\n\n"
             f"    python -m pytest -k exercise     # all, with points\n    python -m pytest -k ex04         # one\n"
             f"    python icl_newton.py             # once all pass: the whole study\n\n{table}\n"
             f"## Predict before you run\n\n{questions}")
    answers = "".join(f"{i}. {q}\n\n   {a}\n\n" for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS), start=1))
    tests = source.with_name("test_icl_newton.py").read_text().split("# For lecturers")[0].rstrip("#- \n") + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("icl_newton.py", "\n".join(lines) + "\n"), ("test_icl_newton.py", tests), ("ASSIGNMENT.md", sheet)):
        (folder / name).write_text(text)
    lecturers = folder.with_name(folder.name + "-LECTURERS.md")
    lecturers.write_text(f"# For lecturers\n\n{table}\n## Questions, with answers\n\n{answers}")
    print(f"The assignment is in {folder}/, the answers to its questions in {lecturers}")


# %% [markdown]
# # The run
#
# The command line, the clock and the table at the end. Nothing to learn here.


# %%
class Clock:
    """Seconds per stage: `with clock("training"): ...`. Time spent in an inner stage is not counted in the outer."""

    def __init__(self):
        self.seconds, self.inner = {}, [0.0]

    @contextlib.contextmanager
    def __call__(self, stage):
        start = time.perf_counter()
        self.inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed - self.inner.pop()
            self.inner[-1] += elapsed


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake on the command line raises ValueError with one line."""

    def error(self, message):
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


def print_claims(claims):
    """The table at the end: every claim, the paper's number, ours with its spread, and whether they agree."""
    print("\nWhat the paper says, what this run measured (95% over prompts in brackets), and whether they agree:\n")
    for c in claims:
        verdict = {True: "agrees", False: "FAILS", None: "answer"}[c.holds]
        print(f"  {verdict:<8}{c.claim} ({c.where})\n{'':10}paper {c.paper};  here {c.here}")


def run(config):
    """Make the figures that the configuration asks for, write results.json, and print the table of claims."""
    clock, fast = Clock(), matmul_rate()
    names = list(FIGURES) if config.figures == "all" else config.figures.split(",")
    device = config.torch_device
    print(f"Will train a Transformer ({config.layers} layers, width {config.width}) on linear regression with d = {config.d}, "
          f"n = {config.n}, and draw {', '.join(names)} into {config.out}/")
    print(f"Device: {device}" + f", {torch.get_num_threads()} threads, {fast / 1e9:.0f} GFLOP/s in a large matrix product; "
          f"expect about {config.steps * flops_per_step(config) / (0.5 * fast) + 15:.0f} s" * (device.type == "cpu"))

    study, claims = Study(config, clock), []
    results = {"config": dataclasses.asdict(config), "figures": {}}
    for name in names:
        picture, numbers, tested = FIGURES[name](study)
        path = Path(config.out) / f"{name}.png"
        with clock("pictures"):
            save_atomically(functools.partial(picture.savefig, format="png"), path)
        print(f"  {path}: {picture.get_suptitle()}", flush=True)
        plt.close(picture)
        results["figures"][name] = numbers
        claims += tested

    results |= {"claims": [dataclasses.asdict(c) for c in claims], "seconds": clock.seconds,
                "peak_memory_bytes": peak_memory(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                "matrix_product_flops_per_second": fast}
    if "model" in vars(study):  # a figure asked for it
        seconds, error = study.model.training_seconds, study.error(study.layers)[-1]
        results |= {"training_seconds": seconds, "error_over_d_after_n_examples": error[config.n].item(),
                    "error_over_d_after_2d_examples": error[min(2 * config.d, config.n)].item(),
                    "training_flops_per_second": config.steps * flops_per_step(config) / seconds}
    text = json.dumps(results, indent=1)
    save_atomically(lambda path: path.write_text(text), Path(config.out) / "results.json")
    if claims:
        print_claims(claims)
    print(f"\nNumbers: {Path(config.out) / 'results.json'}. Seconds: "
          + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in clock.seconds.items()))


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
    try:
        run(config)
    except NotImplementedError as error:  # a student's version
        print(f"icl_newton: still to be written: {error}", file=sys.stderr)
        return 1
    except FloatingPointError as error:
        print(f"icl_newton: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nicl_newton: stopped; the same command continues from the last checkpoint in {config.checkpoints}/",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
