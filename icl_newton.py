# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "torch==2.13.0", "matplotlib"]
# ///
"""
By which algorithm does a Transformer solve a regression that it has never seen?

Show a Transformer some examples of a hidden linear rule, x_1, y_1, x_2, y_2, ..., and ask it
for the answer to one more x. If it was trained on many such prompts, each with a rule of its
own, it answers well. It solves a new regression problem in a single forward pass, so there
must be an algorithm in its weights.

Fu, Chen, Jia and Sharan (arXiv 2310.17086, "Fu" from here on) looked at the answer that each
layer would give. From layer to layer, they say, the answers improve as those of *Iterative
Newton* do from step to step, exponentially faster than those of gradient descent. This file
trains such a network, repeats their measurement, and then looks inside.

    python icl_newton.py                   all figures and a table of claims, in minutes
    python icl_newton.py --preset quick    a first look, in one minute; --help lists the rest

One idea carries the file: **every learner is a trajectory of predictions**. The steps of
gradient descent, the steps of Newton and the layers of a network each give an answer. So one
ruler can measure them all.

    Part I      The claim                     prompts, two methods, the network, its layers
    Part II     Could it have said no?        rivals, a look inside, and what we found
    Part III    Theory that runs              weights by hand; linear and softmax attention
    Part IV     Machinery                     settings, Muon, files, drawing, command line

What differs from Fu: 8 layers of width 64 with 2 heads, not 12 of width 256 with 8; the
optimizer Muon, not Adam; 1/lambda_max, not .01, as the step size of gradient descent; SiLU, not
GELU; positions that start as sinusoids; queries and keys that are normalized; no biases; and a
loss in which small errors count (section 5).

Notation, after Fu:
    d, n          dimension of x; number of examples in a prompt. x_{n+1} is the last query.
    t             number of examples seen so far, from 0 to n
    x_q           the query, x_{t+1}: its answer is asked for
    w*, w         the hidden rule of a prompt, y = w*.x; and a learner's estimate of it
    X, y          the examples seen so far: t rows x_i, and their t answers
    S, b          X^T X = sum of x_i x_i^T, (d, d); and X^T y = sum of y_i x_i, (d)
    lambda, u     an eigenvalue of S and its eigenvector; lambda_max is the largest
    eta, m        step size of gradient descent; number of its steps
    M_k           Newton's guess of the inverse of S after k steps
    R_k           I - S M_k, what this guess still misses
    alpha         Fu's Newton starts from M_0 = alpha S
    Sigma, kappa  covariance of x, and its condition number (1: all directions alike)
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
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial.chebyshev import chebvander
from torch import nn

# %% Part I. The claim
# %% 1. A prompt (Fu, section 3)
# Here is a prompt of n = 3 examples in d = 2 dimensions. Its hidden rule is w* = (2, -1).
#
#     x_1 = ( 1, 0)   y_1 =  2
#     x_2 = ( 0, 1)   y_2 = -1
#     x_3 = ( 1, 1)   y_3 =  1
#     x_4 = (-1, 2)   y_4 =  ?        The answer is -4.
#
# Every prompt draws a new rule, w* ~ N(0, I). So nothing can be memorized: whoever predicts
# y_4 has to work it out from the examples in front of it.


def sample_prompts(prompts, n, d, kappa=1.0, noise=0.0, generator=None):
    """Random prompts: xs (prompts, n+1, d) and their answers ys (prompts, n+1), float32.

    x_i ~ N(0, Sigma), w* ~ N(0, I), and y_i = w*.x_i + noise * N(0, 1). If kappa is 1, Sigma
    is the identity. Else each prompt has a Sigma of its own, of trace d, in a uniformly random
    basis: d//2 of its eigenvalues are kappa times the others (Fu, section 4.3). All random
    numbers come from the generator."""
    xs = torch.randn(prompts, n + 1, d, generator=generator)
    if kappa != 1:
        eigenvalues = torch.where(torch.arange(d) < d // 2, kappa, 1.0)
        scales = (eigenvalues / eigenvalues.mean()).sqrt()
        directions = torch.randn(prompts, d, d, generator=generator)
        basis = torch.linalg.qr(directions).Q
        xs = (xs * scales) @ basis.mT
    w_star = torch.randn(prompts, d, 1, generator=generator)
    ys = (xs @ w_star).squeeze(-1)
    return xs, ys + noise * torch.randn(prompts, n + 1, generator=generator)


# Random numbers for different purposes are never the same numbers.
PURPOSES = "weights training tuning readouts comparison polynomials probes random-y copies".split()


def random_numbers(config, purpose):
    """A random generator for one purpose of one seed."""
    seed = 100 * config.seed + PURPOSES.index(purpose)
    return torch.Generator().manual_seed(seed)


def fresh_prompts(config, count, purpose):
    """Prompts that the training never sees: xs (count, n+1, d), ys (count, n+1)."""
    generator = random_numbers(config, purpose)
    return sample_prompts(
        count, config.n, config.d, config.kappa, config.noise, generator
    )


# %% 2. Least squares, and gradient descent (Fu, section 3.1)
# A prompt asks n+1 questions: what is y_{t+1}, after the first t examples? The methods see
# these examples only through the matrix S and the vector b. Without noise, S w* = b.


def prefix_moments(xs, ys, ridge=0.0):
    """S + ridge I (prompts, n+1, d, d) and b (prompts, n+1, d) after t = 0, ..., n examples.

    In float64, like all methods here. If y has noise of variance s^2, then the mean of all w*
    that the examples allow solves (S + s^2 I) w = b. So for noisy prompts ridge is s^2."""
    # Shifted by one: whoever predicts y_{t+1} may see the examples 1 to t, not the answer.
    seen_xs = F.pad(xs.double(), (0, 0, 1, -1))
    seen_ys = F.pad(ys.double(), (1, -1))
    S = (seen_xs[..., :, None] * seen_xs[..., None, :]).cumsum(1)
    b = (seen_ys[..., None] * seen_xs).cumsum(1)
    return S + ridge * torch.eye(xs.shape[-1]).to(S), b


def times(matrices, vectors):
    """Matrix times vector, for many pairs at once: (..., a, d), (..., d) -> (..., a)."""
    return (matrices @ vectors[..., None]).squeeze(-1)


def least_squares(S, b):
    """The w of least squared error on the examples, (..., d).

    While t < d, many w have no error at all; this is the shortest of them."""
    inverse = torch.linalg.pinv(S, hermitian=True, rtol=1e-12)
    return times(inverse, b)


TINY = 1e-30  # keeps zeros out of divisions and logarithms


def largest_eigenvalue(S):
    """lambda_max of each matrix, (..., d, d) -> (...). Of a matrix of zeros: TINY."""
    return torch.linalg.eigvalsh(S)[..., -1].clamp_min(TINY)


# Gradient descent walks down the squared error |X w - y|^2 / 2. Its gradient is S w - b.


def gradient_descent(S, b, steps):
    """w <- w - eta (S w - b) from w = 0, with eta = 1/lambda_max(S).

    S (..., d, d), b (..., d). Returns w after 0, 1, ..., steps: (steps+1, ..., d)."""
    eta = 1 / largest_eigenvalue(S)[..., None]
    weights = [torch.zeros_like(b)]
    for _ in range(steps):
        w = weights[-1]
        gradient = times(S, w) - b
        weights.append(w - eta * gradient)
    return torch.stack(weights)


# How fast is it? An example: S = diag(1, 1/4) and w* = (1, 1), so b = (1, 1/4) and eta = 1.
#
#     steps                          0      1      2      3      4
#     first coordinate of w          0      1      1      1      1
#     second coordinate of w         0   .250   .438   .578   .684
#     missing in the second          1   .750   .562   .422   .316     = (3/4)^steps
#
# In general, put b = S w* into the update, and subtract w* on both sides:
#
#     w_{m+1} - w*  =  (w_m - w*) - eta S (w_m - w*)  =  (I - eta S) (w_m - w*).
#
# So along an eigenvector u of S with eigenvalue lambda, a step multiplies what is missing by
# 1 - eta lambda. At the start, w = 0, everything is missing. After m steps
#
#     share missing along u  =  (1 - eta lambda)^m.
#
# Directions of large lambda are found first. With eta = 1/lambda_max, a direction of lambda =
# lambda_max/10 has (9/10)^10 = .35 left after 10 steps; one of lambda_max/1000 has .37 left
# after 1,000. After m steps, gradient descent has reached down to about lambda_max/m.


# %% 3. Newton: the same path, another clock
# To solve S w = b, one may look for the inverse of S first. Newton's iteration improves a
# guess M of it with nothing but products: M <- 2M - M S M. Let us try it on a number. We
# invert s = 1/4, and our first guess is 1:
#
#     steps                          0      1      2      3      4      5
#     guess M                        1   1.75   2.73   3.60   3.96  3.9996
#     share found, s M            .250   .438   .684   .900   .990   .9999
#     missing, R = 1 - s M        .750   .562   .316   .100   .010   .0001
#
# Each R is the square of the one before. So in the end, the number of correct digits doubles
# with every step. With matrices, let R_k = I - S M_k be what is missing from the inverse:
#
#     R_{k+1}  =  I - S (2 M_k - M_k S M_k)  =  (I - S M_k)^2  =  R_k^2.
#
# So R_k is R_0 to the power 2^k. And w_k = M_k b = M_k S w*. If M_0 is a polynomial in S, then
# so is every M_k, and it commutes with S. This means w* - w_k = R_k w*: what is missing from the
# inverse is missing from w.
# (If t < d, then S has no inverse. All this holds within the span of the examples.)
#
# Now compare the two tables. Newton's shares found, .250, .438, .684, are those of gradient
# descent after 1, 2 and 4 steps! Indeed: start Newton from M_0 = I/lambda_max. Then R_0 has
# the eigenvalues 1 - lambda/lambda_max, and after k steps
#
#     share missing along u  =  (1 - lambda/lambda_max)^(2^k).
#
# That is gradient descent after m = 2^k steps. **The two walk the same path. The clock of
# gradient descent counts 1, 2, 3, 4, and Newton's counts 1, 2, 4, 8.** To reach down to
# lambda_max/1000, Newton takes 10 steps, not 1,000.


def newton(S, b, steps, start=None):
    """Iterative Newton: M <- 2M - M S M, and w_k = M_k b (Fu, section 3.1).

    S (..., d, d), b (..., d). `start` is M_0 (..., d, d), which must commute with S; without
    it, alpha S. Returns w_0, ..., w_steps: (steps+1, ..., d). Here step 0 is M_0 b, not 0."""
    M = newton_start(S) * S if start is None else start
    weights = [times(M, b)]
    for _ in range(steps):
        M = 2 * M - M @ S @ M  # not S @ M @ M, which lets rounding errors grow
        weights.append(times(M, b))
    return torch.stack(weights)


def gradient_descent_doubled(S, b, doublings):
    """Gradient descent after 1, 2, 4, ..., 2^doublings steps: (doublings+1, ..., d).

    The same w as gradient_descent's, but by `doublings` steps of Newton from I/lambda_max."""
    identity = torch.eye(S.shape[-1]).to(S)
    start = identity / largest_eigenvalue(S)[..., None, None]
    return newton(S, b, doublings, start)


# Fu start elsewhere, from M_0 = alpha S. Then R_0 is I - alpha S^2, and the share missing is
# (1 - alpha lambda^2)^(2^k). That is another path. Small eigenvalues enter squared, so they are
# found later. How far does each reach, with alpha = 1/lambda_max^2?
#
#     steps k                                     2       4       10         20
#     from I/lambda_max:  lambda_max / 2^k       1/4    1/16   1/1,000  1/1,000,000
#     from alpha S:       lambda_max / 2^(k/2)   1/2     1/4     1/32     1/1,000
#
# So to reach as far as twice the steps of gradient descent, it takes *two* steps from alpha S.


def newton_start(S):
    """A safe alpha for each S, to start Newton from alpha S: (..., d, d) -> (..., 1, 1).

    At most 1/lambda_max(S)^2, so that no eigenvalue of R_0 is negative; and not much less,
    since halving it costs up to a step. Finite even for S = 0."""
    # As in Fu's code. Their paper prints 2/lambda_max^2. There one eigenvalue of R_0 is -1,
    # and its squares are 1: it never shrinks.
    frobenius = torch.linalg.matrix_norm(S @ S, keepdim=True)
    return 1 / frobenius.clamp_min(TINY)


# Now the first picture. It needs no network: let S be diagonal, and w* all ones. Then the
# weights that a method finds are the shares that it has found. An experiment, here and later,
# returns the panels of its picture, and claims. The claims are its title.


class Panel(NamedTuple):
    """A part of a picture. For each learner it has a list of curves, one for each seed."""

    title: str
    xlabel: str
    ylabel: str
    curves: dict  # learner -> curves: y over 1, 2, 3, ..., or a pair (x, y)
    axes: dict = {}  # scales and limits


class Claim(NamedTuple):
    """A sentence that can be false: in each seed, `measured` is above (or below) the bar."""

    sentence: str
    measured: list  # a number for each seed
    relation: str  # ">" or "<"
    bar: object  # a number for each seed, or one for all


def share_on_path(ratio, p, N):
    """Share of w* found where lambda/lambda_max is `ratio`, on path p, when the clock says N.

    p is 1 for gradient descent, and for Newton from I/lambda_max; 2 for Newton from alpha S."""
    return 1 - (1 - ratio**p) ** N


def path_panels(on_one_path, on_another):
    """The two paths, share of w* found against lambda/lambda_max, with more curves on them."""
    ratio, doublings = torch.logspace(-3, 0, 61).double(), range(10)
    one_path = [(ratio, share_on_path(ratio, 1, 2.0**k)) for k in doublings]
    another = [(ratio, share_on_path(ratio, 2, 4.0**k)) for k in doublings]
    one_path, another = {"its path": one_path}, {"its path": another}
    labels = "lambda / lambda_max", "share of w* found"
    axes = dict(xscale="log", ylim=(-0.1, 1.4))
    first = "Path of gradient descent: after 1, 2, 4, ..., 512 steps"
    second = "Path of Newton from alpha S: after 0, 2, 4, ..., 18 steps"
    return [
        Panel(first, *labels, one_path | on_one_path, axes),
        Panel(second, *labels, another | on_another, axes),
    ]


def paths():
    """Gradient descent and Newton, from either start, on the paths that the formulas predict.

    Gradient descent after 1, 2, 4, ... steps; Newton from I/lambda_max after 0, 1, 2, ...; from
    alpha S after 0, 2, 4, ... steps."""
    ratio = torch.logspace(-3, 0, 31).double()
    S, doublings = torch.diag(ratio), range(10)
    one_by_one = gradient_descent(S, ratio, 512)[[2**k for k in doublings]]
    doubled = gradient_descent_doubled(S, ratio, 9)
    from_S = newton(S, ratio, 18, start=S)[::2]
    on_one_path = {
        "gradient descent": [(ratio, one_by_one[k]) for k in doublings],
        "Newton from I/lambda_max": [(ratio, doubled[k]) for k in doublings],
    }
    on_another = {"Newton from alpha S": [(ratio, from_S[k]) for k in doublings]}
    difference = float(abs(doubled - one_by_one).max())
    same = Claim(
        "Newton from I/lambda_max after k steps is gradient descent after 2^k (difference)",
        [difference],
        "<",
        1e-12,
    )
    return path_panels(on_one_path, on_another), [same]


# %% 4. The Transformer
# It reads the tokens x_1, y_1, x_2, y_2, ..., x_{n+1}, and at each x_{t+1} it predicts y_{t+1}.
# A token sees itself and the tokens to its left, so it never sees the answer. The prompt of
# section 1 has seven tokens:
#
#     x_1      y_1      x_2      y_2      x_3      y_3      x_4
#     (1, 0)   (2, 0)   (0, 1)   (-1, 0)  (1, 1)   (1, 0)   (-1, 2)


def interleave(xs, ys):
    """xs (prompts, n+1, d), ys (prompts, n+1) -> tokens x_1, y_1, ...: (prompts, 2n+1, d).

    Each y is padded with zeros: y, 0, ..., 0. The last y is left out (Fu, section 3)."""
    y_tokens = F.pad(ys[..., None], (0, xs.shape[-1] - 1))
    tokens = torch.stack([xs, y_tokens], dim=2).flatten(1, 2)
    return tokens[:, :-1]


# Attention compares the state of one token with that of another, and takes something of the other
# along. To answer, the query has to be compared with an x_i, and to take along its y_i. So x_i
# and y_i must stand in one token. They arrive in two: the token y_i has to copy x_i from the token
# to its left. (In the first two layers the answers do not improve, see section 7. We take it that
# the network copies then, but we did not look.)
#
# If each position had to learn the copy on its own, training would take long. But in a code of
# sines and cosines, "one to the left" is the same rotation at all positions. So positions start as
# such a code, and are then trained like all other weights.


def sinusoids(tokens, width):
    """A code for positions: sines and cosines of width/2 frequencies, (tokens, width)."""
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 2)
    angles = torch.arange(tokens)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def normalize(h):
    """The one normalization of this network: mean 0 and variance 1 over the last axis."""
    return F.layer_norm(h, h.shape[-1:])


class Transformer(nn.Module):
    """A decoder, much like GPT-2. The config gives its sizes and the seed of its first weights.

    Queries and keys are normalized, as the stream is; there are no biases and no trained gains;
    the MLP is twice as wide as the stream."""

    def __init__(self, config):
        super().__init__()
        layers, width, d = config.layers, config.width, config.d
        generator = random_numbers(config, "weights")
        draw = functools.partial(torch.randn, generator=generator)
        self.heads = config.heads
        self.read_in = nn.Parameter(draw(width, d) / d**0.5)
        self.positions = nn.Parameter(0.3 * sinusoids(2 * config.n + 1, width))
        self.read_out = nn.Parameter(torch.zeros(width))
        # Of each layer: Q, K, V, O of the attention; then "up" and "down" (transposed).
        # O and "down", which write into the stream, start half as large.
        sizes = torch.tensor([1, 1, 1, 0.5])[:, None, None] / (3 * width) ** 0.5
        self.attention = nn.Parameter(draw(layers, 4, width, width) * sizes)
        self.mlp = nn.Parameter(draw(layers, 2, 2 * width, width) * sizes[2:])

    def stream(self, xs, ys):
        """The residual stream (prompts, tokens, width): the embedding, then after each layer."""
        tokens = interleave(xs, ys).to(self.read_in.device)
        h = tokens @ self.read_in.mT
        h = h + self.positions[: tokens.shape[1]]
        yield h
        for attention, (up, down) in zip(self.attention, self.mlp):
            h = h + self.attend(normalize(h), attention)
            h = h + F.silu(normalize(h) @ up.mT) @ down
            yield h

    def attend(self, h, weights):
        """Causal attention: h (prompts, tokens, width); Q, K, V, O (4, width, width)."""
        Q, K, V, O = weights

        def split(z):
            """A part for each head: (prompts, heads, tokens, width / heads)."""
            return z.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        queries = normalize(split(h @ Q.mT))
        keys = normalize(split(h @ K.mT))
        values = split(h @ V.mT)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return mixed.transpose(1, 2).flatten(2) @ O.mT

    def forward(self, xs, ys):
        """Predictions of ys, (prompts, n+1). Entry t is made at the token x_{t+1}."""
        *_, last = self.stream(xs, ys)
        return normalize(last[:, ::2]) @ self.read_out

    @torch.no_grad()
    def states(self, xs, ys):
        """The normalized stream at the tokens x_1, ..., x_{n+1}, for probes; float64, CPU.

        With a constant 1 at its end: (layers+1, prompts, n+1, width+1)."""
        states = [normalize(h[:, ::2]) for h in self.stream(xs, ys)]
        return F.pad(torch.stack(states), (0, 1), value=1.0).double().cpu()


# %% 5. Training
# Every step draws new prompts. The loss takes the error of each prefix. After few examples
# that error is large, and nobody can avoid it; after many it can be a thousand times smaller,
# and only there does one see how well a network computes. So for each t we take the mean of
# |error|^1.5 over prompts, then its *root*, which lets small errors count, then the mean over t.
#
# The prompts start with 2 dimensions and 6 examples, and grow to d and n (a curriculum, after
# Garg et al., 2022), because training that starts at d = 20 does not get off the ground. Why
# the root works, and what the optimizers do, section 18 tells those who ask.


def training_prompts(config, step, generator):
    """The prompts of one training step: xs (batch, t+1, d), ys (batch, t+1), with t <= n."""
    d, n = config.d, config.n
    if config.curriculum:
        d = min(2 + step // config.curriculum, d)
    if d < config.d:
        n = min(2 * d + 2, n)
    xs, ys = sample_prompts(config.batch, n, d, config.kappa, config.noise, generator)
    return F.pad(xs, (0, config.d - d)), ys  # dimensions still to come are 0


def errors_and_gradients(model, xs, ys):
    """The errors (prompts, t+1), and the gradient of their loss for each parameter."""
    errors = model(xs, ys) - ys.to(model.read_in.device)
    means = errors.abs().clamp_min(TINY).pow(1.5).mean(0)
    loss = means.sqrt().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return errors.detach(), gradients


def training(config, model, optimizers, generator, first_step=0, map=map):
    """Train the model in place. After each step, yield its errors (batch, t+1).

    A batch goes in four quarters, each with a loss of its own, and their gradients are
    averaged. A `map` that does them side by side makes it faster, and changes no number."""
    of_a_quarter = functools.partial(errors_and_gradients, model)
    for step in range(first_step, config.steps):
        xs, ys = training_prompts(config, step, generator)
        quarters = map(of_a_quarter, xs.chunk(4), ys.chunk(4))
        errors, gradients = zip(*quarters)
        for parameter, four in zip(model.parameters(), zip(*gradients)):
            parameter.grad = sum(four) / 4

        # Step sizes rise over 100 steps, stay, and fall to 0 over the second half.
        rising = (step + 1) / 100
        falling = 2 * (1 - step / config.steps)
        for optimizer in optimizers:
            lr = optimizer.defaults["lr"]
            optimizer.param_groups[0]["lr"] = lr * min(rising, 1, falling)
            optimizer.step()
        yield torch.cat(errors)


# %% 6. Reading a layer (Fu, section 4.1)
# Only the last layer was trained to answer. What would the others say? Freeze the network. For
# each layer, look for the straight line from its state at x_{t+1} to the answer y_{t+1} that
# errs least. This is once more a regression: the states are its x's, with an S and a b of their
# own. (For the last layer, the line found is nearly the network's own read_out.)
#
# A line looks better than it is on the prompts on which it was fitted, all the more if it has
# many coefficients. So it is fitted on some prompts and judged on others.
#
# The result is a *learner*: a function that takes prompts and returns a trajectory of answers,
# (steps, prompts, n+1). The methods of sections 2 and 3 are learners, too.


def parts_of(xs, ys):
    """The prompts, 64 at a time: this keeps memory small."""
    return zip(xs.split(64), ys.split(64))


def layers_as_learner(network, xs, ys):
    """Fit the lines of all layers on these prompts, and return the layers as a learner.

    Its step 0 is the embedding, and its step l is layer l."""
    S, b = 0, 0  # sums over the parts
    for some_xs, some_ys in parts_of(xs, ys):
        H = network.states(some_xs, some_ys).flatten(1, 2)  # (layers+1, states, ...)
        S = S + H.mT @ H
        b = b + times(H.mT, some_ys.double().flatten())
    lines = least_squares(S, b)[:, None, :, None]
    return lambda xs, ys: (network.states(xs, ys) @ lines).squeeze(-1)


def method_as_learner(method, ridge=0.0):
    """The learner of a method that takes S and b and returns the w of all its steps."""

    def learner(xs, ys):
        """w.x_q, with the w of each step after t examples: (steps, prompts, n+1)."""
        weights = method(*prefix_moments(xs, ys, ridge))
        return (weights * xs.double()).sum(-1)

    return learner


def in_parts(function, xs, ys):
    """function(xs, ys) of a few prompts at a time, joined in axis 1."""
    return torch.cat([function(*part) for part in parts_of(xs, ys)], dim=1)


# %% 7. Which step is a layer like? (Fu, section 4.1)
# The methods and the layers of the network now answer the same prompts.

METHODS = {
    "Newton": lambda S, b: newton(S, b, 32),
    "gradient descent": lambda S, b: gradient_descent_doubled(S, b, 16),
    # See section 8. With step d it is exact, so it stops one before.
    "conjugate gradient": lambda S, b: conjugate_gradient(S, b, b.shape[-1] - 1),
    "least squares": lambda S, b: least_squares(S, b)[None],
}


class Study:
    """A trained network beside the methods, all on the same fresh prompts.

    xs (prompts, n+1, d), ys (prompts, n+1), and runs: {learner: its trajectory}."""

    def __init__(self, config, network):
        self.config, self.network = config, network
        fitting = fresh_prompts(config, 4 * config.prompts, "readouts")
        self.layers = layers_as_learner(network, *fitting)
        self.xs, self.ys = fresh_prompts(config, config.prompts, "comparison")
        self.runs = {"Transformer": in_parts(self.layers, self.xs, self.ys)}
        for name, method in METHODS.items():
            learner = method_as_learner(method, config.noise**2)
            self.runs[name] = in_parts(learner, self.xs, self.ys)

    def similarity(self, learner, method):
        """Of each step of a learner to each step of a method: (steps, steps)."""
        return similarity_of_errors(self.runs[learner], self.runs[method], self.ys)

    def error_curve(self, learner, t):
        """Mean squared error / d after t examples: numbers of steps, errors (steps,)."""
        miss = self.runs[learner][..., t] - self.ys[:, t]
        errors = miss.square().mean(1) / self.config.d
        steps = np.arange(len(errors))
        return 2**steps if learner == "gradient descent" else steps, errors

    def last_error(self, t):
        """The same of the network's last layer: a number."""
        _, errors = self.error_curve("Transformer", t)
        return float(errors[-1])


# Now the ruler. On a prompt, a learner makes n errors, one after each number of examples. That
# is a vector. Two learners are alike if their vectors point the same way, whatever their
# lengths. The step of Newton that is most alike is a layer's best match.
#
# First try the ruler on somebody known. Put Newton's steps 0, 2, 4, 6 in the place of the
# layers: their best matches must be 0, 2, 4, 6. (The tests try it on a dozen learners.)


def similarity_of_errors(trajectory_a, trajectory_b, ys):
    """Fu's SimE: the cosine of two learners' errors over t = 1..n, averaged over prompts.

    (A, prompts, n+1), (B, prompts, n+1), ys (prompts, n+1) -> (A, B): each step of one with
    each step of the other. Errors that are all zero score 0."""
    errors_a = (trajectory_a.double() - ys)[..., 1:]
    errors_b = (trajectory_b.double() - ys)[..., 1:]
    a, b = F.normalize(errors_a, dim=-1), F.normalize(errors_b, dim=-1)
    return torch.einsum("apt,bpt->ab", a, b) / len(ys)


def best_matches(study, learner, method):
    """The most similar step of a method for steps 1, 2, ... of a learner, as many as layers.

    Of gradient descent, with its 1, 2, 4, 8, ... steps, this is the number of doublings."""
    scores = study.similarity(learner, method)[1 : study.config.layers + 1]
    return scores.argmax(1).numpy()


# Fu's own Transformer, 12 layers of width 256: its best matches, from figures 8 and 10. They,
# too, compare 1, 2, 4, 8, ... steps of gradient descent. From layer 3 to 8, the slopes are 2.8 and
# 1.5; later they are lower, as its last layers have nothing left to do.
FU_NEWTON_STEPS = np.array("1 1 2 5 8 10 14 16 20 20 21 21".split(), int)
FU_DOUBLINGS = np.array("0 0 2 3 5 6 8 9 10 12 12 12".split(), int)

FIRST_LAYER = 3  # slopes begin here, as the first layers do not improve the answers yet


def slope(steps):
    """Steps for each further layer, from FIRST_LAYER on: slope of the least-squares line."""
    later = steps[FIRST_LAYER - 1 :]
    return float(np.polyfit(range(len(later)), later, 1)[0])


def rates(studies):
    """Fu, figures 3, 8, 10: the steps of Newton and of gradient descent that layers match."""
    newton_steps, doublings = {}, {}
    for learner in "Transformer", "conjugate gradient":
        newton_steps[learner] = [
            best_matches(one, learner, "Newton") for one in studies
        ]
        doublings[learner] = [
            best_matches(one, learner, "gradient descent") for one in studies
        ]
    per_layer = [slope(steps) for steps in newton_steps["Transformer"]]
    per_step = [slope(steps) for steps in newton_steps["conjugate gradient"]]
    doublings_per_layer = [slope(steps) for steps in doublings["Transformer"]]

    newton_steps["Fu's Transformer"] = [FU_NEWTON_STEPS]
    doublings["Fu's Transformer"] = [FU_DOUBLINGS]
    layers = np.arange(1, studies[0].config.layers + 1)
    doublings["twice the steps in each layer"] = [layers - 2]
    x, log_steps = "layer, or step", "log2 of its number of steps"
    panels = [
        Panel("Like which step of Newton (Fu's start)?", x, "step", newton_steps),
        Panel("Like which step of gradient descent?", x, log_steps, doublings),
    ]
    faster = Claim(
        "A layer gains more steps of Newton (Fu: 2.8) than a step of conjugate gradient does",
        per_layer,
        ">",
        per_step,
    )
    doubling = Claim(
        "Each layer about doubles the steps of gradient descent, or more (Fu: 1.5 doublings)",
        doublings_per_layer,
        ">",
        0.9,
    )
    return panels, [faster, doubling]


# %% What the picture of `rates` says
# From layer to layer the answers improve as by two or three steps of Newton, as in Fu's network
# (gray). Gradient descent would have to double its steps each time, and more. If the network
# ran gradient descent, one step in a layer, its curve on the right would be log2(1), log2(2),
# log2(3), ..., which soon lies flat. (Conjugate gradient is our control: see section 8.)
#
# But a match is not an identity. First, both panels show *one* fact, since Newton and gradient
# descent walk nearly one path. Second, how alike are a layer and its best match? Most of an
# error nobody can avoid, since t < d examples do not determine w*. So all decent learners are
# alike. Here is a control. A layer deviates a little from its best Newton step. Add to that step
# the deviations that the layer has *on another prompt*. If a high score meant that the layer does
# what Newton does on this very prompt, this shuffled learner would score worse. From layer 4 on it
# does not: the score says that the deviations are small, and nothing else.


# %% 7, continued. How alike?


def by_layer(rows, x, first):
    """A curve for each row, for layers from `first` on, in the form that a Panel takes."""
    return {f"layer {i}": [(x, row)] for i, row in enumerate(rows, first)}


def collect(of_seeds):
    """A list of {name: curve}, one for each seed -> {name: list of curves}."""
    return {name: [curves[name] for curves in of_seeds] for name in of_seeds[0]}


def unlike(study):
    """1 - similarity of each layer to the best step of a method, and to the shuffled control."""
    scores = {}
    for name in "Newton", "gradient descent", "least squares":
        similarity = study.similarity("Transformer", name)[1:]
        scores[name] = 1 - similarity.amax(1)
    best = study.runs["Newton"][best_matches(study, "Transformer", "Newton")]
    deviations = study.runs["Transformer"][1:] - best
    shuffled = best + deviations.roll(1, dims=1)  # those of the previous prompt
    control = similarity_of_errors(shuffled, best, study.ys)
    scores["shuffled deviations"] = 1 - control.diagonal()
    return scores


def similarity(studies):
    """Fu, figures 3, 8, 10: similarity of errors, and what the shuffled control scores."""
    to_newton = studies[0].similarity("Transformer", "Newton")
    hills = by_layer(to_newton[1:], range(to_newton.shape[1]), first=1)
    scores = collect([unlike(study) for study in studies])
    last = {name: np.mean([1 - score[-1] for score in scores[name]]) for name in scores}
    title = (
        f"Last layer: {last['Newton']:.3f} to Newton, "
        f"{last['gradient descent']:.3f} to descent"
    )
    return [
        Panel("To each step of Newton", "step of Newton", "similarity", hills),
        Panel(title, "layer", "1 - similarity", scores, dict(yscale="log")),
    ], []


# %% Part II. Could it have said no?
# %% 8. A rival: conjugate gradient
# Many methods are faster than gradient descent. Conjugate gradient (Hestenes and Stiefel,
# 1952) is the fastest of all that multiply a vector by S once in each step: after k steps no
# combination of b, S b, ..., S^(k-1) b has a smaller squared error on the examples. What it
# does as well as the network is no evidence for Newton.
#
# How? Let it go along a direction p to the lowest point of the error. The next direction is the
# new residual r' = b - S w, plus c times p, with c such that (r' + c p)^T S p = 0: then the step
# along it does not undo the one along p. The step has changed the residual by r - r' = step S p.
# And the residuals r, r' are at right angles, and so are r' and p. Therefore
#
#     r'^T S p = -|r'|^2 / step,    p^T S p = p^T r / step = |r|^2 / step,    c = |r'|^2 / |r|^2.
#
# (One can show that r' + c p does not undo the steps before that one, either.)


def conjugate_gradient(S, b, steps):
    """Conjugate gradient on S w = b, from w = 0: w after 0, ..., steps, (steps+1, ..., d)."""
    weights = [torch.zeros_like(b)]
    residual = direction = b
    size = first_size = b.square().sum(-1, keepdim=True)  # |residual|^2
    for _ in range(steps):
        S_direction = times(S, direction)
        curvature = (direction * S_direction).sum(-1, keepdim=True)
        is_rounding = size <= 1e-28 * first_size
        step_size = torch.where(is_rounding, 0.0, size / curvature)
        weights.append(weights[-1] + step_size * direction)
        residual = residual - step_size * S_direction
        new_size = residual.square().sum(-1, keepdim=True)
        direction = residual + new_size / size.clamp_min(TINY) * direction
        size = new_size
    return torch.stack(weights)


# %% What the rival says
# In `rates`, conjugate gradient starts faster than the network, and then it flattens: from
# step 3 on, a step is worth one of Newton's, a layer more than two. But at d = 5 a step is
# worth three, as it must find all in five. There one could not tell the two apart.


# %% 9. What has each layer found?
# So far we measured speed, from outside. But *which* directions does a layer find, and in which
# order? Take the first t = d examples. Along the eigenvectors u of S, the answer is a sum:
#
#     w*.x_q  =  sum over u of (w*.u) (u.x_q).
#
# A learner that has found the share f(lambda) along each u answers with the sum of f(lambda)
# (w*.u) (u.x_q). An example in two dimensions: let lambda/lambda_max be 1 and .1, and let the
# parts of the sum be 3 and -2. The answer is 1. Who has found all of the first direction, and
# .4 of the second, answers 3 - .8 = 2.2.
#
# Now turn this round. Take many prompts, and add up the parts in each bin of
# lambda/lambda_max. Regress the answers of a layer on these sums: the coefficients are the
# shares that it has found.


def spectrum(xs, ys, t):
    """The first t examples and the query x_{t+1}, along the eigenvectors of S; float64.

    Returns lambda / lambda_max (prompts, d), rising; the eigenvectors, in columns (prompts, d,
    d); the coordinates of the query, and of the w of least squares (prompts, d)."""
    X, y = xs[:, :t].double(), ys[:, :t].double()
    eigenvalues, U = torch.linalg.eigh(X.mT @ X)
    query = times(U.mT, xs[:, t].double())
    best = times(U.mT, times(X.mT, y)) / eigenvalues
    ratio = eigenvalues / eigenvalues[:, -1:]
    return ratio, U, query, best


def share_found(answers, ratio, parts, edges):
    """The share of w* that answers contain, for each bin of lambda/lambda_max (section 9).

    answers (steps, prompts); ratio, which is lambda/lambda_max, and parts, (w*.u)(u.x_q), are
    (prompts, d); edges of the bins (bins+1). Sums the parts of each prompt in each bin, and
    returns the coefficients of least squares of the answers on these sums: (steps, bins)."""
    bins = torch.bucketize(ratio, edges[1:-1])
    sums = torch.zeros(len(ratio), len(edges) - 1).double()
    sums.scatter_add_(1, bins, parts)
    coefficients = torch.linalg.pinv(sums) @ answers.double().mT
    return coefficients.mT


# The two paths of section 3 differ in the exponent p of lambda: 1 for gradient descent, and for
# Newton from I/lambda_max; 2 for Newton from alpha S. N is the clock. So look for the p and the
# N that come closest to the answers of a layer: p tells which path it walks.


def path_exponent(answers, ratio, parts):
    """The exponent p of the path closest to one step's answers, (prompts,): a number.

    nan if even the closest path explains less than half of the answers."""
    clocks = 2.0 ** torch.arange(-1, 18, 0.5).double()[:, None, None]
    distances = {}
    for p in np.arange(0.3, 3.05, 0.1).round(1):
        on_path = (share_on_path(ratio, p, clocks) * parts).sum(-1)  # (clocks, prompts)
        distances[p] = (on_path - answers).square().mean(1).min()
    p = min(distances, key=distances.get)
    is_path = distances[p] < answers.square().mean() / 2
    return float(p) if is_path else math.nan


def filters(studies):
    """What share of w* each layer has found after d examples, and on which path."""
    found, exponents = [], []
    edges = torch.logspace(-3, 0, 16).double()
    for study in studies:
        d = study.config.d
        ratio, _, query, best = spectrum(study.xs, study.ys, d)
        parts = query * best
        layers = study.runs["Transformer"][..., d]
        found.append(share_found(layers, ratio, parts, edges))
        later = layers[FIRST_LAYER:]
        exponents.append([path_exponent(answers, ratio, parts) for answers in later])

    middles = (edges[1:] * edges[:-1]).sqrt()
    of_layers = by_layer(found[0][FIRST_LAYER:], middles, FIRST_LAYER)
    numbers = range(FIRST_LAYER, studies[0].config.layers + 1)
    nearest = {"Transformer": [(numbers, p) for p in exponents]}
    for name, p in ("gradient descent", 1), ("Newton from alpha S", 2):
        nearest[name] = [(numbers, [p] * len(numbers))]
    panels = path_panels(of_layers, of_layers)
    axes = dict(ylim=(0, 2.5))
    panels.append(Panel("Exponent of the nearest path", "layer", "p", nearest, axes))
    one_path = Claim(
        "Layers are near the path of gradient descent, exponent 1; Fu's Newton has 2 (distance)",
        abs(torch.tensor(exponents, dtype=torch.float64).nanmean(1) - 1).tolist(),
        "<",
        0.5,
    )
    return panels, [one_path]


# %% 10. What does the stream hold?
# Gradient descent, as section 2 writes it, carries a w and improves it. Newton carries an M.
# Which of them is in the network? Look for it with a *probe*: on some prompts, find the linear
# map from the state at the query's token to a known vector that errs least; on *other*
# prompts, see what share of the vector's variance this map explains. 1 is all of it, and 0 is
# nothing.
#
# Which vectors? One can compute the answer x_q^T S^-1 b from either end. From the right: first
# w = S^-1 b, then w.x_q. From the left: first z = S^-1 x_q, and then z.b, which is the sum over
# examples of <z, x_i> y_i. That is an attention, with query z, keys x_i and values y_i! Take
# the prompt of section 1, where the query is x_4 = (-1, 2):
#
#     S = ( 2  1 )       z = S^-1 x_4 = (-4/3, 5/3)        example i          1      2      3
#         ( 1  2 )                                         <z, x_i>        -4/3    5/3    1/3
#                                                          <z, x_i> y_i    -8/3   -5/3    1/3
#
# The last line adds up to -4, as it should. No w was needed, and z is made of x's alone. So we
# look for w* and b, and for M_k x_q, Newton's guesses of z, with the M_k of both starts. A
# multiple of x_q itself is no news, so it is taken out beforehand.


def probe(states, targets, x_q):
    """What share of each target the states explain linearly, beyond the multiple of x_q in it.

    states (layers, prompts, width), targets (kinds, prompts, d), x_q (prompts, d). Fitted on
    three quarters of the prompts and judged on the last. (layers, kinds): 1 is all, 0 nothing."""
    multiples = (targets * x_q).sum((1, 2), keepdim=True) / x_q.square().sum()
    fit = len(x_q) * 3 // 4
    inverse = torch.linalg.pinv(states[:, :fit])
    shares = []
    for target in targets - multiples * x_q:
        maps = inverse @ target[:fit]
        miss = target[fit:] - states[:, fit:] @ maps
        unexplained = miss.square().sum((1, 2)) / target[fit:].square().sum()
        shares.append(1 - unexplained)
    return torch.stack(shares, dim=1)


def query_states(network, xs, ys, t):
    """The state at x_{t+1}, after t examples: (layers+1, prompts, width+1)."""

    def states(xs, ys):
        """Those of the last token."""
        return network.states(xs, ys)[:, :, -1]

    return in_parts(states, xs[:, : t + 1], ys[:, : t + 1])


def probe_targets(xs, ys, t):
    """What to look for at x_{t+1}, after t examples: {target: (kinds, prompts, d)}, float64.

    The kinds of M_k x_q are k = 1, 2, .... Also, for a control, x_q, S x_q and S^2 x_q side by
    side, (prompts, 3d)."""
    ratio, U, query, best = spectrum(xs, ys, t)
    # Along an eigenvector, M_k is the share found over lambda. With lambda_max as the unit:
    of_inverse = query / ratio
    M_x = [of_inverse * share_on_path(ratio, 1, 2.0**k) for k in range(1, 12)]
    from_S = [of_inverse * share_on_path(ratio, 2, 2.0**k) for k in range(1, 18)]
    targets = {
        "M_k x_q": M_x,
        "M_7 x_q": M_x[6:7],
        "M_k x_q, from alpha S": from_S,
        "whitened x_q": [query / (ratio + 0.01).sqrt()],
        "w*": [best],
        "b": [best * ratio],
    }
    powers = [times(U, query * ratio**power) for power in range(3)]
    targets = {name: times(U, torch.stack(z)) for name, z in targets.items()}
    return targets, torch.cat(powers, dim=-1)


def explained(network, xs, ys, t, targets):
    """Probes into the layers of a network at x_{t+1}: {target: (layers, kinds)}."""
    states, x_q = query_states(network, xs, ys, t)[1:], xs[:, t].double()
    shares = probe(states, torch.cat([*targets.values()]), x_q)
    numbers_of_kinds = [len(kinds) for kinds in targets.values()]
    return dict(zip(targets, shares.split(numbers_of_kinds, dim=1)))


def inside(studies):
    """Probes at the query: M_k x_q by layer and k; w* and b; controls (section 10)."""
    found = []
    for study in studies:
        config, t = study.config, study.config.d
        xs, ys = fresh_prompts(config, 4000, "probes")
        generator = random_numbers(config, "random-y")
        random_ys = t**0.5 * torch.randn(ys.shape, generator=generator)
        targets, powers = probe_targets(xs, ys, t)
        shares = explained(study.network, xs, ys, t, targets)

        # Controls, for one target: random y's, an untrained network, and a quadratic in S.
        M_7 = {"M_7 x_q": targets["M_7 x_q"]}
        with_random = explained(study.network, xs, random_ys, t, M_7)
        untrained = explained(Transformer(config), xs, ys, t, M_7)
        quadratic = probe(powers[None], M_7["M_7 x_q"], xs[:, t].double())
        shares["M_7 x_q, random y"] = with_random["M_7 x_q"]
        shares["M_7 x_q, untrained"] = untrained["M_7 x_q"]
        shares["M_7 x_q, by a quadratic in S"] = quadratic.expand(config.layers, 1)
        found.append(shares)

    best = collect(
        [{name: z.amax(1) for name, z in shares.items()} for shares in found]
    )
    inverse, remains = [], []
    for M_x, random in zip(best["M_7 x_q"], best["M_7 x_q, random y"]):
        layer = M_x.argmax()
        inverse.append(float(M_x[layer]))
        can_be_read = M_x[layer] > 0.1
        remains.append(float(random[layer] / M_x[layer]) if can_be_read else math.nan)
    by_quadratic = [float(z[0]) for z in best["M_7 x_q, by a quadratic in S"]]
    rule = [float(torch.cat(pair).max()) for pair in zip(best["w*"], best["b"])]

    hills = by_layer(found[0]["M_k x_q"], range(1, 12), first=1)
    relatives = "M_k x_q", "M_k x_q, from alpha S", "whitened x_q"
    of_relatives = {name: best.pop(name) for name in relatives}
    label, axes = "share explained, beyond x_q", dict(ylim=(-0.1, 1))
    panels = [
        Panel("M_k x_q, from I/lambda_max", "k, step of Newton", label, hills, axes),
        Panel("M_7 x_q, w* and b, and controls", "layer", label, best, axes),
        Panel("The best M_k x_q, and relatives", "layer", label, of_relatives, axes),
    ]
    return panels, [
        Claim(
            "In some layer M_7 x_q, a partial inverse applied to the query, can be read, "
            "better than a quadratic in S explains it (share)",
            inverse,
            ">",
            by_quadratic,
        ),
        Claim(
            "M_7 x_q is made of x's alone: with random y's it is there, too (part that remains)",
            remains,
            ">",
            0.9,
        ),
        Claim("In no layer can w* or b be read (share)", rule, "<", 0.1),
    ]


# %% What the probes say
# The network works from the left: a partial inverse is applied to the query, and no w appears. Up
# to about layer 6 the inverse reaches further from layer to layer, then it fades from the stream
# (perhaps as the answer takes its place). Section 14 writes down a network that works from the
# left, exactly.
#
# What the probe cannot tell. First, by which algorithm the inverse came about. Gradient
# descent, too, can work from the left: z <- z + eta (x_q - S z) holds M_k x_q after 2^k steps;
# and linear attention runs gradient descent without a w in any token (section 15). Second,
# which relative of M_k x_q it is: the whitened query, (S + .01 lambda_max I)^(-1/2) x_q, is
# read about as well, and so is the query as GD++ transforms it. S^-1 x_q itself is not: no
# layer reaches down to the smallest eigenvalues. Third, that w* is nowhere: we looked for
# linear maps, at the query. At d = 4, Akyurek et al. (arXiv 2211.15661) do recover w and X^T
# y, with nonlinear probes that pool over tokens.


# %% 11. The error that is noise
# After all n examples the last layer still errs. Has it not converged yet? Then it would err in
# the same way if the same problem were put differently. So change what should not matter: take
# the examples in another order, rotate all x's, flip the sign of all y's. Newton, gradient
# descent and conjugate gradient do not notice. Collect the answers on such copies of a prompt,
# and take their mean: the error that vanishes is what we call noise of the network. (Though
# nothing in it is random: the same copy gets the same answer.)


def averaged_errors(study, t, copies=8):
    """Squared error / d after t examples of the mean answer over such copies: (layers+1,).

    Two means over different copies are multiplied, not one squared. So noise that is left in
    them adds nothing on average, even with few copies."""
    generator = random_numbers(study.config, "copies")
    prompts, d = len(study.xs), study.config.d
    row = torch.arange(prompts)[:, None]
    errors = []
    for sign in [1, -1] * (copies // 2):
        order = torch.rand(prompts, t, generator=generator).argsort(1)
        order = F.pad(order, (0, 1), value=t)  # the query stays the last
        directions = torch.randn(prompts, d, d, generator=generator)
        rotation = torch.linalg.qr(directions).Q
        xs, ys = study.xs[row, order] @ rotation, sign * study.ys[row, order]
        answers = sign * in_parts(study.layers, xs, ys)[..., t]
        errors.append(answers - study.ys[:, t])
    half, other = torch.stack(errors).chunk(2)
    return (half.mean(0) * other.mean(0)).mean(1) / d


# %% 12. The best of all methods with fixed steps
# The last rival is a whole family. Let a method multiply by S once in each step, with step sizes
# (and a momentum, if it likes) that are fixed beforehand, in units of 1/lambda_max. For example,
# two steps of gradient descent with step sizes p and q, from w = 0:
#
#     w_1  =  p b,        w_2  =  w_1 - q (S w_1 - b)  =  (p + q) b - p q S b.
#
# Whatever p and q are, this is a number times b plus a number times S b. After D steps, it is a
# polynomial of degree D-1 in S, the same for all prompts, times b. So we need not try them one
# by one. Least squares finds the polynomial that errs least on many prompts, and no such method
# errs less after D steps. If layer D does, the network runs none of them, one step in a layer.
#
# (Conjugate gradient is not among them, since it finds its step sizes on the prompt. Nor are
# methods that use single examples rather than S.)


def best_fixed_steps(study, t, steps):
    """Error / d after t examples of the best method of 0, 1, ..., `steps` steps: (steps+1,).

    A feature for each power of S. But powers are nearly parallel, so Chebyshev's polynomials
    take their place: the first j of them are made of the first j powers."""
    fitting = fresh_prompts(study.config, 10_000, "polynomials")
    features = []
    for xs, ys in fitting, (study.xs, study.ys):
        ratio, _, query, best = spectrum(xs, ys, t)
        polynomials = torch.from_numpy(chebvander(2 * ratio - 1, steps - 1))
        features.append(times(polynomials.mT, query * best * ratio))
    fit, judge = features
    errors = []
    for count in range(steps + 1):
        inverse = torch.linalg.pinv(fit[:, :count])
        coefficients = inverse @ fitting[1][:, t].double()
        miss = judge[:, :count] @ coefficients - study.ys[:, t]
        errors.append(miss.square().mean() / study.config.d)
    return torch.stack(errors)


def error_panel(title, studies, t, more={}, **axes):
    """Squared error against layer or step: a curve for each learner, and `more`."""
    curves = {}
    for learner in "Newton", "gradient descent", "conjugate gradient", "Transformer":
        curves[learner] = [study.error_curve(learner, t) for study in studies]
    axes = dict(yscale="log", ylim=(1e-6, 2)) | axes
    return Panel(title, "layer, or step", "squared error / d", curves | more, axes)


def convergence(studies):
    """Fu, figure 2: squared error against layer or step, after n and after d examples."""
    config, panels = studies[0].config, []
    steps = 3 * config.layers
    for t in config.n, config.d:
        averaged = [averaged_errors(study, t) for study in studies]
        fixed = [best_fixed_steps(study, t, steps) for study in studies]
        last = [study.last_error(t) for study in studies]
        more = {
            "Transformer, averaged": [(range(len(z)), z) for z in averaged],
            "best fixed steps": [(range(len(z)), z) for z in fixed],
        }
        panels.append(
            error_panel(f"After {t} examples", studies, t, more, xlim=(0, steps))
        )
        if t == config.n:
            noise = [1 - float(z[-1]) / error for z, error in zip(averaged, last)]
    rival = [float(errors[config.layers]) for errors in fixed]
    return panels, [
        Claim(
            "After d examples the last layer errs less than as many steps of any fixed sizes",
            last,
            "<",
            rival,
        ),
        Claim(
            "After n examples most of the last layer's error is noise of the network (part)",
            noise,
            ">",
            0.5,
        ),
    ]


# %% 13. Other data
# First, ill-conditioned data: kappa = 100. The network goes on from its weights at kappa = 1 for
# a few hundred steps of training. For the same error, gradient descent may now need up to 100
# times the steps, and Newton up to 2 log2(100) = 13 more.
#
# Data that it was never trained on are another matter, see README: Newton and gradient descent
# do not care if w* is three times as large, and have it *easier* if all x's lie in few of the d
# dimensions. The network does care, and has it harder.


def equal_error(error, steps, errors):
    """After how many steps a method errs as little, with log error taken as linear in between.

    If it errs 1, .1, .01 after 0, 1, 2 steps, then an error of .03 is worth 1.52 steps. If it
    never errs as little: inf."""
    lowest = torch.as_tensor(errors).clamp_min(TINY).cummin(0).values
    return float(np.interp(-math.log(error), -lowest.log(), steps, right=math.inf))


def conditioning(studies):
    """Fu, figures 4, 16: errors at kappa = 1 (first half of the studies) and at 100."""
    half, panels = len(studies) // 2, []
    for at_kappa in studies[:half], studies[half:]:
        config, worth = at_kappa[0].config, []
        for study in at_kappa:
            newton_curve = study.error_curve("Newton", config.n)
            worth.append(equal_error(study.last_error(config.n), *newton_curve))
        title = f"kappa = {config.kappa:g}: as Newton after {np.mean(worth):.0f} steps"
        axes = dict(xscale="symlog", xlim=(0, 1e4))
        panels.append(error_panel(title, at_kappa, config.n, **axes))
    return panels, []


# %% What we found
# 1. Speed. The paper is right. A layer gains two to three steps of Fu's Newton, more than a step
#    of conjugate gradient. After d examples the last layer errs less than any method can that
#    takes as many steps of fixed sizes.
# 2. The path. "Like Newton" and "not like gradient descent" are no opposites: from I/lambda_max
#    the two walk one path, by two clocks. The layers are near this path, not on that of Fu's
#    start. The last layer is as similar to gradient descent after 128 or 256 steps as to Newton;
#    and so is a Newton with shuffled deviations.
# 3. Inside. A partial inverse applied to the query can be read, made of x's alone. No w* can.
# 4. Precision. After n examples most of the last layer's error is noise of the network. It
#    vanishes in the mean over copies of the prompt that should not matter. (After d examples,
#    where convergence is slow, it is 7 to 17%.) No exact method has such noise.
# 5. Is it Newton, then? It has Newton's speed, and an inverse as Newton has. It is not exact: not
#    free of scale, and in two networks of three worst on prompts that are easiest for Newton (see
#    README). And others pass: ridge regression whose ridge shrinks from layer to layer, and GD++
#    (section 15). What they share: from layer to layer, smaller eigenvalues are reached, by a
#    constant factor or more.


# %% Part III. Theory that runs
# %% 14. Newton's weights, written by hand (Fu, theorem 5.1)
# Can attention run Newton at all? Here is a network that does, exactly. An example is one
# token [M x_j ; x_j ; y_j], where M is Newton's guess. At first M is a multiple c I of the
# identity, so this is [c x_j ; x_j ; y_j]. In each layer, every token [M x ; x ; y] does two
# things:
#
#     attention   the query M x, keys x_j and values -1/2 M x_j add to its top block
#                 -1/2 sum over j of M x_j <x_j, M x>  =  -1/2 M S M x.
#     MLP         doubles the top block: it is now 2 M x - M S M x.
#
# This is one step of Newton, in one layer. At the end, the token of the query, whose y is empty,
# collects its answer with one more attention: the sum of y_j <M x_j, x_q>, which is b^T M x_q.
#
# Attention has ReLU here, not softmax. Two heads make it linear: ReLU(s) - ReLU(-s) = s. The
# price: all prompts share one M_0, and each example must see all others. The causal mask of our
# Transformer forbids that. (What differs from Fu's proof stands in README, under corrections.)


def relu_attention(h, heads, mask):
    """h_t + the sum over heads (Q, K, V) and j of mask[j] ReLU(<Q h_t, K h_j>) V h_j, all t.

    h is (..., tokens, width); mask (tokens,) is 1 for examples and 0 for the query."""
    added = 0
    for Q, K, V in heads:
        scores = (h @ Q.mT) @ (h @ K.mT).mT
        weights = mask * scores.relu()
        added = added + weights @ (h @ V.mT)
    return h + added


def token_blocks(d):
    """Matrices that read M x, x and y of a token: (d, 2d+1), (d, 2d+1), (1, 2d+1), float64.

    Transposed, they write into these blocks."""
    return torch.eye(2 * d + 1, dtype=torch.float64).split([d, d, 1])


def linear_heads(Q, K, V):
    """Two ReLU heads that add the sum of <Q h_t, K h_j> V h_j, without ReLU."""
    return [(Q, K, V), (-Q, K, -V)]


def newton_layer(d):
    """The weights of one step of Newton: [M x ; x ; y] becomes [2 M x - M S M x ; x ; y].

    First the attention, two heads (Q (d, 2d+1), K (d, 2d+1), V (2d+1, 2d+1)); then the MLP,
    (up (2d, 2d+1), down (2d+1, 2d)), which adds down ReLU(up h) to h. All float64."""
    M_x, x, _ = token_blocks(d)
    heads = linear_heads(Q=M_x, K=x, V=-0.5 * M_x.mT @ M_x)
    up = torch.cat([M_x, -M_x])
    return heads, (up, up.mT)


def newton_by_hand(xs, ys, steps, scale):
    """The hand-written network's answers to the last query, after 0, ..., steps: (steps+1, P).

    xs (P, n+1, d) and ys (P, n+1) are float64. M_0 is scale times I for all prompts."""
    d = xs.shape[-1]
    M_x, x, y = token_blocks(d)
    heads, (up, down) = newton_layer(d)
    collect_answer = linear_heads(Q=x, K=M_x, V=y.mT @ y)
    is_example = torch.ones(xs.shape[1]).double()
    is_example[-1] = 0
    h = torch.cat([scale * xs, xs, (is_example * ys)[..., None]], dim=-1)
    answers = []
    for _ in range(steps + 1):
        answered = relu_attention(h, collect_answer, is_example)
        answers.append(answered[:, -1, -1])
        h = relu_attention(h, heads, is_example)
        h = h + (h @ up.mT).relu() @ down.mT
    return torch.stack(answers)


# %% 15. Linear attention: gradient descent, and more (Ahn et al., arXiv 2306.00297)
# Drop the softmax. The tokens are [x_j ; y_j], and a layer rewrites the y of every token t:
#
#     y_t  <-  y_t - (a/n) sum of y_j <x_j, x_t> over the examples j.
#
# Now y_j of the examples is a residual, y_j - w.x_j, and y of the query is -w.x_q, for a w that
# stands in no token. It moves by a step of gradient descent with step size a/n (Ahn, lemma 1).
# So L layers are L steps of fixed sizes, and section 12 tells how little they can do. (In Ahn's
# general layer a matrix A takes the place of a. If all directions are alike, A = a I.)
#
# But let the layer rewrite the x's as well: x_t <- x_t - (g/n) sum of x_j <x_j, x_t>. This is
# GD++ (von Oswald et al., arXiv 2212.07677). It shrinks the x's most along the largest
# eigenvalues. So S is better conditioned in each layer, and gradient descent on it is faster.
# Along an eigenvector of S/n with eigenvalue lambda, let `left` be what is left of the x's:
#
#     missing  <-  missing (1 - a left^2 lambda),        left  <-  left (1 - g left^2 lambda).
#
# So the network is two numbers a layer, and to train it one needs eigenvalues, no prompts.


def shares_missing(eigenvalues, numbers):
    """Share of w* missing after 0, ..., L layers of numbers a and g, (2, L): (L+1, ...).

    eigenvalues are those of S/n, (...)."""
    left = torch.ones_like(eigenvalues)
    missing = [left]
    for a, g in numbers.T:
        seen = left.square() * eigenvalues
        missing.append(missing[-1] * (1 - a * seen))
        left = left * (1 - g * seen)
    return torch.stack(missing)


def train_linear_attention(eigenvalues, layers, rewrites, steps=300):
    """Train the numbers a and g of each layer, (2, layers). If it `rewrites` no x, g is 0.

    Adam on the logarithm of the last layer's squared error."""
    low, high = eigenvalues.min(), eigenvalues.max()
    spread = torch.linspace(low, high, layers + 2)[1:-1]
    numbers = torch.stack([1 / spread, torch.full_like(spread, 0.1)])
    numbers.requires_grad_()
    used = torch.tensor([[1], [rewrites]])
    optimizer = torch.optim.Adam([numbers], lr=0.02)
    for _ in range(steps):
        missing = shares_missing(eigenvalues, numbers * used)
        loss = missing[-1].square().mean().log()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (numbers * used).detach()


def optimal_preconditioner(Sigma, n):
    """The A (d, d) with which one layer, answering b^T A x_q / n, errs least (Ahn, theorem 1).

    For n examples and a query from N(0, Sigma), and w* ~ N(0, I). A has Sigma's eigenvectors."""
    # The expected error is quadratic in A, and E S^2 = n (n+1) Sigma^2 + n trace(Sigma) Sigma.
    # So A is n times the inverse of (n+1) Sigma + trace(Sigma) I.
    identity = torch.eye(len(Sigma)).to(Sigma)
    return n * torch.linalg.inv((n + 1) * Sigma + Sigma.trace() * identity)


def linear_attention(studies):
    """Error against layers of the networks of sections 14 and 15, beside Newton's and ours.

    At kappa = 1. The networks of section 15 have no noise on y."""
    first, layers = studies[0], studies[0].config.layers
    n, d, steps = first.config.n, first.config.d, 3 * layers
    fixed = best_fixed_steps(first, n, steps)
    curves = {"best fixed steps": [(range(steps + 1), fixed)]}

    generator = random_numbers(first.config, "polynomials")
    xs, _ = sample_prompts(1000, n - 1, d, generator=generator)
    eigenvalues = torch.linalg.eigvalsh(xs.mT @ xs / n).double()
    train_on, judge_on = eigenvalues.split(500)
    for name, rewrites in ("linear attention, y alone", 0), ("GD++", 1):
        errors = [1.0]  # of no layer
        for depth in range(1, layers + 1):
            numbers = train_linear_attention(train_on, depth, rewrites)
            missing = shares_missing(judge_on, numbers)[-1]
            errors.append(float(missing.square().mean()))
        curves[name] = [(range(layers + 1), errors)]
    ((_, y_alone),) = curves["linear attention, y alone"]
    ((depths, gd_plus_plus),) = curves["GD++"]
    theory = 1 - float(optimal_preconditioner(torch.eye(d), n)[0, 0])

    xs, ys = first.xs.double(), first.ys.double()
    # One over the largest trace of X^T X, as a trace is above lambda_max:
    scale = 1 / xs.square().sum((1, 2)).max()
    start = scale * torch.eye(d).double()
    method = method_as_learner(lambda S, b: newton(S, b, steps, start))
    by_hand = newton_by_hand(xs, ys, steps, scale)
    difference = (by_hand - method(xs, ys)[..., -1]).abs().max()
    errors = (by_hand - ys[:, -1]).square().mean(1) / d
    curves["network by hand"] = [(range(steps + 1), errors)]

    worth = [
        equal_error(study.last_error(n), depths, gd_plus_plus) for study in studies
    ]
    title = (
        f"GD++ errs as the Transformer's last layer after {np.mean(worth):.1f} layers"
    )
    return [error_panel(title, studies, n, curves, xlim=(0, 2 * layers))], [
        Claim(
            "Thm. 5.1: a network with weights written by hand runs Newton (difference)",
            [float(difference)],
            "<",
            1e-6,
        ),
        Claim(
            "Ahn, thm. 1: one trained layer errs as the theory predicts (difference)",
            [abs(y_alone[1] / theory - 1)],
            "<",
            0.03,
        ),
    ]


# %% What GD++ says
# With the x's rewritten, half as many layers come to the last error of our Transformer (at d = 20).
# (At layer 7 its curve rises: 300 steps do not train it to the end.) And if a layer also rescales
# its x's, two fixed numbers are enough. In units of lambda_max, for the y's and for the x's,
#
#     missing  <-  missing (1 - 1.2 left^2 lambda),      left  <-  left (3 - left^2 lambda) / 2.
#
# The second is the iteration of Newton and Schulz for S^(-1/2). In the place of our layers 1 to 8
# this matches Newton's steps 2 5 7 10 12 14 17 19, and it passes all our claims of speed and path.
# So these do not say "Newton's inverse". They say: each layer reaches smaller eigenvalues, by a
# constant factor or more.


# %% 16. Softmax attention learns in stages (Huang et al., arXiv 2310.05249)
# How does such a layer come to be? Let each x be one of K orthonormal features, v_j with
# probability p_j, and its answer w.v_j. In a long prompt feature j makes up the share p_j. One
# layer of softmax attention with a matrix Q averages the answers. For a query of feature k,
#
#     answer  =  sum over j of a_j w.v_j,      a_j proportional to p_j exp(Q[j,k]).
#
# Its expected loss is 1/2 [(1 - a_k)^2 + sum over j != k of a_j^2]. Gradient descent starts at
# Q = 0. If all p_j are equal, all features are learned together. If p_1 = 1/2, then feature 1 is
# learned first, mostly because queries for it are so frequent. For the others, the attention has
# to leave feature 1, which draws half of it at the start.


def train_attention(p, steps, step_size=2.0):
    """Gradient descent on Q (K, K), each query k weighted by p_k: losses of queries (steps, K).

    p (K,) are the probabilities of the features."""
    identity = torch.eye(len(p))
    Q = torch.zeros_like(identity, requires_grad=True)
    losses = []
    for _ in range(steps):
        attention = (p.log()[:, None] + Q).softmax(0)  # [feature, query]
        of_queries = (attention - identity).square().sum(0) / 2
        (gradient,) = torch.autograd.grad(p @ of_queries, Q)
        Q.data -= step_size * gradient
        losses.append(of_queries.detach())
    return torch.stack(losses)


def stages():
    """Huang, section 3: balanced features are learned together, a dominant one first."""
    panels, axes = [], dict(xscale="log", yscale="log")
    for title, p_1 in (
        ("16 features, all p = 1/16", 1 / 16),
        ("Feature 1 has p = 1/2", 1 / 2),
    ):
        others = (1 - p_1) / 15
        losses = train_attention(torch.tensor([p_1] + [others] * 15), 3000)
        curves = {
            "queries for feature 1": [losses[:, 0]],
            "queries for the others": [losses[:, 1]],
        }
        panels.append(Panel(title, "training step", "loss", curves, axes))
    # For how many steps is each loss above a tenth of its start? (The last one: p_1 = 1/2.)
    steps = (losses > losses[0] / 10).sum(0)
    later = Claim(
        "Huang: beside a dominant feature, the others are learned later (times)",
        [float(steps[1] / steps[0])],
        ">",
        5,
    )
    return panels, [later]


# %% Part IV. Machinery
# %% 17. Settings


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, and its flag: --d 20. ValueError for settings that cannot work.

    d, n         dimension of x and of w*; examples in a prompt, at least d + 2
    kappa        condition number of Sigma (Fu: 1 and 100)
    noise        standard deviation of the noise on y (Fu: 0 and .1)
    layers       layers of the Transformer
    width        width of its residual stream
    heads        attention heads; width / heads must be even
    steps        training steps; 0 leaves the network untrained
    tuning       further training steps at kappa, if it is above 1
    batch        fresh prompts in each training step, a multiple of 4
    curriculum   training steps for each new dimension; 0 takes all at once
    seed, seeds  the first network's seed, and how many networks, with the next seeds
    prompts      prompts on which learners are compared
    figures      which figures, separated by commas
    out          folder for pictures and numbers"""

    d: int = 20
    n: int = 40
    kappa: float = 1.0
    noise: float = 0.0
    layers: int = 8
    width: int = 64
    heads: int = 2
    steps: int = 2000
    tuning: int = 750
    batch: int = 96
    curriculum: int = 12
    seed: int = 1
    seeds: int = 1
    prompts: int = 640
    figures: str = "all"
    out: str = "figures"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            given, least = getattr(self, field.name), LEAST.get(field.name, 0)
            try:  # what is given may be text, a Path, or a number of numpy's
                value = field.type(given)
                works = (
                    field.type is str or value == float(given) and least <= value < 1e9
                )
            except (TypeError, ValueError):
                works = False
            check(
                works,
                f"--{field.name} {given}: not {field.type.__name__} from {least} up",
            )
            object.__setattr__(self, field.name, value)

        grown = self.curriculum * (self.d - 2)
        names = ["all", *EXPERIMENTS]
        for wanted in self.figures.split(","):
            check(wanted in names, f"--figures {wanted}: not among {', '.join(names)}")
        check(self.n >= self.d + 2, f"--n {self.n}: at least d + 2")
        check(self.width % (2 * self.heads) == 0, "--heads: width / heads must be even")
        check(self.batch % 4 == 0, f"--batch {self.batch}: a multiple of 4")
        check(
            self.steps == 0 or self.steps > grown,
            f"--steps: 0, or above {grown} (curriculum)",
        )


# The least value of each; of all others, 0.
LEAST = dict(d=5, kappa=1, layers=4, width=2, heads=1, batch=4, seeds=1, prompts=64)


def check(works, message):
    """ValueError with this message, unless it works."""
    if not works:
        raise ValueError(message)


SMALL = dict(d=5, n=10, batch=64, curriculum=0)
PRESETS = {  # each writes into a folder of its own, figures/quick and so on
    "quick": SMALL
    | dict(
        width=32, layers=6, steps=1500, prompts=256, figures="paths,rates,convergence"
    ),
    "small": SMALL | dict(width=40, steps=5000, prompts=2048),
    "long": dict(steps=8000, tuning=2000),
    "paper": dict(layers=12, width=256, heads=8, steps=12_000, batch=256),
}


# %% 18. Optimizers, and why the loss has a root
# Section 5's loss is the mean over t of sqrt(m_t), where m_t is the mean of |error|^1.5 after
# t examples. The gradient of sqrt(m) is m' / (2 sqrt(m)). If errors are of size s, m' goes as
# s^.5, and sqrt(m) as s^.75, so the gradient goes as s^-.25: where errors are a thousand times
# smaller, they pull 5.6 times as hard. With plain squares they would pull a thousand times
# less. And the power is 1.5, not 2, because a few unlucky prompts would drown the rest with
# their squares.
#
# Muon (Keller Jordan, 2024) looks at the gradient of a weight matrix as U diag(s) V^T, and takes
# a step along U V^T: all directions are learned at one speed. It needs no decomposition. X <-
# a X + b X X^T X + c X (X^T X)^2 leaves U and V as they are, and moves each s to a s + b s^3 +
# c s^5. With Jordan's a, b, c, five steps take s = .01 to .034, .118, .40, 1.09 and .70. That is
# near enough to 1. (It is a relative of Newton's iteration.)


def orthogonalize(G):
    """Nearly U V^T of each G = U diag(s) V^T, (..., m, n) with m >= n."""
    X = F.normalize(G, dim=(-2, -1), eps=1e-7)
    for _ in range(5):
        gram = X.mT @ X
        X = 3.4445 * X + X @ (-4.7750 * gram + 2.0315 * gram @ gram)
    return X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for stacks of matrices. (Torch's own takes single ones.)"""

    @torch.no_grad()
    def step(self):
        """One update, as large as AdamW's: entries of about 0.2 lr (Liu et al., 2025)."""
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))
                size = 0.2 * max(p.shape[-2:]) ** 0.5
                p.sub_(update, alpha=group["lr"] * size)


def make_optimizers(model, config):
    """Muon for the layers' matrices, Adam for the rest. At kappa > 1, Muon steps half as far."""
    muon_lr = 0.018 if config.kappa == 1 else 0.009
    rest = [model.read_in, model.positions, model.read_out]
    return [
        torch.optim.Adam(rest, lr=0.005, betas=(0.9, 0.99)),
        Muon([model.attention, model.mlp], dict(lr=muon_lr, momentum=0.9)),
    ]


# %% 19. Files, and training with them
# A kill at any moment leaves the old file or the new one, never half of one.


HALF = ".icl_newton-half-"


def write_file(path, write, tries=2):
    """Let write(path) make a file, whole or not at all. OSError where that cannot be done.

    It tries twice, as another run that just starts may have removed the half-written file."""
    half_written = path.with_name(f"{HALF}{os.getpid()}-{path.name}")
    try:
        write(half_written)
        half_written.replace(path)
    except OSError as error:
        half_written.unlink(missing_ok=True)
        if tries == 1 or not isinstance(error, FileNotFoundError):
            raise OSError(f"cannot write {path}: {error.strerror}") from None
        write_file(path, write, tries - 1)


def prepare_folder(folder):
    """Make a folder, see that it can be written, remove what killed runs left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{HALF}test", Path.touch)
    for left in folder.glob(f"{HALF}*"):
        left.unlink(missing_ok=True)


# Networks are kept in a folder. The name of a file knows all that decides the weights: settings,
# Torch's version, and the code that trains, in its compiled form. So an edited schedule means a
# new network, and an edited comment or docstring does not.

CHECKPOINTS = Path("checkpoints")
SECONDS_BETWEEN_SAVES = 30


def compiled(code, docstring=None):
    """What a function does, without its docstring, names of files, and addresses.

    It is the same on all machines that have one version of Python."""
    constants = [
        compiled(z) if isinstance(z, types.CodeType) else z
        for z in code.co_consts
        if z is not docstring
    ]
    return code.co_code, code.co_names, constants


def checkpoint_path(config):
    """Where the network of these settings is kept."""
    functions = [
        train,
        random_numbers,
        training,
        training_prompts,
        sample_prompts,
        errors_and_gradients,
        interleave,
        sinusoids,
        normalize,
        make_optimizers,
        orthogonalize,
        Muon.step,
        *filter(inspect.isfunction, vars(Transformer).values()),
    ]
    functions = map(inspect.unwrap, functions)
    code = [compiled(function.__code__, function.__doc__) for function in functions]
    decides = dataclasses.replace(config, seeds=1, prompts=64, figures="all", out="")
    if config.kappa == 1:
        decides = dataclasses.replace(decides, tuning=0)
    version = torch.__version__.split("+")[0]  # without +cpu or +cu126
    everything = repr([decides, PURPOSES, TINY, version, code])
    key = hashlib.sha256(everything.encode()).hexdigest()[:10]
    return CHECKPOINTS / f"d{config.d}-kappa{config.kappa:g}-seed{config.seed}-{key}.pt"


def restore(path, generator, parts):
    """Put a training where it stood. Returns the number of steps done: 0 if there is no file."""
    if not path.exists():
        return 0
    try:
        done, numbers, states = torch.load(path, "cpu", weights_only=True)
    except Exception:
        raise ValueError(f"{path} is damaged: delete it") from None
    generator.set_state(numbers)
    for part, state in zip(parts, states):
        part.load_state_dict(state)
    print(f"  goes on from {path}, step {done}; delete it to train anew", flush=True)
    return done


def progress(config, step, errors, seconds):
    """How far a training is."""
    error, t = errors[:, -1].square().mean() / config.d, errors.shape[1] - 1
    return (
        f"  step {step} of {config.steps}: error / d {error:.2g} after {t} examples; "
        f"about {seconds:.0f} s left"
    )


@contextlib.contextmanager
def side_by_side():
    """A map that works on as many things at once as there are cores.

    Torch splits tensors as small as ours badly among its threads. So meanwhile it gets one, and
    each core a thread of ours."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores, "quarter", torch.set_num_threads, (1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(cores)


def train(config):
    """The trained network of these settings: from its file, or by training.

    A killed training goes on at its last checkpoint, bit for bit. At kappa > 1, the network of
    kappa = 1 goes on for `tuning` steps. FloatingPointError: errors are not finite; ValueError:
    a damaged checkpoint; OSError: a file cannot be written."""
    prepare_folder(CHECKPOINTS)
    path, purpose, easy = checkpoint_path(config), "training", None
    if config.kappa > 1:
        easy = train(dataclasses.replace(config, kappa=1))
        config = dataclasses.replace(config, steps=config.tuning, curriculum=0)
        purpose = "tuning"
    with side_by_side() as map:  # from here on, so that forked processes can train
        model = Transformer(config).to("cuda" if torch.cuda.is_available() else "cpu")
        if easy:
            model.load_state_dict(easy.state_dict())
        optimizers = make_optimizers(model, config)
        generator, parts = random_numbers(config, purpose), [model, *optimizers]
        first = restore(path, generator, parts)
        start = saved = time.perf_counter()
        steps = training(config, model, optimizers, generator, first, map)
        for done, errors in enumerate(steps, first + 1):
            now = time.perf_counter()
            due = now >= saved + SECONDS_BETWEEN_SAVES
            if not due and done not in (first + 10, config.steps):
                continue
            if not errors.isfinite().all():
                raise FloatingPointError(f"errors are not finite at step {done}")
            left = (now - start) / (done - first) * (config.steps - done)
            print(progress(config, done, errors, left), flush=True)
            states = [part.state_dict() for part in parts]
            state = done, generator.get_state(), states
            write_file(path, functools.partial(torch.save, state))
            saved = now
    return model.requires_grad_(False)


# %% 20. Drawing
# A learner has one colour and one mark in all pictures. Layers go from light to dark.

LOOK = {
    "Transformer": "C1o-",
    "network by hand": "C3o:",
    "M_k x_q": "C1o-",
    "M_7 x_q": "C1o-",
    "Transformer, averaged": "C1o:",
    "M_7 x_q, random y": "C1x:",
    "M_7 x_q, untrained": "C7x:",
    "M_7 x_q, by a quadratic in S": "k:",
    "Newton": "C0s-",
    "Newton from I/lambda_max": "C0s",
    "Newton from alpha S": "C0s-",
    "M_k x_q, from alpha S": "C0s-",
    "gradient descent": "C2^-",
    "its path": "C7-",
    "linear attention, y alone": "C2^:",
    "conjugate gradient": "C4D-",
    "b": "C4D-",
    "w*": "C2^-",
    "GD++": "C9v-",
    "whitened x_q": "C8*-",
    "Fu's Transformer": "C7x-",
    "shuffled deviations": "C7x-",
    "least squares": "C5+-",
    "best fixed steps": "k:",
    "twice the steps in each layer": "k:",
    "queries for feature 1": "k-",
    "queries for the others": "C5-",
}
STYLE = {
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.markersize": 4,
    "lines.linewidth": 1.2,
}


def draw(title, panels):
    """The picture of an experiment, with one legend for all panels: a Figure."""
    width = max(11, 5 * len(panels) + 1)
    figure = plt.figure(figsize=(width, 5), layout="constrained")
    shown = {}
    for place, panel in enumerate(panels, 1):
        ax = figure.add_subplot(1, len(panels), place)
        last = list(panel.curves)[-1]  # "layer 8", if it shows layers
        for learner, curves in panel.curves.items():
            for curve in curves:
                x, y = (
                    curve
                    if isinstance(curve, tuple)
                    else (range(1, len(curve) + 1), curve)
                )
                (line,) = ax.plot(x, y, LOOK.get(learner, ".-"))
                if learner not in LOOK:
                    depth = int(learner[6:]) / int(last[6:])
                    line.set_color(plt.cm.YlOrRd(0.1 + 0.8 * depth))
                shown[learner] = line
        ax.set(
            title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, **panel.axes
        )
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=5, frameon=False
    )
    figure.suptitle(title, fontsize=10)
    return figure


# %% 21. A run
# What needs no network comes first: the first picture is there in seconds.

EXPERIMENTS = {
    experiment.__name__: experiment
    for experiment in (
        paths,
        stages,
        rates,
        similarity,
        convergence,
        filters,
        inside,
        linear_attention,
        conditioning,
    )
}


def in_words(claim):
    """A claim, what was measured seed by seed, and in how many seeds it holds: three texts."""
    sentence, measured, relation, bar = claim
    beats = {">": np.greater, "<": np.less}[relation]
    sides = (" ".join(f"{z:.3g}" for z in np.ravel(side)) for side in (measured, bar))
    score = f"{np.sum(beats(measured, bar))} of {len(measured)}"
    return sentence, f" {relation} ".join(sides), score


def table(results):
    """The claims of all results, in lines of Markdown."""
    lines = ["| claim | measured, seed by seed | holds in |", "|---|---|---|"]
    for name in EXPERIMENTS:
        if name in results:
            for claim in results[name]["claims"]:
                lines.append(f"| {' | '.join(in_words(claim))} |")
    return "\n".join(lines)


def earlier_results(path, settings):
    """What runs with the same settings have found before, {figure: its results}."""
    try:
        record = json.loads(path.read_text("utf-8"))
        return record["figures"] if record["settings"] == settings else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def plain(array):
    """An array as lists of numbers with four digits, for JSON."""
    return [plain(z) for z in array] if np.ndim(array) else float(f"{array:.4g}")


@plt.rc_context(STYLE)
def run(config):
    """Make the figures, print the claims, and write everything into config.out.

    Figures made before with the same settings keep their place. Returns {figure: its results}."""
    out, start = Path(config.out), time.perf_counter()
    prepare_folder(out)
    prepare_folder(CHECKPOINTS)
    settings = vars(config) | dict(figures="all", out="")
    results = earlier_results(out / "results.json", settings)

    @functools.cache  # for this run only
    def studies(kappa):
        """The studies of all seeds, with this kappa."""
        seeds = range(config.seed, config.seed + config.seeds)
        configs = [
            dataclasses.replace(config, seed=seed, kappa=kappa) for seed in seeds
        ]
        return [Study(one, train(one)) for one in configs]

    names = config.figures.split(",")
    for name in EXPERIMENTS if "all" in names else names:
        if name in ("paths", "stages"):
            panels, claims = EXPERIMENTS[name]()
        elif name == "linear_attention":
            panels, claims = EXPERIMENTS[name](studies(1.0))
        elif name == "conditioning":
            panels, claims = EXPERIMENTS[name](studies(1.0) + studies(100.0))
        else:
            panels, claims = EXPERIMENTS[name](studies(config.kappa))
        title = "\n".join("{}: {} (in {})".format(*in_words(claim)) for claim in claims)
        write_file(out / f"{name}.png", draw(title, panels).savefig)
        plt.close()
        curves = {panel.title: panel.curves for panel in panels}
        results[name] = dict(claims=claims, curves=curves)
        record = json.dumps(dict(settings=settings, figures=results), default=plain)
        write_file(out / "results.json", lambda half: half.write_text(record, "utf-8"))
        print(
            f"{time.perf_counter() - start:5.0f} s  {out / name}.png",
            title,
            sep="\n",
            flush=True,
        )
    print("", table(results), sep="\n")
    return results


# %% 22. The command line


def parse(arguments):
    """The Config of a command line. Bad input: one line on standard error, exit status 2."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=Config.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    about = "quick: a first look; small: d = 5; long: trained longer; paper: its size, for a GPU"
    parser.add_argument("--preset", choices=PRESETS, help=about)
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", help=f"default: {field.default}")
    given = vars(parser.parse_args(arguments))
    if preset := given.pop("preset", ""):
        given = PRESETS[preset] | dict(out=f"figures/{preset}") | given
    try:
        config = Config(**given)
        prepare_folder(Path(config.out))
        return config
    except (ValueError, OSError) as error:
        parser.error(str(error))


def main(arguments=None):
    """Run the command line. Exit status 0, 1 (a run failed), 2 (bad input) or 130 (Ctrl-C)."""
    config = parse(arguments)
    plt.switch_backend("agg")  # pictures go to files, no window opens
    print(f"icl_newton: {config}", flush=True)
    try:
        run(config)
    except KeyboardInterrupt:
        print("\nicl_newton: stopped; say it again to go on", file=sys.stderr)
        return 130
    except (ArithmeticError, ValueError, OSError, MemoryError, RuntimeError) as error:
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        print(f"icl_newton: {first_line}", file=sys.stderr)
        return 1
    return 0


def is_the_program():
    """Whether Python was started to run this file: no notebook or other script holds it."""
    source, started = main.__code__.co_filename, sys.argv[0]
    from_stdin = (source, started) == ("<stdin>", "-")
    return from_stdin or Path(source).resolve() == Path(started).resolve()


if __name__ == "__main__" and is_the_program():
    sys.exit(main())
