"""
Tests of icl_newton.py, and the grader of its ten exercises.

    python -m pytest                      everything
    python -m pytest -k test_ex           the exercises, with points at the end
    python -m pytest -k ex04              one exercise

Data are drawn anew in every run; a failing test prints ICL_SEED, and setting it repeats the run.
"""

import functools
import os
import re
from unittest import mock

import numpy as np
import pytest
import torch

import icl_newton

SEED = int(os.environ.get("ICL_SEED", torch.seed() % 10**6))

EXERCISES = [  # number, function, idea, equation, minutes, difficulty, points
    (1, "sample_prompts", "data with a condition number", "x ~ N(0, Sigma)", 30, "easy", 5),
    (2, "gradient_descent", "a method is a trajectory", "w <- w - eta (S w - b)", 30, "easy", 10),
    (3, "newton_start", "why alpha matters", "alpha < 2 / lambda_max(S)^2", 15, "easy", 5),
    (4, "newton", "doubling the digits", "M <- 2M - M S M", 30, "medium", 15),
    (5, "interleave", "a prompt as tokens", "x_1, y_1, ..., x_{n+1}", 15, "easy", 5),
    (6, "causal_attention", "no future", "softmax(q k^T / sqrt(D) + mask) v", 25, "medium", 10),
    (7, "least_squares_readout", "what a layer knows", "least (H r - y)^2", 20, "medium", 10),
    (8, "similarity_of_errors", "like errors? (and error_cosines, best_match)",
     "mean of cos(e_a, e_b)", 30, "medium", 10),
    (9, "newton_layer", "Newton's weights, by hand", "T <- 2T - T S T", 60, "hard", 20),
    (10, "optimal_preconditioner", "linear attention learns it", "Ahn, theorem 1", 15, "easy", 10),
]  # fmt: skip


pytest_plugins = __name__  # makes pytest call this file's hook, the function below


def pytest_terminal_summary(terminalreporter):
    """Points for every exercise that was run, if all of its tests passed."""
    passed = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for number in re.findall(r"test_ex(\d\d)", report.nodeid):
                passed[int(number)] = outcome == "passed"
    rows = [(*row, row[-1] * passed[row[0]]) for row in EXERCISES if row[0] in passed]
    for number, name, *_, points, got in rows:
        terminalreporter.write_line(f"  ex{number:02} {name:<24}{got:>3} of {points}")
    if rows:
        got, points = (sum(row[i] for row in rows) for i in (-1, -2))
        terminalreporter.write_line(f"  {got} of {points} points")


@pytest.fixture(autouse=True)
def icl():
    """The program. Every test starts from the run's seed, so that ICL_SEED repeats it alone."""
    print(f"ICL_SEED={SEED}")
    torch.manual_seed(SEED)
    return icl_newton


# ------------------------------------------------------------------------------------------------
# What the tests share, and then the tests


def draws(*shape):
    """Standard normal numbers, float64."""
    return torch.randn(*shape, dtype=torch.float64)


def orthonormal(*shape):
    return torch.linalg.qr(draws(*shape)).Q


def call(function, *tensors, **options):
    """function(*tensors, **options), which must leave the tensors as they were."""
    before = [z.clone() for z in tensors]
    result = function(*tensors, **options)
    assert all(map(torch.equal, before, tensors)), "an input was changed in place: work on a copy"
    return result


def check_form(z, shape, message, dtype=torch.float64):
    """First the dtype (None: any), then the shape, then that all entries are finite."""
    assert z.dtype == (dtype or z.dtype), f"dtype {z.dtype}, not {dtype}: {message}"
    assert z.shape == shape, f"shape {tuple(z.shape)}, expected {tuple(shape)}: {message}"
    assert z.isfinite().all(), f"some entries are nan or infinite: {message}"


def close(actual, expected, message, tolerance=1e-9, dtype=torch.float64):
    """The form of `expected`, then its entries, relative to the largest."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    check_form(actual, expected.shape, message, dtype)
    error = (actual.double() - expected.double()).abs().max() / max(expected.abs().max(), 1e-9)
    assert error <= tolerance, f"{message} (largest relative error {error:.1e})"


def check_standard(z, message, tolerance):
    """z (samples, d), float64, must have mean 0 and covariance I."""
    close(z.mT @ z / len(z), torch.eye(z.shape[1]), f"{message}: covariance", tolerance)
    close(z.mean(0) + 1, torch.ones(z.shape[1]), f"{message}: the mean is not 0", tolerance)


def slow_answers(xs, ys, counts, left, ridge=0.0):
    """[k, p, t] = w_k.x_{t+1}; left(eigenvalue, all, k): share of the way to least squares left."""
    answers = np.zeros((len(counts), *ys.shape))
    for p, t in np.ndindex(*ys.shape):
        X, y, query = (z.double().numpy() for z in (xs[p, :t], ys[p, :t], xs[p, t]))
        values, U = np.linalg.eigh(X.T @ X + ridge * np.eye(len(query)))
        for value, u in zip(values, U.T):
            if value > 1e-9 * values[-1]:
                goal = (u @ X.T @ y) / value * (u @ query)
                answers[:, p, t] += [(1 - left(value, values, k)) * goal for k in counts]
    return answers


SOLVER_CASES = [  # steps; size of a step (None: the default); ridge; prompts, n, d
    (5, 10.0, 0, (3, 9, 4), "sign, factor, float32, or a prefix that holds what it predicts?"),
    (range(2, 7, 2), 10.0, 0, (3, 9, 4), "entry [i] is predicted after steps[i] steps"),
    (4, 40.0, 0, (3, 9, 4), "a large step, which overshoots: 1 - lr lambda < 0"),
    (3, 0.0, 0, (3, 9, 4), "0 is a size like any other: only None means the default"),
    (5, None, 0, (3, 9, 4), "the default: each prefix has its own, S = 0 too; no large guard"),
    (5, None, 0.03, (3, 9, 4), "`ridge` adds ridge I to S, also where the default is made"),
    ([0, 3, 300], None, 0.03, (2, 9, 4), "rounding grew: float32, or the order of M S M"),
    (3, None, 0, (1, 1, 1), "one prompt, one example, d = 1"),
    (3, None, 0, (1, 3, 5), "fewer examples than dimensions"),
]


def check_solver(solver, option, left):
    """Check a trajectory; left(size of a step or None, eigenvalue, all of them, k)."""
    for steps, size, ridge, (prompts, n, d), message in SOLVER_CASES:
        options = {"ridge": ridge} | ({} if size is None else {option: size})
        counts = range(steps + 1) if isinstance(steps, int) else steps
        for dtype in (torch.float32, torch.float64):
            xs = orthonormal(prompts, n + 1, d, d).flatten(1, 2)[:, : n + 1]  # well conditioned
            xs, ys = (xs / torch.linspace(4, 10, d)).to(dtype), draws(prompts, n + 1).to(dtype)
            expected = slow_answers(xs, ys, counts, functools.partial(left, size), ridge)
            close(call(solver, xs, ys, steps=steps, **options), expected, message)


def test_ex01_shapes_and_generator(icl):
    every = dict(kappa=7.0, noise=0.1, tails=3)
    for P, n, d, law in ((3, 4, 2, {}), (2, 1, 1, every), (1, 5, 3, every)):
        xs, ys = icl.sample_prompts(P, n, d, **law)
        check_form(xs, (P, n + 1, d), "xs (prompts, n+1, d)", torch.float32)
        check_form(ys, (P, n + 1), "ys (prompts, n+1)", torch.float32)
        assert not torch.equal(xs, icl.sample_prompts(P, n, d, **law)[0]), "two calls, same prompts"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g, again = (torch.Generator(device).manual_seed(SEED) for _ in range(2))
    for a, b, c in zip(*(icl.sample_prompts(3, 4, 2, generator=z, **every) for z in (g, again, g))):
        assert torch.equal(a, b), "same seed, other prompts: pass the generator to every draw"
        assert not torch.equal(a, c), "the next draws from a generator gave the same prompts"
        assert a.device.type == device, "prompts must be on the generator's device"


def test_ex01_covariance(icl):
    why = "trace d; d//2 eigenvalues are kappa times the others, and x scales by their *roots*"
    for d, kappa in ((4, 1.0), (5, 30.0), (2, 7.0), (1, 9.0)):
        values = torch.tensor([1.0] * (d - d // 2) + [kappa] * (d // 2))
        for x in icl.sample_prompts(2, 20_000, d, kappa=kappa)[0].double():
            z = x @ torch.linalg.eigh(x.mT @ x)[1] * (values.mean() / values).sqrt()
            check_standard(z, why, 0.12)
            assert abs((z**4).mean() - 3) < 0.4, "x must be Gaussian"


def test_ex01_uniform_eigenbasis(icl):
    """With a huge kappa and d = 3 every x points along the first axis of its prompt's basis."""
    x = icl.sample_prompts(15_000, 1, 3, kappa=1e4)[0][:, 0].double()
    u = x / x.norm(dim=1, keepdim=True)
    why = "each prompt needs its own eigenbasis, and a uniform one: made of *normal* numbers"
    check_standard(3**0.5 * u, why, 0.05)
    assert abs((u**4).sum(-1).mean() - 0.6) < 0.008, why


def test_ex01_rule_and_noise(icl):
    """One w* explains a prompt; what the same draws gain with more noise is the noise."""
    for law in ({}, dict(kappa=25.0), dict(tails=2), dict(kappa=9.0, tails=3)):
        prompts = []
        for noise in (0.0, 0.4, 1.4):
            law |= dict(noise=noise, generator=torch.Generator().manual_seed(SEED))
            prompts.append([z.double() for z in icl.sample_prompts(3000, 7, 3, **law)])
        (x, y), noise = prompts[0], prompts[2][1] - prompts[1][1]
        w = torch.linalg.pinv(x) @ y[..., None]
        missed = ((x @ w)[..., 0] - y).abs().amax(1) / y.abs().amax(1)
        assert missed.max() < 1e-3, "without noise y = w*.x, one w* a prompt, for the x returned"
        check_standard(w[..., 0], "w* ~ N(0, I), one a prompt; y comes from the *finished* x", 0.18)
        assert abs((w**4).mean() - 3) < 0.7, "w* is not normal"
        check_standard(noise, "noise: *standard deviation*; every y, the last too, its own", 0.18)
        far = noise[x.norm(dim=-1) > x.norm(dim=-1).median()]
        assert abs(far.square().mean() - 1) < 0.1, "noise must not depend on x"


def test_ex01_tails(icl):
    """|x|^2 / (|x|^2 + tails) has a beta distribution: mean and variance are known."""
    for d, tails, kappa in ((4, 3, 1.0), (1, 5, 9.0)):
        r = icl.sample_prompts(250, 199, d, tails=tails, kappa=kappa)[0].double().square().sum(-1)
        mean = d / (d + tails)
        z = (r / (r + tails) - mean) / (2 * mean * (1 - mean) / (d + tails + 2)) ** 0.5
        why = "tails: each x_i, whole, over the root *mean* square of its own `tails` normals"
        close([z.mean() + 1, z.var(0).mean(), z.var(1).mean()], torch.ones(3), why, 0.05, None)


def test_ex02_trajectories(icl):
    def left(lr, value, values, k):
        return (1 - (1 / values[-1] if lr is None else lr) * value) ** k

    check_solver(icl.gradient_descent, "lr", left)


def test_ex03_each_matrix_has_its_alpha(icl):
    for batch, d, scale, dtype in (((), 3, 1, torch.float64), ((4,), 1, 1e-3, torch.float32),
                                   ((2, 3), 4, 1e3, torch.float64)):  # fmt: skip
        X = scale * draws(*batch, d + 9, d)
        X[0] = 0  # the empty prefix, if there is a batch
        S = (X.mT @ X).to(dtype)
        alpha = call(icl.newton_start, S)
        check_form(alpha, (*batch, 1, 1), "a finite alpha for each S, S = 0 too", dtype)
        norm = (alpha * (S @ S)).square().sum((-2, -1)).sqrt()
        why = "alpha S S^T must have Frobenius norm 1, for each S"
        close(norm, (S[..., 0, 0] > 0).to(dtype), why, 1e-5, dtype)


def test_ex04_trajectories(icl):
    def left(alpha, value, values, k):
        alpha = 0.7 / values.sum() ** 2 if alpha is None else alpha
        return (1 - alpha * value**2) ** (2.0**k)

    def start(S):  # a safe alpha, but not exercise 3's, which this one must not need
        return 0.7 / (torch.einsum("...ii", S)[..., None, None] ** 2 + 1e-30)

    with mock.patch.object(icl, "newton_start", start):
        check_solver(icl.newton, "alpha", left)


def test_ex05_tokens(icl):
    for P, n, d, dtype in ((3, 4, 3, torch.double), (2, 3, 1, torch.float), (1, 0, 2, torch.float)):
        xs, ys = draws(P, n + 1, d).to(dtype), draws(P, n + 1).to(dtype)
        tokens = call(icl.interleave, xs, ys)
        check_form(tokens, (P, 2 * n + 1, d), "(P, 2n+1, d): the last y is left out", dtype)
        assert torch.equal(tokens[:, ::2], xs), "x_1, x_2, ... stand at the even positions"
        assert torch.equal(tokens[:, 1::2, 0], ys[:, :n]), "y_t follows x_t, in the first entry"
        assert not tokens[:, 1::2, 1:].any(), "y is padded with zeros"


def test_ex06_causal_attention(icl):
    average = "token i averages v_0..v_i by a softmax of q_i.k_j / sqrt(D)"
    large = "scores of -1000 or 1000: mask by -inf, and let softmax do the exponentials"
    for *shape, scale, why in ((5, 3, 1, average), (2, 3, 5, 2, 1, average), (20, 4, 3, 40, large)):
        q, k, v = scale * draws(*shape), scale * draws(*shape), draws(*shape)
        expected = torch.zeros_like(v)
        for *batch, i in np.ndindex(*shape[:-1]):
            past = (*batch, slice(i + 1))
            scores = k[past] @ q[(*batch, i)] / shape[-1] ** 0.5
            expected[(*batch, i)] = (scores - scores.logsumexp(0)).exp() @ v[past]
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-2)):
            out = call(icl.causal_attention, q.to(dtype), k.to(dtype), v.to(dtype))
            close(out, expected, why, tolerance, dtype)


def test_ex07_planted_readout(icl):
    """H = B U diag(sizes) rows, y = B (1, ..., 1) + something orthogonal to H: r is known."""
    sizes, all_six = torch.tensor([1e-3, 1, 2, 3, 4, 5]).double(), torch.eye(6).double()
    six_of_nine = torch.eye(9).double()[torch.rand(5, 8, 9).argsort()[..., :6]]
    for batch, samples, rows, why in (
        ((), 60, all_six, "no ridge, all in float64, small columns count"),
        ((5, 8), 60, six_of_nine, "columns of zeros: not for inv, nor lstsq's default driver"),
        ((40,), 60, orthonormal(9, 6).mT, "columns that depend on others, up to rounding"),
        ((40,), 6, orthonormal(9, 6).mT, "fewer samples than columns"),
    ):
        B, U = orthonormal(samples, min(samples, 7)), orthonormal(*batch, 6, 6)
        r = call(icl.least_squares_readout, B[:, :6] @ (U * sizes) @ rows, B.sum(1))
        expected = (rows.mT @ (U.sum(-2) / sizes)[..., None])[..., 0]
        close(r, expected, f"the shortest r of least ||H r - y||: {why}", 1e-6)


def test_ex08_cosines(icl):
    for A, B, P, n, dtype, size in ((3, 2, 4, 5, torch.double, 1e-4), (1, 4, 3, 1, torch.float, 1)):
        a, b, ys = draws(A, P, n + 1), draws(B, P, n + 1), 10 * draws(P, n + 1)
        a, b = (z / z[..., 1:].norm(dim=-1, keepdim=True) for z in (a, b))
        a[:, 0] = 0
        expected = torch.stack([(one * b)[..., 1:].sum(-1) for one in a])
        size = size * torch.arange(1.0, P + 1)[:, None]
        inputs = [z.to(dtype) for z in (size * a + ys, size * b + ys, ys)]
        why = "cosines of prediction - y over t = 1..n; 0 for an error of 0, but not of 1e-4"
        close(call(icl.error_cosines, *inputs), expected, why, 5e-4)
        close(call(icl.similarity_of_errors, *inputs), expected.mean(-1), "mean over prompts", 5e-4)


def test_ex08_best_match(icl):
    for shape in ((3, 7), (7, 3), (2, 3, 5), (2, 2, 1, 4)):
        best = torch.randint(shape[-1], shape[:-1])
        similarity = -draws(*shape).abs().scatter(-1, best[..., None], -0.1)
        close(call(icl.best_match, similarity), best, "*index* of b's best step", 0, torch.int64)


def test_ex09_linear_heads(icl):
    Q, K, V, h = draws(2, 3), draws(2, 3), draws(3, 3), draws(5, 3)
    added = icl.relu_attention(h, icl.linear_heads(Q, K, V), torch.ones(5, 5).double()) - h
    close(added, (h @ Q.mT) @ (h @ K.mT).mT @ (h @ V.mT), "two heads add s V, sign and all")


def test_ex09_newton_layer(icl):
    for n, d, width in ((7, 3, 7), (3, 5, 11), (3, 1, 3)):
        (one, two), (up, down) = icl.newton_layer(d)
        shapes = [(d, width), (d, width), (width, width)] * 2 + [(2 * d, width), (width, 2 * d)]
        for matrix, shape in zip([*one, *two, up, down], shapes, strict=True):
            check_form(matrix, shape, "two heads (Q, K, V), then mlp = (up, down)")
        X, T, y = draws(n + 1, d), draws(d, d), draws(n + 1, 1)
        h, S = torch.hstack([X @ T.mT, X, y]), X[:n].mT @ X[:n]  # the last token is a query
        mask = (torch.arange(n + 1) < n).double().expand(n + 1, n + 1)
        added = icl.relu_attention(h, [one, two], mask) - h
        assert not added[:, d:].any(), "attention must write into the top block only: V's rows"
        for wrong, mistake in (
            (T @ S @ T, "attention adds +1/2 T S T: the sign of V"),
            (-2 * T @ S @ T, "attention adds -T S T, and the MLP will double it: V needs -1/2"),
            (0 * T, "the heads cancel, or V is 0: the second head needs -Q *and* -V"),
            (-T @ S @ T.mT, "scores are <x_j, T x_t>; <T x_j, x_t> makes T S T^T"),
            (-T @ S, "the score is <x_j, x_t>: the query must read T x_t"),
            (-S @ T, "the value is x_j: V must read T x_j"),
        ):
            assert d == 1 or (2 * added[:, :d] - X @ wrong.mT).abs().max() > 1e-6, mistake
        close(2 * added[:, :d], -X @ (T @ S @ T).mT, "attention adds -1/2 T S T x: heads V, -V")
        added = (h @ up.mT).relu() @ down.mT
        assert not added[:, d:].any(), "the MLP must leave x and y alone"
        close(added[:, :d], h[:, :d], "the MLP must double the top block: ReLU(a) - ReLU(-a) = a")


def test_ex10_optimal_preconditioner(icl):
    for d, n, dtype in ((3, 4, torch.float64), (5, 11, torch.float32), (1, 2, torch.float64)):
        U, values = orthonormal(d, d), torch.linspace(0.3, 2, d).double()
        A = call(icl.optimal_preconditioner, ((U * values) @ U.mT).to(dtype), n=n)
        check_form(A, (d, d), "one matrix A (d, d)", None)
        inside = U.mT @ A.double() @ U
        close(inside, inside.diagonal().diag(), "A must have Sigma's eigenvectors", 1e-4)
        rest = (1 / inside.diagonal() - (n + 1) / n * values) / values.sum()  # should be 1/n
        for wrong, mistake in (
            (0, "the sum of all eigenvalues is missing"),
            (1, "the sum of all eigenvalues goes over n"),
            (1 / n - values / n / values.sum(), "n, not n+1"),
        ):
            assert (rest - wrong).abs().max() > 1e-4, mistake
        close(rest, torch.full((d,), 1 / n), "(n+1)/n lambda_i + (1/n) sum of all, inverted", 1e-3)


# ------------------------------------------------------------------------------------------------
# For lecturers (the student's copy ends above). Homework: python test_icl_newton.py week1

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

PROGRAM = Path(__file__).with_name("icl_newton.py")
TEXT = PROGRAM.read_text("utf-8")
NUMBERS = {z[1]: z[0] for z in EXERCISES} | dict(error_cosines=8, best_match=8, linear_heads=9)
HEADS, ANSWERS, STUBS = {}, {}, {}  # of each function: to the docstring's end; the rest; no answer
for f in ast.parse(TEXT).body:
    if (name := getattr(f, "name", None)) in NUMBERS:
        lines, start = TEXT.splitlines(keepends=True), f.body[0].end_lineno
        HEADS[name] = "".join(lines[f.lineno - 1 : start])
        ANSWERS[name] = "".join(lines[start : f.end_lineno])
        STUBS[name] = f'    raise NotImplementedError("exercise {NUMBERS[name]}: {name}")\n'

# What is wrong | what stands in the answer (~: the rest of a line) | what replaces it; +: right
CHANGES = """
sample_prompts
scaled by eigenvalues, not their roots | eigenvalues.sqrt() | eigenvalues
trace is not d | eigenvalues *= d / eigenvalues.sum() | pass
one basis for the batch | draw(prompts, d, d) | draw(1, d, d)
scaled along the axes | (xs * eigenvalues.sqrt()) @ basis.mT | xs @ basis.mT * eigenvalues.sqrt()
basis of uniform numbers | draw(prompts, d, d) | torch.rand(prompts, d, d, generator=generator)
one w for all prompts | draw(prompts, d, 1) | draw(1, d, 1)
kappa forgotten in y | w_star = ~ | w_star = draw(prompts, d, 1) / kappa**0.5
tails after y | return xs, | return xs * (draw(prompts, n + 1, 1) if tails else 1),
tails: one factor a prompt | draw(prompts, n + 1, tails) | draw(prompts, 1, tails)
tails: entry by entry | draw(prompts, n + 1, tails)~ | (draw(tails, *xs.shape) ** 2).mean(0).rsqrt()
tails: one degree more | n + 1, tails | n + 1, tails + 1
noise is a variance | noise * draw | noise**0.5 * draw
last y without noise | noise * draw | noise * (torch.arange(n + 1) < n) * draw
one noise a prompt | noise * draw(prompts, n + 1) | noise * draw(prompts, 1)
noise grows with x | noise * draw | noise * xs.norm(dim=-1) / d**0.5 * draw
generator ignored in the noise | noise * draw(prompts, | noise * torch.randn(prompts,
always the same prompts | device = | generator = generator or torch.Generator(); device =
+ large ones last | [: d // 2] | [d - d // 2 :]
+ by Cholesky | xs = (~ | xs = xs @ torch.linalg.cholesky((basis * eigenvalues) @ basis.mT).mT

gradient_descent
a step too many | ** k | ** (k + 1)
lambda_max of the longest prefix | eigenvalues[..., -1:] | eigenvalues[:, -1:, -1:]
lr = 0 is not given | if lr is None | if not lr
ridge ignored | (xs, ys, ridge) | (xs, ys)
ridge not in the default lr | lr = 1 / eigenvalues | lr = 1 / (eigenvalues - ridge)
mean in place of sum | (1 - lr * | (1 - lr / len(ys[0]) *
prefix includes its own example | (xs, ys, ridge) | (xs.roll(-1, 1), ys.roll(-1, 1), ridge)
float32 | found = ~ | found = (1 - (1 - lr * eigenvalues).float() ** k.float()).double()
S = 0 | .clamp_min(TINY) |
large guard | .clamp_min(TINY) | .add(1e-8)
+ power by power | found = ~ | found = torch.stack([1 - (1 - lr * eigenvalues) ** z for z in k])
+ step by step | found = ~ | z = [0 * eigenvalues]; [z.append(z[-1] + lr * eigenvalues * \
(1 - z[-1])) for _ in range(300)]; found = torch.stack(z)[k.int().flatten()]

newton_start
twice as large | return 1 | return 2
norm of S | S @ S.mT | S
no axes kept | , keepdim=True |
division by zero | .clamp_min(TINY) |
one for all | matrix_norm(S @ S.mT, keepdim=True) | norm(S @ S).expand(*S.shape[:-2], 1, 1)
+ by hand | torch.linalg~ | (S @ S).square().sum((-2, -1), keepdim=True).sqrt().clamp_min(1e-20)
+ eigenvalues | 1 / torch.~ | torch.linalg.eigvalsh(S).norm(4, -1)[..., None, None].add(1e-15) ** -2

newton
the order S M M | M @ S @ M | S @ M @ M
the order M M S | M @ S @ M | M @ M @ S
S and M exchanged | M @ S @ M | S @ M @ S
a step too many | [counts] | [[k + (k < counts[-1]) for k in counts]]
starts from alpha I | alpha) * S | alpha) * torch.eye(len(S[0, 0])).to(S)
alpha = 0 is not given | newton_start(S) if alpha is None else alpha | alpha or newton_start(S)
ridge ignored | (xs, ys, ridge) | (xs, ys)
float32 | M @ S @ M | (M.float() @ S.float() @ M.float()).double()
+ factored | 2 * M - M @ S @ M | M @ (2 * torch.eye(S.shape[-1]).to(S) - S @ M)
+ residual | 2 * M - M @ S @ M | M + (torch.eye(S.shape[-1]) - M @ S) @ M

interleave
the answer is shown | [:, :-1] |
first all x, then all y | stack([xs, y_tokens], dim=2).flatten(1, 2) | cat([xs, y_tokens], dim=1)
y in the last entry | (0, xs.shape[-1] - 1) | (xs.shape[-1] - 1, 0)
float32 | [xs, | [xs.float(),
x changed | return | xs[..., 0] += 1; return
+ reshaped | torch.~ | torch.cat([xs, y_tokens], 2).reshape(len(xs), -1, xs.shape[-1])[:, :-1]
+ in place | return ~ | z = xs.repeat_interleave(2, 1); z[:, 1::2] = y_tokens; return z[:, :-1]

causal_attention
blind to itself | .triu(1) | .triu(0)
the mask transposed | + mask) | + mask.mT)
softmax over queries | .softmax(-1) | .softmax(-2)
scale D | math.sqrt(D) | D
masked after the softmax | return ~ | return (q / math.sqrt(D) @ k.mT).softmax(-1).tril() @ v
a small mask | -math.inf | -100.0
softmax by hand | (q ~ | F.normalize((q / math.sqrt(D) @ k.mT).exp().tril(), p=1, dim=-1) @ v
q changed | (q / math.sqrt(D) | (q.div_(math.sqrt(D))
+ torch's own | return ~ | return F.scaled_dot_product_attention(q, k, v, is_causal=True)
+ large negative mask | -math.inf | -1e9

least_squares_readout
inverse | pinv(H.mT @ H, hermitian=True, rtol=1e-12) | inv_ex(H.mT @ H).inverse
default driver | times(~ | torch.linalg.lstsq(H, y.expand(H.shape[:-1])[..., None])[0][..., 0]
float32 | pinv(H.mT @ H, hermitian=True, rtol=1e-12) | pinv((H.mT @ H).float()).double()
float32 at the end | y)) | y)).float()
tiny ridge | H.mT @ H, | H.mT @ H + 1e-8 * torch.eye(H.shape[-1]).to(H),
y centred | y)) | y - y.mean()))
+ SVD | times~ | torch.linalg.lstsq(H, y.expand(H.shape[:-1])[..., None], driver="gelsd")[0][..., 0]
+ pinv of H | return ~ | return times(torch.linalg.pinv(H), y)

error_cosines
t = 0 included | [..., 1:] |
predictions in place of errors | z.double() - ys | z.double()
large epsilon | dim=-1) | dim=-1, eps=1e-3)
nan for no error | return | a = a / a.norm(dim=-1, keepdim=True); return
float32 | z.double() - ys | z.float() - ys.float()
+ torch's own | return ~ | return F.cosine_similarity(a[:, None], b, dim=-1)

similarity_of_errors
mean over b | .mean(-1) | .mean(1)
pooled | error~ | F.normalize((traj_a - ys).flatten(1)) @ F.normalize((traj_b - ys).flatten(1)).mT

best_match
wrong axis | argmax(-1) | argmax(-2)
the value | argmax(-1) | amax(-1)
+ max | .argmax(-1) | .max(dim=-1).indices

newton_layer
wrong sign | V=-0.5 | V=0.5
1/2 missing | V=-0.5 * | V=-
equal heads | linear~ | [(Tx, x, -0.5 * Tx.mT @ Tx), (-Tx, x, -0.5 * Tx.mT @ Tx)]
query and key exchanged | Q=Tx, K=x | Q=x, K=Tx
values are x | Tx.mT @ Tx) | Tx.mT @ x)
negative half lost | [Tx, -Tx] | [Tx, Tx * 0]
float32 | (up, up.mT) | (up.float(), up.mT)
+ heads exchanged | return heads, | return heads[::-1],
+ scaled | heads = ~ | heads = [(2 * s * Tx, x, -s / 4 * Tx.mT @ Tx) for s in (1, -1)]

optimal_preconditioner
n in place of n+1 | (n + 1) / n * | 1 *
trace not over n | eigenvalues.sum() / n | eigenvalues.sum()
not inverted | U / ( | U * (
transposes exchanged | @ U.mT | @ U
Sigma changed | (Sigma) | (Sigma.mul_(1.5))
+ inverse | U / ~ | ((n + 1) / n * Sigma + Sigma.trace() / n * torch.eye(len(U)).to(U)).inverse()
+ float32 | U / ~ | ((n + 1) / n * Sigma + Sigma.trace() / n * torch.eye(len(U))).float().inverse()
"""
WRONG, RIGHT = [], []  # "function | what is wrong | what stands in its answer | what replaces it"
for section in CHANGES.strip().split("\n\n"):
    name, *lines = section.splitlines()
    for line in lines:
        (RIGHT if line[0] == "+" else WRONG).append(f"{name} | {line}")


def failure(number, answers):
    """What the tests of an exercise first find wrong if the functions have these answers."""
    module = SimpleNamespace(**vars(icl_newton))
    exec("".join(HEADS[name] + answers[name] for name in HEADS), vars(module))
    for name, test in list(globals().items()):
        if name.startswith(f"test_ex{number:02}"):
            torch.manual_seed(SEED)
            try:
                test(module)
            except Exception as error:
                return error


@pytest.mark.parametrize("change", WRONG + RIGHT, ids=lambda change: change[:60])
def test_wrong_answers_fail_and_right_ones_pass(change):
    name, _, old, new = re.split(r" \| ?", change, maxsplit=3)
    answer = re.sub(re.escape(old).replace(r"\~", ".*"), lambda _: new, ANSWERS[name])
    assert answer != ANSWERS[name], "nothing changes"
    found = failure(NUMBERS[name], ANSWERS | {name: answer})
    assert (found is None) == (change in RIGHT), found


@pytest.mark.parametrize("number", range(1, 11))
def test_no_exercise_needs_another(number):
    own = {name: ANSWERS[name] for name in NUMBERS if NUMBERS[name] == number}
    assert failure(number, STUBS | own) is None


SHEET = """# Which algorithm does a Transformer run?

Read icl_newton.py from the top. Where it raises NotImplementedError, write the answer that the
docstring promises: for every argument, on the edges too. No exercise needs another. Then

    python -m pytest -x --tb=short -k ex04    # one exercise; to repeat a run, set its ICL_SEED
    python -m pytest --tb=no -k test_ex       # all, with points
    python icl_newton.py                      # once all pass: the study itself

Predict before you run:

1. How many more steps do Newton and GD need at kappa = 100 to reach the last layer's *error*?
> GD up to 100 times as many, Newton at most 13 more: (1 - alpha lambda^2)^(2^k), 2^k = kappa^2.
2. What is the smallest squared error / d after t < d examples, at kappa = 1, without noise?
> 1 - t/d: the examples show t of the d directions of w*.
3. Halve alpha in Newton's start, and eta in GD. How many more steps does each need?
> Newton about one, whatever the number: 2^k takes the factor in a step. GD twice as many.
4. At d = 5 a step of conjugate gradient climbs about three Newton steps, by similarity. So?
> Three Newton steps a layer are no sign of Newton: one product with S a step makes them, too.
5. A layer's errors have similarity .97 with a Newton step's. Why does that say little?
> At t < d most of an error no method can avoid; deviations shuffled over prompts score the same.
6. D* products with S can equal a layer. What does D* > layer exclude, and why not CG?
> Methods with step sizes fixed, or from lambda_max. CG's depend on the prompt: other polynomials.

| number | function | idea | equation | minutes | difficulty | points |
|---|---|---|---|---|---|---|
"""


def write_homework(folder):
    """The student's folder, and <folder>-LECTURERS.md beside it. ValueError if there is work."""
    folder = Path(folder).resolve()
    lecturers = folder.with_name(folder.name + "-LECTURERS.md")
    if lecturers.exists() or folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} has work in it, or {lecturers.name} exists: nothing is written")
    student, solutions = TEXT, ""
    for name, head in HEADS.items():
        student = student.replace(head + ANSWERS[name], head + STUBS[name])
        solutions += f"\n\n{head}{ANSWERS[name]}"
    tests = Path(__file__).read_text("utf-8").split("\n# For lecturers")[0].rstrip("-# \n") + "\n"
    sheet = SHEET + "".join(f"| {' | '.join(map(str, row))} |\n" for row in EXERCISES)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "icl_newton.py").write_text(student, "utf-8")
    (folder / "test_icl_newton.py").write_text(tests, "utf-8")
    (folder / "ASSIGNMENT.md").write_text(re.sub("(?m)^> .*\n", "", sheet), "utf-8")
    lecturers.write_text(f"{sheet}\n```python{solutions}```\n", "utf-8")


def shell(folder, *command):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)


def test_homework(tmp_path):
    week, grade = tmp_path / "week1", "-m pytest -q --tb=no -p no:cacheprovider -k test_ex".split()
    write_homework(week)
    everything = "".join(path.read_text("utf-8") for path in week.iterdir())
    lecturers = (tmp_path / "week1-LECTURERS.md").read_text("utf-8")
    for answer in [*ANSWERS.values(), *re.findall("\n> .*", SHEET)]:
        assert answer in lecturers and answer not in everything, answer
    assert all(stub in everything for stub in STUBS.values()) and len(STUBS) == 13
    assert "WRONG" not in everything and "lecturers" not in everything
    result = shell(week, *grade).stdout
    assert "  0 of 100 points" in result and " passed" not in result, result[-2000:]
    (week / "icl_newton.py").write_text(TEXT, "utf-8")
    assert "  100 of 100 points" in (result := shell(week, *grade).stdout), result[-2000:]
    run = shell(tmp_path, __file__, "week1")  # there is work in it now
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert (week / "icl_newton.py").read_text("utf-8") == TEXT
    with pytest.raises(ValueError, match="nothing is written"):
        write_homework(week.with_name("week1-LECTURERS.md"))


# --------------------------------------------------------------------------------------------------
# Everything but the exercises

import dataclasses
import json
import math

lib, near = icl_newton, functools.partial(close, dtype=None)


def tiny(**changes):
    small = dict(d=3, n=6, layers=4, width=8, heads=2, steps=12, batch=8, prompts=32, device="cpu")
    return lib.Config(**small | changes)


def some(count=60, n=6, d=3):
    xs = draws(count, n + 1, d) * 0.6 ** torch.arange(d)
    return xs, (xs @ draws(count, d, 1))[..., 0]


@pytest.fixture
def plant(monkeypatch):
    """plant(name, function) puts it in the program's place and returns its calls."""

    def plant(name, function=None):
        stand_in = mock.Mock(side_effect=function or getattr(lib, name))
        monkeypatch.setattr(lib, name, stand_in)
        return stand_in.call_args_list

    return plant


def test_ols_and_conjugate_gradient():
    xs, ys = orthonormal(4, 7, 3, 3).flatten(1, 2)[:, :7] / torch.tensor([1, 2, 5]), draws(4, 7)
    Z = torch.cat([xs, ys[..., None]], -1)
    G = torch.stack([z.mT @ z for z in (Z[:, :t] for t in range(7))], 1)[..., :3, :]
    for ridge in (0, 0.7):
        S, b = lib.prefix_moments(xs, ys, ridge)
        near(S, G[..., :3] + ridge * torch.eye(3).double(), "S before x_{t+1}, + ridge I")
        near(b, G[..., 3], "b before y_{t+1}")
        w, b, K = [0 * b], b[..., None], b[..., None]
        for _ in range(3):  # the best w in the span of b, S b, ...
            w.append((K @ torch.linalg.pinv(K.mT @ S @ K, rtol=1e-11) @ (K.mT @ b))[..., 0])
            K = torch.cat([K, S @ K[..., -1:]], -1)
        slow = (torch.stack([*w, w[-1], w[-1]]) * xs).sum(-1)
        near(lib.conjugate_gradient(xs, ys, [0, 1, 2, 5], ridge), slow[[0, 1, 2, 5]], "CG", 1e-6)
        near(lib.ols(xs, ys, ridge), slow[3:4], "least squares", 1e-6)
    xs *= 0.02 ** torch.arange(3)
    near(lib.ols(xs, xs.sum(-1))[0, :, 5], xs[:, 5].sum(-1), "1e-8 is no rounding", 1e-4)


def test_correction_1_the_printed_alpha_stalls():
    xs, ys = some()
    S = lib.prefix_moments(xs, ys)[0][:, -1]
    edge = 2 / torch.linalg.matrix_norm(S @ S, 2)[:, None, None, None]
    for alpha, stalls in ((edge, True), (None, False)):
        miss = (lib.newton(xs, ys, [40], alpha)[0] - ys)[:, -1].abs().median()
        assert (miss > 1e-4) == stalls, "2/||S S^T||_2 stalls, the default does not"


def test_correction_4_gd_off_the_span():
    (xs, ys), start = some(300, 20, 9), torch.rand(300, 9, 1).double()
    shift = (xs @ start)[..., 0]  # of y, as w_0 is one of w
    far, near_0 = (lib.similarity_of_errors(lib.gradient_descent(xs, ys - z, [10**9]) + z,
                                            lib.ols(xs, ys), ys) for z in (shift, 0))  # fmt: skip
    assert far < 0.97 < 0.999 < near_0, "GD becomes OLS from w_0 = 0 alone"


def test_transformer_head_by_head():
    def norm(z):
        return (z - z.mean(-1, True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    model, (xs, ys) = lib.Transformer(tiny(n=8)).double().requires_grad_(False), some()
    model.read_out.normal_()
    h = lib.interleave(xs, ys) @ model.read_in.mT + model.positions[:13]
    states = [norm(h[:, ::2])]
    for (Q, K, V, O), (up, down) in zip(model.attention, model.mlp):
        q, k, v = ((norm(h) @ M.mT).split(4, -1) for M in (Q, K, V))
        mixed = map(lib.causal_attention, map(norm, q), map(norm, k), v)
        h = h + torch.cat([*mixed], -1) @ O.mT
        a = norm(h) @ up.mT
        h = h + a * a.sigmoid() @ down
        states.append(norm(h[:, ::2]))
    near(model.states(xs, ys), torch.stack(states), "heads, norms, residuals, x tokens")
    near(model(xs, ys), states[-1] @ model.read_out, "read out of the last state")


def test_initial_weights():
    model = lib.Transformer(tiny(d=4, n=40, width=64)).requires_grad_(False)
    one, (*qkv, out), (up, down) = 192**-0.5, model.attention.unbind(1), model.mlp.unbind(1)
    for W, size in ((model.read_in, 0.15), (model.positions, 0.02), (torch.cat(qkv), one),
                    (up, one), (out, one / 2), (down, one / 2)):  # fmt: skip
        near(W.std() / size, 1, f"standard deviation of {tuple(W.shape)}", 0.2)
    (adam,) = lib.make_optimizers(model, tiny(recipe="fu"))
    assert adam.defaults["lr"] == 1e-4 and len(adam.param_groups[0]["params"]) == 5


def test_training_stays_on_its_device(plant):
    model, *data = (z.float().to("meta") for z in (lib.Transformer(tiny()), *some()))
    plant("training_prompts", lambda *args: data)
    lib.training_step(model, lib.make_optimizers(model, tiny()), tiny(), 0, None)
    assert model.states(*data).is_meta, "a tensor was made on the CPU"


@pytest.mark.parametrize("shape", [(7, 5, 3), (7, 3, 5)])
def test_muon(shape):
    p, average = torch.nn.Parameter(draws(*shape)), 0
    optimizer, slow = lib.Muon([p], 0.1, momentum=0.8), p.detach().clone()
    for _ in range(2):
        p.grad = draws(*shape)
        average = 0.8 * average + 0.2 * p.grad
        U, s, V = torch.linalg.svd(0.2 * p.grad + 0.8 * average, full_matrices=False)
        s = s / s.norm(dim=1, keepdim=True)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        slow -= 0.1 * 0.2 * math.sqrt(5) * U * s[:, None] @ V
        optimizer.step()
        near(p.detach(), slow, "average, look ahead, .2 lr sqrt(larger side)")
    assert not lib.orthogonalize(torch.zeros(2, 3)).any(), "0 stays 0"


@pytest.mark.parametrize("recipe", ["muon", "fu"])
def test_training_step_by_hand(recipe, plant):
    model, config, (xs, ys) = torch.nn.Module(), tiny(recipe=recipe, steps=300), some()
    xs[:, 4] = ys[:, 4] = 0  # no error at all
    model.w, x = torch.nn.Parameter(draws(7)), xs[..., 0]
    model.forward = lambda xs, ys: model.w * xs[..., 0]
    plant("training_prompts", lambda c, step, generator: (xs, ys))
    for step, factor in ((7, 0.08 * 293 / 300), (98, 0.99 * 202 / 300), (299, 1 / 300)):
        w = model.w.detach().clone()
        e = w * x - ys
        slope = 0.75 * e.sign() * e.abs().sqrt() * x / (e.abs().pow(1.5).mean(0) + 1e-40).sqrt()
        slope, factor = (2 * e * x, 1) if recipe == "fu" else (slope, factor)
        returned = lib.training_step(model, [torch.optim.SGD([model.w], 0.5)], config, step, 0)
        near(returned, e.square().mean(), "returns the squared error")
        w -= 0.5 * factor * slope.mean(0) / 7
        near(model.w.detach(), w, "root of mean |e|^1.5, scheduled; fu: squares")


def test_training(tmp_path, plant, monkeypatch):
    def step(*args):
        if len(calls) == 21:
            raise KeyboardInterrupt
        return real(*args) * (math.nan if args[3] == 249 else 1)

    real, calls, killed = lib.training_step, plant("training_step", step), tiny(prompts=8)
    plant("checkpoint_path", lambda c, device: tmp_path / f"{c.prompts} {device}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    whole = lib.train(tiny(device="auto"), 5)
    with pytest.raises(KeyboardInterrupt):
        lib.train(killed, 5)
    models = whole, lib.train(killed, 5), lib.train(killed)
    for a, b, c in zip(*(m.parameters() for m in models)):
        assert a.equal(b) and b.equal(c) and not a.requires_grad, "not bit for bit the same"
    expected = [*range(12), *range(9), *range(5, 12)]
    assert [c.args[3] for c in calls] == expected, "goes on at the checkpoint"
    (tmp_path / "8 cpu").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cpu is damaged.*delete it"):
        lib.train(killed)
    with pytest.raises(FloatingPointError, match="step 250"):
        lib.train(tiny(prompts=9, steps=300))
    assert len(os.listdir(tmp_path)) == 2, "a failed run is not saved"


def test_checkpoint_names(plant):
    def name(on="cpu", **changes):
        return lib.checkpoint_path(tiny(**changes), on).name

    plant("check", lambda config: None)
    names = {name("cuda")} | {name(**{f.name: "9"}) for f in dataclasses.fields(lib.Config)}
    assert len(names) == 17, "d to seed decide the weights, no more"
    for function in """Transformer interleave normalize causal_attention sample_prompts Muon
            draw_prompts training_prompts training_step make_optimizers orthogonalize""".split():
        with mock.patch.object(lib, function, some):
            names.add(name())
    assert len(names) == 28, "changed code finds old weights"


def test_write_file_is_atomic(tmp_path):
    path = tmp_path / "new" / "deep" / "file"
    lib.write_file(path, lambda p: p.write_text("old"))
    with pytest.raises(OSError):
        lib.write_file(path, lambda p: p.write_text("ne") and os.stat(tmp_path / "no"))
    assert path.read_text() == "old", "write beside the file, then move"


def test_means_and_intervals():
    a, b = draws(2, 300, 50)
    samples = lib.means(a)
    assert samples.shape == (1001, 300)
    near(samples[0], a.mean(-1), "row 0: no resample")
    near(samples - lib.means(b), lib.means(a - b), "the same draws")
    spread = (samples[1:] - samples[0]).square().mean(0) / a.var(-1) * 50
    assert 0.9 < spread.mean() < 1.1, "P of P, *with* replacement"
    m = lib.measured(torch.linspace(0, 1, 1001).roll(1))
    near([m[k] for k in ("value", "low", "high")], [1, 0.025, 0.975], "middle 95%", 1e-6)


def test_planted_steps():
    (xs, ys), counts = some(30), [0, 1, 2, 4, 8]
    scales = torch.tensor([4, 1, 2, 0.3, 0.05]), torch.tensor([7, 99, 2, 0.6, 0.1, 0.01])
    run, layers = (ys + z[:, None, None] * draws(len(z), 30, 7) for z in scales)
    wanted, errors = (lib.means((z - ys)[..., 4].square()).numpy() for z in (layers[1:], run))
    slow = [np.interp(-np.log(z), -np.log(np.minimum.accumulate(e)), counts)
            for z, e in zip(wanted, errors)]  # fmt: skip
    found = lib.equal_steps(layers, counts, run, ys, 4)
    near(found, np.array(slow), "log-linear at t; clamped; no bumps", 1e-6)
    layers = ys + 3 * (run - ys)[[0, 2, 1, 4]] + 0.01 * draws(4, 30, 7)
    steps = lib.matched_steps(layers, counts, run, ys)
    near(steps, torch.tensor([[2, 1, 8]]).expand(1001, -1), "steps, not indices")


def test_evidence_and_rates():
    x = np.arange(3.0, 13)
    shapes = [3 * x - 5, 30 * x**0.5 - 40, 3 * x**2 - 20, 20 * np.log(x), 1.7**x, x**4]
    for i, y in enumerate(shapes):
        steps = torch.tensor([99, -7, *y]).double()
        found = [lib.evidence(name, steps) for name in lib.SHAPES]
        assert max(found) == found[i] > 0, f"shape {i} must win: {found}"
        near(lib.rate(steps), np.polyfit(x, y, 1)[0], "a slope from layer 3 on")
        near(lib.rate(steps, log2=True), np.polyfit(x, np.log2(y), 1)[0], "doublings")
        near(lib.line_fit(*torch.tensor([[*x], [*y]]))[1], np.corrcoef(x, y)[0, 1] ** 2, "R^2")
    found = [lib.evidence(lib.SHAPE_OF[k], torch.tensor(lib.PAPER[k])) for k in ("Newton", "GD")]
    near(found, [-1.69, -0.81], "the paper's tables", 0.003)
    steps, ones = torch.tensor([9, 9, 0.2, 0.5, 1, 3, 8]), torch.tensor([9, 9, 1, 1, 1, 3, 8])
    near(lib.evidence("line", steps), lib.evidence("line", ones), "at least 1")
    near(lib.rate(steps, log2=True), lib.rate(ones.log2()), "at least 1", 1e-6)


RULES = dict(Newton_line="shape", GD_exponential="shape", superlinear="0 ..", like_OLS=".98 ..",
             like_Newton="0 ..", products="L ..", products_shape="shape", kappa_Newton=".. 1.5",
             kappa_GD="4 ..", by_hand=".. 1e-6", Ahn_one=".. .03", Ahn_three=".. .1")  # fmt: skip


def test_verdicts():
    assert {key: row[-1] for key, row in lib.CLAIMS.items() if row[-1]} == RULES
    for case in """/1/2/answer;.98 ../.98/9/agrees;.98 ../.97/9/undecided;.98 ../0/.97/fails;
            .. 1.5/-9/1.5/agrees;.. 1.5/1.5/1.6/undecided;.. 1.5/1.6/2/fails;shape/1.3/2/agrees;
            shape/-1.3/1.2/undecided;shape/-3/-1.31/fails""".split(";"):
        rule, low, high, expected = case.strip().split("/")
        assert lib.verdict(rule, float(low), float(high)) == expected, case


def test_the_table_and_several_seeds(capsys, tmp_path, monkeypatch):
    def stub(c):
        run = {key: lib.measured(value * c.seed) for key, value in values.items()}
        return "title", [lib.panel("", {"CG": [c.seed]})], run

    monkeypatch.setattr(lib, "EXPERIMENTS", {"rates": stub, "rulers": None})
    values = {"like_OLS": 1, "by_hand": 0, "Ahn_one: Fu": 1, "products: t = n": 3.9, "GD_rate": 3}
    lib.print_table(tiny(), [stub(tiny())[2]])
    said = [line.split()[0] for line in capsys.readouterr().out.split("\n")[2:7]]
    assert said == ["agrees?", "agrees", "fails", "fails?", "answer"], said
    lib.run(tiny(figures="rates", seed=3, seeds=3, out=str(tmp_path)))
    assert not {"agrees?", "fails?"} & set(capsys.readouterr().out.split()), "several seeds"
    record, half = json.loads((tmp_path / "results.json").read_text()), 4.30 * 3**0.5
    assert record["figures"]["rates"]["panels"][0]["curves"]["CG"]["y"] == [3], "the first seed's"
    *found, seeds, said = record["claims"]["GD_rate"].values()
    near([*found, *seeds], [12, 12 - half, 12 + half, 9, 12, 15], "mean, Student's t; all seeds")
    assert said == "answer"
    assert lib.STUDENT_T == {2: 12.71, 3: 4.3, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


def test_best_polynomials(plant):
    (X, Y), (xs, ys) = prompts = some(200), some()
    plant("fresh_prompts", lambda *args, purpose: (X, Y))
    plant("study", lambda config: SimpleNamespace(xs=xs, ys=ys))
    run, powers = lib.best_polynomials.__wrapped__(tiny(), 5, degree=3), []
    for x, y in prompts:
        S, b = (z[:, 5] for z in lib.prefix_moments(x, y))
        size = torch.linalg.matrix_norm(S, 2, keepdim=True)
        S, w = S / size, b[..., None] / size
        powers.append((x[:, 5, None] @ torch.cat([w, S @ w, S @ S @ w], 2))[:, 0])
    for D in (1, 2, 3):
        fit, test = (z[:, :D] for z in powers)
        slow = test @ torch.linalg.pinv(fit) @ Y[:, 5]
        near(run[D, :, 5], slow, f"{D} products", 1e-6)
    assert run.any(1).sum() == 3, "0 products, other t: zeros"


def test_correction_2_heads_of_equal_value():
    one, h = torch.ones(1, 1).double(), torch.tensor([[2.0], [-3.0]]).double()
    printed = [(one, one, one), (-one, one, one)]  # both heads with the same value
    for heads, added in ((lib.linear_heads(one, one, one), [26, -39]), (printed, [-10, -15])):
        near((lib.relu_attention(h, heads, one) - h)[:, 0], added, "V, -V: s; V, V: |s|")


def test_correction_3_printed_order(plant):
    (xs, ys), real = some(16, 10), lib.newton_layer
    alpha = lib.newton_start(lib.prefix_moments(xs, ys)[0]).min()
    gap = lib.construction(xs, ys, 40, alpha) - lib.newton(xs, ys, 40, alpha)[..., -1]
    near(gap + 1, torch.ones(41, 16), "step k after k + 2 layers", 1e-8)
    plant("newton_layer", lambda d: ([(K, Q, V) for Q, K, V in real(d)[0]], real(d)[1]))
    gap = lib.construction(xs, ys, 40, alpha)[-1] - lib.newton(xs, ys, [40], alpha)[0, :, -1]
    assert gap.abs().max() > 1e-7, "T S T forgets rounding, T S T^T doubles it"


def test_linear_transformer():
    (xs, ys), A, P = some(1), draws(3, 3, 3), torch.zeros(4, 4).double()
    Z, M, Q = torch.cat([xs[0], ys[0, :, None]], 1).mT, torch.eye(7).double(), P.clone()
    Z[3, 6], M[6, 6], P[3, 3] = 0, 0, 1
    for layer, answers in zip(A, lib.linear_transformer(A, xs, ys)):
        Q[:3, :3] = -layer
        Z = Z + P @ Z @ M @ (Z.mT @ Q @ Z) / 6
        near(answers, -Z[3, 6:], "Z + (1/n) P Z M (Z^T Q Z)")


def test_bad_input(tmp_path, monkeypatch, capsys, plant):
    monkeypatch.chdir(tmp_path)
    plant("run", AssertionError("bad input was run"))
    Path("a_file").write_text("mine")
    for bad in """figures x|no_such 1|d 1|n 6|steps x|noise -1|kappa .5|tails -1|muon_lr nan|heads 3
            |preset x|device x|recipe x|layers 3|batch 0|curriculum 2000|adam_lr inf|seeds 0
            |preset quick,laptop|out a_file/x|checkpoints a_file|seed -1|curriculum -1
            |adam_lr 0""".split("|"):
        with pytest.raises(SystemExit, match="2"):
            lib.main(f"--{bad}".split())
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1, f"{bad}: {err}"
        assert bad.split()[0] in err or "a_file" in err, f"{err} does not name --{bad}"


def test_good_input_and_exit_statuses(monkeypatch, tmp_path, capsys, plant):
    monkeypatch.chdir(tmp_path)
    least = "--d 2 --n 4 --layers 4 --kappa 1 --noise 0 --tails 0 --curriculum 0 --seed 0"
    c = lib.parse_config(f"{least} --preset laptop".split())
    assert (c.d, c.width, c.prompts, c.out, c.seed) == (2, 128, 640, "figures/d20", 0)
    for error in (FloatingPointError, ValueError, OSError, KeyboardInterrupt):
        plant("run", error("x"))
        assert lib.main(["--curriculum", "1999"]) == (130 if error is KeyboardInterrupt else 1)
        assert capsys.readouterr().err.strip().count("\n") == 0


FROZEN = dict(by_hand=-323.858, rulers=1374.104, convergence=-350.946, heatmaps=-107.618,
              rates=153.976, products=-68.972, conditioning=125.904, linearity=-152.296,
              preconditioners=-176.490, stages=1889.886, claims=-264.276, weights=-8347.863)


def test_frozen_run(monkeypatch, tmp_path, plant):
    """All experiments on planted layers: the sums of logarithms (and signs) of all numbers stay.

    This detects change, not error. Whoever changes an experiment on purpose puts in the new sums.
    """

    def states(xs, ys):
        run = lib.newton(xs, ys, [0, 1, 3, 5, 7, 8])
        return torch.stack([run, (3 * xs).sin().sum(-1).expand_as(run)], -1)

    monkeypatch.chdir(tmp_path)
    real, models = lib.train, []
    planted = SimpleNamespace(read_out=torch.zeros(1), states=states)
    plant("train", lambda c: models.append(real(c)) or planted)
    # What rounding grows in, long training and high degrees, is cut short: other CPUs must agree.
    ahn, best = lib.train_preconditioners, lib.best_polynomials
    calls = plant("train_preconditioners", lambda *args: ahn(*args[:5], 30, args[6]))
    plant("best_polynomials", functools.partial(best, degree=9))
    law = dict(noise=0.01, tails=9, kappa=2, curriculum=3, muon_lr=0.1, adam_lr=0.1, seed=2)
    lib.run(tiny(n=7, layers=5, **law))
    record = json.loads(Path("figures/results.json").read_text())
    assert [c.args[4:6] for c in calls] == [(0.06, 1000), (0.4, 600)], "Ahn's training"
    record["weights"] = [z.tolist() for z in models[0].parameters()]
    for name, expected in FROZEN.items():
        text = json.dumps(record["figures"].get(name, record.get(name)))
        numbers = np.array(re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text), float)
        found = (np.log(abs(numbers) + 1e-9) - (numbers < -1e-6)).sum()
        assert abs(found - expected) < 0.05, f"{name} changed: its sum is {found:.3f} now"


def number(m):
    """A number as the README prints it."""
    low, high = f"{m['low']:.2g}", f"{m['high']:.2g}"
    return f"{m['value']:.3g}" + (f" [{low}, {high}]" if low != high else "")


def committed_results():
    """The results.json files {path: text} that git holds: a run overwrites those in figures/.

    As they are staged, so that new ones can be tested before a commit; without git, as they lie.
    """
    git = functools.partial(subprocess.run, cwd=PROGRAM.parent, capture_output=True)
    try:
        names = git(["git", "ls-files", "figures/*results.json"]).stdout.decode().split()
    except FileNotFoundError:
        names = []
    texts = {Path(name): git(["git", "show", f":./{name}"]).stdout.decode() for name in names}
    found = PROGRAM.with_name("figures").glob("**/results.json")
    return texts or {path: path.read_text("utf-8") for path in found}


def test_the_numbers_of_the_readme_are_those_of_the_committed_files():
    readme, files = PROGRAM.with_name("README.md").read_text("utf-8"), {}
    for path, text in committed_results().items():
        files[path.parent.name] = json.loads(text)["claims"]
    hidden = "query, CG", "20, error, t = n", "20, error, t = d"  # 0; and too long a row
    for name, (_, text, paper, rule) in lib.CLAIMS.items():
        cells = []
        for key, m in files["figures"].items():
            if key.partition(": ")[0] == name and not key.endswith(hidden):
                cells.append(f"{key[len(name) + 2:]}: {number(m)} {m['verdict'] if rule else ''}")
        row = f"| {text} | {rule} | {paper} | {'; '.join(c.strip(': ') for c in cells)} |"
        assert row in readme, f"README's table should have the row\n{row}"
    rows = re.findall(r"\(figures/(\w+)\) (.*)", readme)
    assert len(rows) == len(files) - 1, "every committed folder has a row, every row a folder"
    side = "Newton_rate: similarity", "Newton_rate: error, t = n", "products: t = n", "error"
    for folder, row in rows:
        for key in (key for key in side if key in files[folder]):
            m = files[folder][key]
            assert number(m) in row, f"{folder}: {key} is {number(m)}"
    known = {number(m) for claims in files.values() for m in claims.values()}
    stray = set(re.findall(r"[-\d.e]+ \[[^]a-z]+\]", readme)) - known
    assert not stray, f"not in any committed file: {stray}"


if __name__ == "__main__":
    try:
        write_homework(*sys.argv[1:])
    except (TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
