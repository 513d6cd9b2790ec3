"""
Tests of icl_newton.py, and the grader of its exercises.

    python -m pytest                everything, about two minutes on two cores
    python -m pytest -k exercise    the ten exercises, a summary with points at the end
    python -m pytest -k ex03        one exercise

Every test compares with something that cannot share its bugs: numpy.linalg, a slow obvious loop over prompts and
prefixes, an identity, or an answer planted in the data. Shapes and seeds are drawn anew in every run; a failing test
prints its seed, and ICL_SEED=that repeats it.
"""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import icl_newton

HERE = Path(__file__).parent
SEED = int(os.environ.get("ICL_SEED", random.SystemRandom().randrange(10**6)))


@pytest.fixture(autouse=True)
def fresh_randomness():
    """Every test starts from the run's seed, so that ICL_SEED repeats it alone."""
    print(f"ICL_SEED={SEED}")
    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture
def icl():
    return icl_newton


# ---------------------------------------------------------------------------------------------------------------------
# Slow, obvious oracles


def some_prompts(prompts=None, n=None, d=None, scales=None):
    """Random prompts without any help from the file under test: xs (P, n+1, d), ys (P, n+1), float64."""
    prompts, d = prompts or random.randint(2, 4), d or random.randint(2, 5)
    n = n or random.randint(d + 1, 2 * d + 2)
    xs = torch.randn(prompts, n + 1, d, dtype=torch.float64)
    if scales is not None:
        xs = xs * torch.as_tensor(scales, dtype=torch.float64)
    return xs, torch.einsum("ptd,pd->pt", xs, torch.randn(prompts, d, dtype=torch.float64))


def loop_over_prefixes(xs, ys, solve):
    """[k, b, t] = x_{t+1} . w_k for w_0, w_1, ... = solve(X, y) of the first t examples, one prefix at a time."""
    rows = []
    for x, y in zip(xs.double().numpy(), ys.double().numpy()):
        rows.append([[w @ x[t] for w in solve(x[:t], y[:t])] for t in range(len(x))])
    return torch.tensor(np.array(rows)).permute(2, 0, 1)


def slow_gd(steps, lr=None, w0=None):
    def solve(X, y):
        S, b, w = X.T @ X, X.T @ y, np.zeros(X.shape[1]) if w0 is None else w0.copy()
        eta = lr if lr is not None else 1 / max(np.linalg.eigvalsh(S)[-1], 1e-30)
        path = [w]
        for _ in range(steps):
            path.append(w := w - eta * (S @ w - b))
        return path

    return solve


def slow_newton(steps, alpha):
    def solve(X, y):
        S, b = X.T @ X, X.T @ y
        M = alpha * S
        path = [M @ b]
        for _ in range(steps):
            M = 2 * M - M @ S @ M
            path.append(M @ b)
        return path

    return solve


def close(actual, expected, message, tolerance=1e-9):
    assert tuple(actual.shape) == tuple(expected.shape), f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    scale = max(expected.abs().max().item(), 1e-3)
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"{message} (largest relative error {error:.1e})"


def slow_attention(q, k, v):
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for index in np.ndindex(*q.shape[:-2]):
        for i in range(q.shape[-2]):
            scores = torch.stack([q[index][i] @ k[index][j] for j in range(i + 1)]) / math.sqrt(q.shape[-1])
            out[index][i] = scores.softmax(0) @ v[index][: i + 1]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Exercises


def test_ex01_shapes_and_noiseless_answers(icl):
    P, d = random.randint(3, 6), random.randint(2, 6)
    n = d + random.randint(1, 5)
    xs, ys = icl.sample_prompts(P, n, d)
    assert xs.shape == (P, n + 1, d) and ys.shape == (P, n + 1), f"xs is (prompts, n+1, d), ys (prompts, n+1); got {xs.shape}, {ys.shape}"
    assert xs.dtype == ys.dtype == torch.float32, "prompts are float32"
    rules = []
    for x, y in zip(xs.double().numpy(), ys.double().numpy()):
        w, *_ = np.linalg.lstsq(x, y, rcond=None)
        assert np.abs(x @ w - y).max() < 1e-4, "without noise one w* must explain all n+1 answers of a prompt"
        rules.append(w)
    assert np.abs(rules[0] - rules[1]).max() > 1e-3, "every prompt needs its own w*"


def test_ex01_randomness_comes_from_the_generator(icl):
    draw = lambda seed: icl.sample_prompts(3, 4, 2, kappa=5.0, noise=0.3, generator=torch.Generator().manual_seed(seed))
    first, again, other = draw(SEED), draw(SEED), draw(SEED + 1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]), "the same seed must give the same prompts: pass the generator to every draw"
    assert not torch.equal(first[0], other[0]), "another seed must give other prompts"


def test_ex01_condition_number(icl):
    d, kappa = random.choice([4, 6]), random.uniform(5, 50)
    xs, _ = icl.sample_prompts(2, 40_000, d, kappa=kappa)
    spectra = [np.linalg.eigvalsh(x.double().numpy().T @ x.double().numpy() / len(x)) for x in xs]
    for s in spectra:
        ratio = s[d // 2 :].mean() / s[: d // 2].mean()
        assert abs(ratio / kappa - 1) < 0.1, f"condition number {ratio:.1f}, expected {kappa:.1f}: eigenvalues of the covariance scale x by their square root"
        assert abs(s.sum() / d - 1) < 0.1, f"the covariance has trace {s.sum():.2f}, expected d = {d}: rescale the eigenvalues"
        assert s[d // 2 :].min() / s[: d // 2].max() > kappa / 2, "the first d//2 eigenvalues are kappa times the others"
    moments = [(x.T @ x / len(x)).double() for x in xs]
    assert (moments[0] - moments[1]).abs().max() > 0.05, "each prompt needs its own random eigenbasis"
    assert (moments[0] - torch.diag(moments[0].diagonal())).abs().max() > 0.02, "the eigenbasis must be rotated, not the axes"


def test_ex01_noise_and_moments(icl):
    noise = random.uniform(0.2, 0.6)
    xs, ys = icl.sample_prompts(400, 60, 3, noise=noise)
    residuals = [np.linalg.lstsq(x, y, rcond=None)[1][0] / (61 - 3) for x, y in zip(xs.double().numpy(), ys.double().numpy())]
    assert abs(np.sqrt(np.mean(residuals)) / noise - 1) < 0.05, "noise is the standard deviation of what is added to y"
    xs, ys = icl.sample_prompts(4000, 4, 3)
    assert abs(xs.square().mean().item() - 1) < 0.06 and abs(xs.mean().item()) < 0.03, "x ~ N(0, I) when kappa = 1"
    assert abs(ys.square().mean().item() / 3 - 1) < 0.1, "w* ~ N(0, I_d): then y has variance d"


def test_ex02_default_step_size(icl):
    xs, ys = some_prompts()
    K = random.randint(3, 9)
    expected = loop_over_prefixes(xs, ys, slow_gd(K))
    actual = icl.gradient_descent(xs, ys, K)
    close(actual[:1], expected[:1], "step 0 must be the start, w_0 = 0: have you taken a step too many?")
    close(actual, expected, "w <- w - lr (S w - b) with lr = 1/lambda_max of each prefix; does a prefix include the example it predicts?")


def test_ex02_given_step_size_and_counts(icl):
    xs, ys = some_prompts()
    counts = sorted(random.sample(range(0, 40), 4))
    lr = random.uniform(0.002, 0.01)
    expected = loop_over_prefixes(xs, ys, slow_gd(counts[-1], lr))[counts]
    close(icl.gradient_descent(xs, ys, counts, lr=lr), expected, "entry [i] must be the prediction after steps[i] steps; the gradient is S w - b, not its mean over examples")


def test_ex02_given_start(icl):
    xs, ys = some_prompts()
    w0, lr = torch.randn(xs.shape[-1], dtype=torch.float64), 0.01
    expected = loop_over_prefixes(xs, ys, slow_gd(6, lr, w0.numpy()))
    kept = w0.clone()
    close(icl.gradient_descent(xs, ys, 6, lr=lr, w0=w0), expected, "off the span of the examples w_0 must stay as it is")
    assert torch.equal(w0, kept), "w0 was changed in place"


def test_ex03_newton_start_is_safe_and_scales(icl):
    d = random.randint(2, 6)
    X = torch.randn(random.randint(2, 4), 3, d + random.randint(0, 4), d, dtype=torch.float64)
    S = X.mT @ X
    alpha = icl.newton_start(S)
    assert alpha.shape == (*S.shape[:-2], 1, 1), "one alpha for each S, as (..., 1, 1): have you taken one norm of all matrices?"
    expected = torch.tensor([[1 / np.linalg.norm(s @ s.T) for s in row] for row in S.numpy()])
    assert ((alpha.squeeze() * torch.linalg.matrix_norm(S, 2) ** 2) < 1.999).all(), "alpha lambda_max^2 must be below 2, or (1 - alpha lambda^2)^(2^k) never shrinks"
    close(alpha[..., 0, 0], expected, "alpha = 1/||S S^T||_F, the Frobenius norm")
    close(icl.newton_start(10 * S), alpha / 100, "alpha shrinks with the square of S: the norm is of S S^T, not of S")


def test_ex03_newton_start_of_nothing(icl):
    assert icl.newton_start(torch.zeros(2, 3, 3, dtype=torch.float64)).isfinite().all(), "the empty prefix has S = 0: keep 1/0 away"


def test_ex04_steps(icl):
    xs, ys = some_prompts()
    alpha, K = random.uniform(1e-4, 4e-4), random.randint(3, 8)
    expected = loop_over_prefixes(xs, ys, slow_newton(K, alpha))
    actual = icl.newton(xs, ys, K, alpha=alpha)
    close(actual[:1], expected[:1], "step 0 must be M_0 = alpha S, w_0 = M_0 b: have you taken a step too many?")
    close(actual, expected, "M <- 2M - M S M with w = M b; does a prefix include the example it predicts?")


def test_ex04_counts_in_a_sequence(icl):
    xs, ys = some_prompts()
    counts = sorted(random.sample(range(0, 12), 3))
    expected = loop_over_prefixes(xs, ys, slow_newton(counts[-1], 3e-4))[counts]
    close(icl.newton(xs, ys, counts, alpha=3e-4), expected, "entry [i] must be the prediction after steps[i] steps")


def test_ex04_digits_double(icl):
    """R_{k+1} = R_k^2: the error of a prompt with S = lambda I is (1 - alpha lambda^2)^(2^k), exactly."""
    d, scale, alpha = random.randint(2, 5), random.uniform(0.8, 1.2), 0.3
    xs = torch.cat([scale * torch.eye(d, dtype=torch.float64), torch.randn(1, d, dtype=torch.float64)])[None]
    w = torch.randn(d, dtype=torch.float64)
    ys = xs @ w
    predictions = icl.newton(xs, ys, 6, alpha=alpha)[:, 0, d]
    expected = (1 - (1 - alpha * scale**4) ** (2.0 ** torch.arange(7, dtype=torch.float64))) * ys[0, d]
    close(predictions, expected, "the residual I - S M must be squared by every step", 1e-10)


def test_ex04_float64_to_the_end(icl):
    xs, ys = some_prompts(d=3, n=8)
    alpha = 1 / float((xs.square().sum((1, 2)) ** 2).max())
    last = icl.newton(xs.float(), ys.float(), 40, alpha=alpha)[-1]
    expected = loop_over_prefixes(xs.float(), ys.float(), lambda X, y: [np.linalg.lstsq(X, y, rcond=None)[0]])[0]
    assert last.dtype == torch.float64, "solve in float64: in float32 rounding leaks out of the span and doubles at every step"
    close(last, expected, "40 steps must reach the minimum-norm least-squares solution", 1e-4)


def test_ex05_tokens(icl):
    P, n, d = random.randint(2, 4), random.randint(2, 6), random.randint(2, 5)
    xs, ys = torch.randn(P, n + 1, d), torch.randn(P, n + 1)
    tokens = icl.interleave(xs, ys)
    assert tokens.shape == (P, 2 * n + 1, d), f"tokens are (prompts, 2n+1, d); got {tuple(tokens.shape)}. The last y, the answer, is left out"
    for t in range(n + 1):
        assert torch.equal(tokens[:, 2 * t], xs[:, t]), "x_1, x_2, ... stand at the even positions: interleave in time, not in features"
    for t in range(n):
        assert torch.equal(tokens[:, 2 * t + 1, 0], ys[:, t]), "y_t stands right after x_t, in the first entry"
        assert not tokens[:, 2 * t + 1, 1:].any(), "y is padded with zeros"


def test_ex05_one_dimension(icl):
    xs, ys = torch.randn(2, 3, 1), torch.randn(2, 3)
    assert torch.equal(icl.interleave(xs, ys)[0, :, 0], torch.stack([xs[0, 0, 0], ys[0, 0], xs[0, 1, 0], ys[0, 1], xs[0, 2, 0]])), "d = 1 needs no padding"


def test_ex06_against_a_loop(icl):
    shape = (random.randint(1, 3), random.randint(2, 3), random.randint(3, 7), random.randint(2, 5))
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    close(icl.causal_attention(q, k, v), slow_attention(q, k, v), "token i averages v_0..v_i with softmax weights of q_i.k_j / sqrt(D): check mask, axis and scale", 1e-6)


def test_ex06_the_future_is_invisible(icl):
    q, k, v = (torch.randn(2, 6, 4) for _ in range(3))
    before = icl.causal_attention(q, k, v)
    k, v = k.clone(), v.clone()
    k[:, 4:], v[:, 4:] = 7.0, -7.0
    after = icl.causal_attention(q, k, v)
    assert torch.allclose(before[:, :4], after[:, :4]), "a later token changed an earlier output: mask the future before the softmax"
    assert not torch.allclose(before[:, 4:], after[:, 4:]), "a token must see itself and what came before"


def test_ex07_readout(icl):
    L, samples, width = random.randint(2, 4), random.randint(40, 80), random.randint(3, 8)
    H, y = torch.randn(L, samples, width, dtype=torch.float64), torch.randn(samples, dtype=torch.float64)
    expected = torch.stack([torch.tensor(np.linalg.lstsq(h, y.numpy(), rcond=None)[0]) for h in H.numpy()])
    close(icl.least_squares_readout(H, y), expected, "r = (H^T H)^+ H^T y for every layer", 1e-8)


def test_ex07_unused_directions(icl):
    H = torch.randn(60, 5, dtype=torch.float64)
    H = torch.cat([H, H[:, :2] @ torch.randn(2, 3, dtype=torch.float64), torch.zeros(60, 1, dtype=torch.float64)], dim=1)
    y = torch.randn(60, dtype=torch.float64)
    r = icl.least_squares_readout(H, y)
    assert r.isfinite().all() and r.abs().max() < 1e3, "H^T H can be singular: use a pseudo-inverse, not an inverse"
    expected = torch.tensor(H.numpy() @ np.linalg.lstsq(H.numpy(), y.numpy(), rcond=None)[0])
    close(H @ r, expected, "the readout must predict as well as numpy's least squares", 1e-6)


def test_ex08_cosines(icl):
    A, B, P, n = random.randint(2, 4), random.randint(2, 4), random.randint(2, 5), random.randint(3, 7)
    a, b, ys = torch.randn(A, P, n + 1, dtype=torch.float64), torch.randn(B, P, n + 1, dtype=torch.float64), torch.randn(P, n + 1, dtype=torch.float64)
    expected = torch.zeros(A, B, P, dtype=torch.float64)
    for i, j, p in np.ndindex(A, B, P):
        u, v = (a[i, p] - ys[p])[1:], (b[j, p] - ys[p])[1:]
        expected[i, j, p] = (u @ v) / (u.norm() * v.norm())
    close(icl.error_cosines(a, b, ys), expected, "the cosine of (prediction - y) over t = 1..n, t = 0 left out, prompt by prompt")
    close(icl.similarity_of_errors(a, b, ys), expected.mean(-1), "SimE is the mean of the prompts' cosines, not the cosine of all prompts together")


def test_ex08_best_match(icl):
    similarity = torch.rand(random.randint(2, 5), random.randint(6, 9))
    expected = torch.tensor([int(np.argmax(row)) for row in similarity.numpy()])
    assert torch.equal(icl.best_match(similarity), expected), "for each step of a (a row), the index of b's most similar step"
    batch = torch.rand(3, 2, 7)
    assert torch.equal(icl.best_match(batch), torch.stack([icl.best_match(s) for s in batch])), "leading axes are batches"


# ---------------------------------------------------------------------------------------------------------------------
# Solvers: what the exercises do not cover


def test_ols_is_the_minimum_norm_solution():
    xs, ys = some_prompts()
    expected = loop_over_prefixes(xs, ys, lambda X, y: [np.linalg.lstsq(X, y, rcond=None)[0]])
    close(icl_newton.ols(xs, ys), expected, "pinv(S) b, of minimum norm while t < d", 1e-6)


def test_ridge_is_added_to_every_solver():
    xs, ys = some_prompts(d=3, n=7)
    ridge = random.uniform(0.05, 0.5)
    solution = loop_over_prefixes(xs, ys, lambda X, y: [np.linalg.solve(X.T @ X + ridge * np.eye(3), X.T @ y)])[0]
    runs = {
        "ols": icl_newton.ols(xs, ys, ridge=ridge),
        "newton": icl_newton.newton(xs, ys, 30, ridge=ridge),
        "gd": icl_newton.gradient_descent(xs, ys, [20_000], ridge=ridge),
        "cg": icl_newton.conjugate_gradient(xs, ys, 4, ridge=ridge),
        "chebyshev": icl_newton.chebyshev(xs, ys, [2000], ridge=ridge),
    }
    for name, trajectory in runs.items():
        close(trajectory[-1], solution, f"{name} must solve (S + ridge I) w = b", 1e-7)


def test_no_learner_sees_its_own_answer_or_what_follows():
    xs, ys = some_prompts(prompts=2, n=6, d=3)
    t = random.randint(1, 5)
    changed = ys.clone()
    changed[:, t:] += 1.0
    model = tiny_model()
    learners = {
        "ols": icl_newton.ols,
        "gd": lambda x, y: icl_newton.gradient_descent(x, y, 5),
        "newton": lambda x, y: icl_newton.newton(x, y, 5),
        "ogd": icl_newton.online_gradient_descent,
        "cg": lambda x, y: icl_newton.conjugate_gradient(x, y, 3),
        "chebyshev": lambda x, y: icl_newton.chebyshev(x, y, 5),
        "transformer": lambda x, y: icl_newton.layer_predictions(model, x.float(), y.float()),
    }
    for name, learner in learners.items():
        before, after = learner(xs, ys), learner(xs, changed)
        assert torch.allclose(before[..., : t + 1], after[..., : t + 1], atol=1e-9), f"{name}: prefix t must not see y_{{t+1}}"
        assert not torch.allclose(before[..., t + 1 :], after[..., t + 1 :]), f"{name}: later prefixes must see it"


def test_newton_residuals_square():
    """I - S M_{k+1} = (I - S M_k)^2, from the predictions alone: query with every unit vector."""
    d, alpha = 4, 1e-3
    X = np.random.default_rng(SEED).normal(size=(9, d))
    S = X.T @ X
    xs = torch.tensor(np.stack([np.vstack([X, e]) for e in np.eye(d)]))
    for w in np.eye(d):  # y = X w: the prediction for query e is e . M_k S w
        M_S = icl_newton.newton(xs, xs @ torch.tensor(w), 6, alpha=alpha)[:, :, -1].numpy()  # column M_k S w
        R = np.eye(d) - alpha * S @ S
        for k in range(7):
            assert np.allclose(w - M_S[k], R @ w, atol=1e-9), f"step {k}: the residual is not the square of the one before"
            R = R @ R


def test_the_printed_alpha_stalls_and_ours_converges():
    """Correction 1: with alpha = 2/||S S^T||_2 the error along the top eigenvector never shrinks."""
    xs, ys = icl_newton.sample_prompts(20, 40, 20, generator=torch.Generator().manual_seed(SEED))
    xs, ys = xs[:, 10:].double(), torch.einsum("ptd,pd->pt", xs[:, 10:].double(), torch.randn(20, 20, dtype=torch.float64))
    S, _ = icl_newton.prefix_moments(xs, ys)
    edge = 2 / torch.linalg.matrix_norm(S[:, -1] @ S[:, -1], 2)[:, None, None, None]
    error = (icl_newton.newton(xs, ys, 40, alpha=edge)[..., -1] - ys[:, -1]).square().mean(1)
    assert error[40] > 1e-4 and error[40] > 0.5 * error[20], "alpha at the edge must stall"
    error = (icl_newton.newton(xs, ys, 40)[..., -1] - ys[:, -1]).square().mean(1)
    assert error[40] < 1e-12, "the default alpha must converge"


def test_float32_newton_decays_after_convergence():
    """Correction 3: for t < d rounding leaks out of the span of the examples and doubles at every step."""
    X, w = np.random.default_rng(SEED).normal(size=(10, 20)).astype(np.float32), np.ones(20, np.float32)
    errors = {}
    for dtype in (np.float32, np.float64):
        S = (X.T @ X).astype(dtype)
        M = (S / np.linalg.norm(S @ S)).astype(dtype)
        truth = np.linalg.pinv(S.astype(np.float64), rcond=1e-5) @ S.astype(np.float64) @ w
        errors[dtype] = [np.linalg.norm((M := 2 * M - M @ S @ M) @ (S @ w.astype(dtype)) - truth) for _ in range(40)]
    assert errors[np.float32][39] > 100 * min(errors[np.float32]), "float32 must drift away again"
    assert errors[np.float64][32] < 1e-4, "float64 must stay for the 32 steps that the figures use"


def test_gd_off_the_span_is_capped():
    """Correction 4: from w_0 off the span GD's similarity to Newton stays below 1; from 0 it reaches 1."""
    xs, ys = icl_newton.sample_prompts(200, 40, 20, generator=torch.Generator().manual_seed(SEED))
    target = icl_newton.ols(xs, ys)
    start = torch.rand(200, 1, 20, generator=torch.Generator().manual_seed(SEED))
    caps = [icl_newton.similarity_of_errors(icl_newton.gradient_descent(xs, ys, [10**6], w0=w0), target, ys).item()
            for w0 in (None, start / 20**0.5, start)]
    assert caps[0] > 0.9995 and abs(caps[1] - 0.991) < 0.004 and 0.8 < caps[2] < 0.92, f"caps {caps}"


@pytest.mark.parametrize("steps", [-1, [], [3, 3], [5, 2]])
def test_steps_must_increase(steps):
    with pytest.raises(ValueError, match="increasing"):
        icl_newton.newton(*some_prompts(), steps)


def test_online_gradient_descent_fits_the_newest_example():
    xs, ys = some_prompts()
    t = random.randint(1, xs.shape[1] - 1)
    xs[:, t] = xs[:, t - 1]  # ask again at once
    close(icl_newton.online_gradient_descent(xs, ys)[0, :, t], ys[:, t - 1], "after its update OGD must fit example t exactly")

    def slow(X, y):
        w = np.zeros(X.shape[1])
        for x, target in zip(X, y):
            w = w + x * (target - w @ x) / (x @ x)
        return [w]

    close(icl_newton.online_gradient_descent(xs, ys), loop_over_prefixes(xs, ys, slow), "one pass over the prefix")


def test_conjugate_gradient_is_exact_after_d_steps():
    xs, ys = some_prompts(d=4, n=9)
    runs = icl_newton.conjugate_gradient(xs, ys, 12)
    solution = loop_over_prefixes(xs, ys, lambda X, y: [np.linalg.lstsq(X, y, rcond=None)[0]])[0]
    close(runs[4][:, 6:], solution[:, 6:], "CG solves d equations in d steps", 1e-7)
    close(runs[12], solution, "and stays at the solution", 1e-5)


def test_bfgs_with_exact_line_search_makes_cg_steps():
    rng = np.random.default_rng(SEED)
    X, w_star = rng.normal(size=(8, 4)), rng.normal(size=4)
    S, b = X.T @ X, X.T @ X @ w_star
    w, H, path = np.zeros(4), np.eye(4), [np.zeros(4)]
    for _ in range(4):
        g = S @ w - b
        p = -H @ g
        s = p * -(g @ p) / (p @ S @ p)
        y = S @ s
        V = np.eye(4) - np.outer(s, y) / (s @ y)
        H, w = V @ H @ V.T + np.outer(s, s) / (s @ y), w + s
        path.append(w)
    query = rng.normal(size=4)
    xs, ys = torch.tensor(np.vstack([X, query]))[None], torch.tensor(np.append(X @ w_star, 0.0))[None]
    close(icl_newton.conjugate_gradient(xs, ys, 4)[:, 0, -1], torch.tensor([w @ query for w in path]), "BFGS = CG", 1e-7)


def test_chebyshev_rate_on_a_planted_spectrum():
    """After k steps the worst error is 1/T_k(z_0), and it is attained at both ends of the spectrum."""
    d, k = 4, random.randint(2, 12)
    X = np.diag(np.sqrt([1.0, 2.0, 5.0, 9.0]))
    w = np.random.default_rng(SEED).normal(size=d)
    bound = 1 / np.cosh(k * np.arccosh((9 + 1) / (9 - 1)))
    for i, z in ((0, 1.0), (1, 1 - 2 * 1 / 8), (2, 0.0), (3, -1.0)):
        xs, ys = torch.tensor(np.vstack([X, np.eye(d)[i]]))[None], torch.tensor(np.append(X @ w, 0.0))[None]
        left = 1 - icl_newton.chebyshev(xs, ys, [k])[0, 0, -1].item() / w[i]
        assert abs(left - np.cos(k * np.arccos(z)) * bound) < 1e-9, f"eigenvalue {i}: wrong Chebyshev residual"


# ---------------------------------------------------------------------------------------------------------------------
# Transformer, training, probes


def tiny_config(**changes):
    return icl_newton.Config(**(dict(d=3, n=6, layers=2, width=16, heads=2, steps=12, batch=8, probes=64, prompts=16) | changes))


def tiny_model(**changes):
    torch.manual_seed(SEED)
    model = icl_newton.MODELS[changes.get("model", "transformer")](tiny_config(**changes))
    with torch.no_grad():
        model.read_out.normal_()
    return model


def test_transformer_heads_split_the_width():
    """The block's attention against a head-by-head computation with plain matrices."""
    model, h = tiny_model(), torch.randn(2, 5, 16)
    Q, K, V, O = model.attention[0].detach()
    heads = []
    for i in range(2):
        rows = slice(8 * i, 8 * i + 8)
        q, k, v = ((h @ M.T)[..., rows] for M in (Q, K, V))
        q, k = (((z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()) for z in (q, k))
        heads.append(slow_attention(q, k, v))
    close(model.attend(h, model.attention[0]).detach(), torch.cat(heads, -1) @ O.T, "multi-head attention", 1e-4)


def test_predictions_are_made_at_the_x_tokens():
    model, (xs, ys) = tiny_model(), some_prompts(prompts=3, n=6, d=3)
    xs, ys = xs.float(), ys.float()
    h = model.residual_streams(xs, ys)[-1]
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    expected = torch.stack([h[:, 2 * t] @ model.read_out for t in range(7)], dim=1)
    close(model(xs, ys).detach(), expected.detach(), "entry t is read at token x_{t+1}", 1e-5)
    close(model(xs[:, :4], ys[:, :4]).detach(), expected[:, :4].detach(), "a shorter prompt must give the same answers", 1e-5)


def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values():
    G = torch.randn(2, 3, 12, random.choice([5, 12, 30]))
    for slow, fast in zip(G.flatten(0, 1), icl_newton.orthogonalize(G).flatten(0, 1)):
        U, s, Vh = torch.linalg.svd(slow, full_matrices=False)
        inner = U.T @ fast @ Vh.T
        assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3, "the singular vectors must stay"
        strong = s > 0.05 * s[0]
        assert ((inner.diagonal()[strong] > 0.4) & (inner.diagonal()[strong] < 1.4)).all(), "singular values near 1"


def test_readouts_recover_a_planted_layer_readout():
    """Plant y = a linear function of one layer's state: that layer, and no earlier one, must predict it exactly."""
    model, (xs, ys) = tiny_model(), icl_newton.sample_prompts(200, 6, 3)
    planted = (model.states(xs, ys)[1] @ torch.randn(16)).detach() + 0.7
    H = torch.cat(list(icl_newton.probe_features(model, xs, ys, chunk=64)), dim=1)
    assert H.shape == (3, 200, 7, 17) and (H[..., -1] == 1).all(), "features of all layers with a constant beside them"
    r = icl_newton.least_squares_readout(H.flatten(1, 2), planted.double().flatten())
    errors = [(h.flatten(0, 1) @ w - planted.flatten()).abs().max().item() for h, w in zip(H, r)]
    assert errors[1] < 1e-4 < errors[0], f"errors by layer {errors}"
    fitted = icl_newton.fit_readouts(model, xs, ys)
    predictions = icl_newton.layer_predictions(model, xs, ys, fitted)
    expected = np.stack([h.numpy() @ np.linalg.lstsq(h.reshape(-1, 17).numpy(), ys.flatten().double().numpy(), rcond=1e-7)[0] for h in H])
    close(predictions, torch.tensor(expected), "each layer predicts with its own least-squares readout", 1e-3)


def test_curriculum_grows_to_the_whole_problem():
    config = tiny_config(d=5, n=10, curriculum=3)
    active = []
    for step in (0, 3, 8, 9, 50):
        xs, ys = icl_newton.training_prompts(config, step, torch.Generator().manual_seed(1))
        assert xs.shape[2] == 5 and xs.shape[:2] == ys.shape
        active.append((int(xs.abs().amax((0, 1)).count_nonzero()), xs.shape[1] - 1))
    assert active == [(2, 6), (3, 8), (4, 10), (5, 10), (5, 10)]


def test_training_lowers_the_loss(tmp_path, capsys):
    model = icl_newton.train(tiny_config(d=2, n=4, steps=300, batch=32, width=32, checkpoints=str(tmp_path)))
    assert model.losses[-20:].mean() < 0.75 * model.losses[:20].mean(), "300 steps must have learned something"
    assert "300/300" in capsys.readouterr().out


class Killed(BaseException):
    pass


def test_a_killed_run_ends_with_the_same_weights(tmp_path, monkeypatch, capsys):
    whole = icl_newton.train(tiny_config(checkpoints=str(tmp_path / "a"), save_every=5))
    config, real, calls = tiny_config(checkpoints=str(tmp_path / "b"), save_every=5), icl_newton.training_prompts, []

    def prompts_until_killed(config, step, generator):
        calls.append(step)
        if len(calls) == 8:
            raise Killed
        return real(config, step, generator)

    monkeypatch.setattr(icl_newton, "training_prompts", prompts_until_killed)
    with pytest.raises(Killed):
        icl_newton.train(config)
    resumed = icl_newton.train(config)
    assert calls[8] == 5, "the second run must go on from the checkpoint of step 5"
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b), "a resumed run must end with the same weights, bit for bit"
    assert torch.equal(whole.losses, resumed.losses)
    calls.clear()
    icl_newton.train(config)
    assert not calls, "a third run must train nothing"


def test_a_damaged_checkpoint_is_kept_and_reported(tmp_path, capsys):
    config = tiny_config(checkpoints=str(tmp_path))
    good = icl_newton.train(config)
    path = icl_newton.checkpoint_path(config)
    other = icl_newton.checkpoint_path(tiny_config(seed=2, checkpoints=str(tmp_path)))
    path.rename(other)
    path.write_bytes(b"not a checkpoint")
    assert icl_newton.load_checkpoint(config) is None and icl_newton.load_checkpoint(tiny_config(seed=2, checkpoints=str(tmp_path))) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and str(path) in lines[0] and str(other) in lines[1] and "another configuration" in lines[1], lines
    assert any(p.read_bytes() == b"not a checkpoint" for p in tmp_path.iterdir()), "the damaged file must be kept"
    again = icl_newton.train(config)
    assert all(torch.equal(a, b) for a, b in zip(good.parameters(), again.parameters())), "and training starts anew"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    real = icl_newton.training_prompts

    def poisoned(config, step, generator):
        xs, ys = real(config, step, generator)
        return xs, ys * (math.nan if step == 6 else 1)

    monkeypatch.setattr(icl_newton, "training_prompts", poisoned)
    with pytest.raises(FloatingPointError, match="at step 7"):
        icl_newton.train(tiny_config(checkpoints=str(tmp_path), save_every=5))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def test_line_fit_and_its_r2():
    x, y = torch.arange(6.0, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    slope, intercept, r2 = icl_newton.line_fit(x, y)
    for i in range(3):
        expected = np.polyfit(x.numpy(), y[i].numpy(), 1)
        assert np.allclose([slope[i], intercept[i]], expected)
        assert abs(r2[i] - np.corrcoef(x.numpy(), y[i].numpy())[0, 1] ** 2) < 1e-9, "R^2 is the squared correlation"


def test_bootstrap_intervals_cover_a_planted_mean():
    covered, rounds = 0, 200
    for _ in range(rounds):
        low, high = icl_newton.interval(icl_newton.bootstrap(torch.randn(1, 100, dtype=torch.float64) + 3.0, 400))
        covered += bool(low[0] <= 3.0 <= high[0])
    assert 0.87 <= covered / rounds <= 0.99, f"95% intervals cover the truth in {covered} of {rounds}"


def test_match_layers_finds_planted_steps():
    """A network whose layer l is Newton's step 2l must be matched at 2l, with slope 2, R^2 1 and no spread."""
    xs, ys = icl_newton.sample_prompts(64, 8, 4)
    steps = icl_newton.newton(xs, ys, 14)
    match = icl_newton.match_layers(steps[::2], steps, range(15), ys)
    assert match.best.tolist() == [2, 4, 6, 8, 10, 12, 14] and torch.equal(match.best_interval[0], match.best)
    assert abs(match.slope - 2) < 1e-9 and match.r2 > 1 - 1e-9
    counts = [2**k for k in range(12)]
    descent = icl_newton.gradient_descent(xs, ys, counts)
    match = icl_newton.match_layers(descent[1::2], descent, counts, ys, log2=True)
    assert abs(match.slope - 2) < 1e-9, "doublings per layer: the line is fitted to log2 of the steps"
    match = icl_newton.match_layers(steps[::2], steps, range(15), ys, measure=icl_newton.negative_distance)
    assert match.best.tolist() == [2, 4, 6, 8, 10, 12, 14], "the L2 distance must find itself, too"


def test_squared_error_of_predicting_zero_is_one():
    xs, ys = icl_newton.sample_prompts(4000, 6, 3)
    error = icl_newton.squared_error(torch.zeros(1, 4000, 7), ys, 3)
    assert error.shape == (1, 7) and (error - 1).abs().max() < 0.1


def slow_solution_weights(xs, ys, solve):
    return torch.tensor(np.array([[solve(x[:t], y[:t]) for t in range(len(x))] for x, y in zip(xs.numpy(), ys.numpy())]))


def test_induced_weights_of_a_solver_are_its_weights():
    xs, ys = some_prompts()
    weights, r2 = icl_newton.induced_weights(lambda x, y: icl_newton.newton(x, y, [0, 3], alpha=2e-4), xs, ys)
    expected = slow_solution_weights(xs, ys, lambda X, y: np.array(slow_newton(3, 2e-4)(X, y))[[0, 3]])
    close(weights, expected.permute(2, 0, 1, 3), "fit w to the answers after the same t examples", 1e-8)
    assert (r2[:, 1:] > 1 - 1e-9).all(), "a linear rule has R^2 = 1"


def test_a_learner_that_is_not_linear_in_the_query_is_found_out():
    """answer = |x_q|_1-like part beside a linear part of the same size: R^2 must be what numpy says."""
    xs, ys = some_prompts(prompts=3)
    w, queries = torch.randn(xs.shape[-1], dtype=torch.float64), torch.randn(50, xs.shape[-1])
    answer = lambda x: x @ w + x.abs().sum(-1)
    weights, r2 = icl_newton.induced_weights(lambda x, y: answer(x.double())[None], xs, ys, queries)
    Q, a = queries.double().numpy(), answer(queries.double()).numpy()
    fit = np.linalg.lstsq(Q, a, rcond=None)[0]
    close(weights[0, 0, 0], torch.tensor(fit), "least squares over the queries", 1e-8)
    assert abs(r2[0, 0].item() - (1 - ((a - Q @ fit) ** 2).sum() / (a**2).sum())) < 1e-9 and r2.max() < 0.95


def test_similarity_of_weights_is_a_mean_cosine():
    a, b = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(3, 3, 5, 4, dtype=torch.float64)
    expected = [[np.mean([a[i, p, t] @ b[j, p, t] / (a[i, p, t].norm() * b[j, p, t].norm()) for p in range(3) for t in range(1, 5)])
                 for j in range(3)] for i in range(2)]
    close(icl_newton.similarity_of_weights(a, b), torch.tensor(expected), "mean over prompts and prefixes t = 1..n")


def test_spectral_filter_equals_the_closed_forms():
    d, n, lr, alpha = 3, 6, 0.02, 1e-3
    spectrum = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)  # planted: X^T X = U diag(spectrum) U^T at t = d
    U = torch.linalg.qr(torch.randn(4, d, d, dtype=torch.float64)).Q
    xs = torch.cat([spectrum.sqrt()[:, None] * U.mT, torch.randn(4, 1, d, dtype=torch.float64)], dim=1)
    ys = torch.einsum("ptd,pd->pt", xs, torch.randn(4, d, dtype=torch.float64))
    edges = torch.tensor([0.5, 2.0, 5.0, 10.0], dtype=torch.float64)
    for learner, closed in (
        (lambda x, y: icl_newton.gradient_descent(x, y, [0, 5, 40], lr=lr), [1 - (1 - lr * spectrum) ** k for k in (0, 5, 40)]),
        (lambda x, y: icl_newton.newton(x, y, [0, 2, 6], alpha=alpha), [1 - (1 - alpha * spectrum**2) ** (2**k) for k in (0, 2, 6)]),
    ):
        weights, _ = icl_newton.induced_weights(learner, xs, ys)
        last = icl_newton.spectral_filter(weights, xs, ys, edges, prefixes=[d])
        close(last, torch.stack(closed), "the filter must be its closed form", 1e-7)


def test_forgetting_asks_old_examples_again():
    xs, ys = some_prompts(prompts=3, n=6, d=4)
    slow = np.zeros(6)
    for x, y in zip(xs.numpy(), ys.numpy()):
        w = np.zeros(4)
        for xi, yi in zip(x[:6], y[:6]):
            w = w + xi * (yi - w @ xi) / (xi @ xi)
        slow += (x[:6] @ w - y[:6]) ** 2 / 3 / 4
    close(icl_newton.forgetting_error(icl_newton.online_gradient_descent, xs, ys), torch.tensor(slow), "error on x_i after all n examples")
    assert slow[-1] < 1e-9, "the newest example is never forgotten"


# ---------------------------------------------------------------------------------------------------------------------
# The program


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--figures", "nonsense"], "nonsense"),
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--d", "0"], "--d"),
        (["--n", "-3"], "--n"),
        (["--steps", "many"], "--steps"),
        (["--noise", "-1"], "--noise"),
        (["--kappa", "0.5"], "--kappa"),
        (["--muon_lr", "nan"], "--muon_lr"),
        (["--width", "30", "--heads", "4"], "--heads"),
        (["--preset", "huge"], "huge"),
        (["--device", "tpu"], "tpu"),
        (["--model", "mamba"], "mamba"),
        pytest.param(["--device", "cuda"], "CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
        (["--out", "{tmp}/a_file/x"], "cannot write"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("mine")
    status = icl_newton.main([a.format(tmp=tmp_path) for a in arguments])
    out, err = capsys.readouterr()
    assert status == 2 and err.count("\n") == 1 and word in err, f"status {status}, stderr {err!r}"
    assert not out and [p.name for p in tmp_path.iterdir()] == ["a_file"], "nothing may be done or written"


def test_every_setting_has_a_flag_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        icl_newton.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in icl_newton.dataclasses.fields(icl_newton.Config):
        assert f"--{field.name} " in text, field.name


def test_a_quick_run_as_a_user_starts_it(tmp_path):
    """The whole program in a fresh process and folder; a second run trains nothing and ends with the same numbers."""
    command = [sys.executable, str(HERE / "icl_newton.py"), "--preset", "quick"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "figures" / "quick"
    results = json.loads((out / "results.json").read_text())
    assert set(results["figures"]) == set(icl_newton.FIGURES)
    for name in icl_newton.FIGURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    for key in ("seconds", "claims", "config", "training_flops_per_second", "matrix_product_flops_per_second", "peak_memory_bytes"):
        assert results[key], key
    assert "500/500" in first.stdout and len(results["claims"]) == first.stdout.count("paper ")
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    again = json.loads((out / "results.json").read_text())
    assert second.returncode == 0 and "steps/s" not in second.stdout, "the second run must find its checkpoints"
    assert again["figures"]["rates"] == results["figures"]["rates"] and again["claims"] == results["claims"]
