"""
Tests of icl_newton.py, and the grader of its exercises.

    python -m pytest                      everything
    python -m pytest -k test_ex           the exercises: one line each, with points
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
torch.set_num_threads(1)  # small tensors: a second thread would only wait

EXERCISES = [  # number, function, idea, minutes, points; sheets 1, 2 and 3
    (1, "sample_prompts", "data with a condition number", 30, 10),
    (2, "gradient_descent", "a method is a trajectory", 25, 10),
    (3, "newton_start", "why alpha matters", 15, 5),
    (4, "newton", "doubling the digits", 30, 15),
    (5, "interleave", "a prompt as tokens", 15, 5),
    (6, "causal_attention", "no future", 25, 10),
    (7, "least_squares_readout", "what a layer knows", 20, 10),
    (8, "similarity_of_errors", "like errors?", 20, 10),
    (9, "linear_heads", "a sum over examples from ReLU attention", 15, 5),
    (10, "newton_layer", "Newton's weights, by hand", 45, 10),
    (11, "optimal_preconditioner", "what linear attention learns", 45, 10),
]

pytest_plugins = __name__  # makes pytest call this file's hooks, the two functions below


def pytest_configure(config):
    """Exercises are reported in the summary's single lines, not in tracebacks."""
    if "ex" in config.option.keyword and config.option.tbstyle == "auto":
        config.option.tbstyle = "no"
        config.pluginmanager.get_plugin("terminalreporter").reportchars = ""


def pytest_terminal_summary(terminalreporter):
    """A line for every exercise that was run: its points, and the first thing that is wrong."""
    wrong, names = {}, {number: name for number, name, *_ in EXERCISES}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for number in re.findall(r"test_ex(\d\d)", report.nodeid):
                crash = getattr(report.longrepr, "reprcrash", None)
                said = crash.message.splitlines()[0] if crash else outcome
                wrong[int(number)] = wrong.get(int(number)) or (said if outcome != "passed" else "")
    points = {number: row[-1] for number, *row in EXERCISES}
    got = sum(points[number] for number in wrong if not wrong[number])
    for number, said in sorted(wrong.items()):
        score = 0 if said else points[number]
        line = f"  ex{number:02} {names[number]:<24}{score:>3} of {points[number]:<3} {said}"
        terminalreporter.write_line(line.rstrip())
    if wrong:
        total = sum(map(points.get, wrong))
        terminalreporter.write_line(f"  {got} of {total} points (to repeat: ICL_SEED={SEED})")


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


def slow_answers(xs, ys, steps, left, ridge=0.0):
    """[k, p, t] = w_k.x_{t+1}; left(eigenvalue, all, k): share of the way to least squares left."""
    answers = np.zeros((steps + 1, *ys.shape))
    for p, t in np.ndindex(*ys.shape):
        X, y, query = (z.double().numpy() for z in (xs[p, :t], ys[p, :t], xs[p, t]))
        values, U = np.linalg.eigh(X.T @ X + ridge * np.eye(len(query)))
        for value, u in zip(values, U.T):
            if value > 1e-9 * values[-1]:
                goal = (u @ X.T @ y) / value * (u @ query)
                answers[:, p, t] += [(1 - left(value, values, k)) * goal for k in range(steps + 1)]
    return answers


SOLVER_CASES = [  # steps; ridge; prompts, n, d
    (5, 0, (3, 9, 4), "sign, factor, size of a step, float32, in-place, S = 0, or a prefix "
     "that holds what it predicts?"),
    (4, 0.03, (3, 9, 4), "`ridge` adds ridge I to S, also where the size of a step is made"),
    (300, 0.03, (2, 9, 4), "rounding grew: float32, or the order of M S M"),
    (3, 0, (1, 1, 1), "one prompt, one example, d = 1"),
    (3, 0, (1, 3, 5), "fewer examples than dimensions"),
]


def check_solver(solver, left, **options):
    """Check a trajectory; left(eigenvalue, all of them, k)."""
    for steps, ridge, (prompts, n, d), message in SOLVER_CASES:
        for dtype in (torch.float32, torch.float64):
            xs = orthonormal(prompts, n + 1, d, d).flatten(1, 2)[:, : n + 1]  # well conditioned
            xs, ys = (xs / torch.linspace(4, 10, d)).to(dtype), draws(prompts, n + 1).to(dtype)
            found = call(solver, xs, ys, steps=steps, ridge=ridge, **options)
            close(found, slow_answers(xs, ys, steps, left, ridge), message)


def test_ex01_shapes_and_generator(icl):
    for P, n, d, law in ((3, 4, 2, {}), (2, 1, 1, dict(kappa=7.0)), (1, 5, 3, dict(noise=0.1))):
        xs, ys = icl.sample_prompts(P, n, d, **law)
        check_form(xs, (P, n + 1, d), "xs (prompts, n+1, d)", torch.float32)
        check_form(ys, (P, n + 1), "ys (prompts, n+1)", torch.float32)
        assert not torch.equal(xs, icl.sample_prompts(P, n, d, **law)[0]), "two calls, same prompts"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = dict(kappa=7.0, noise=0.1)
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
    for kappa in (1.0, 25.0):
        prompts = []
        for noise in (0.0, 0.4, 1.4):
            law = dict(noise=noise, generator=torch.Generator().manual_seed(SEED), kappa=kappa)
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


def test_ex02_trajectories(icl):
    check_solver(icl.gradient_descent, lambda value, values, k: (1 - value / values[-1]) ** k)


def test_ex03_each_matrix_has_its_safe_alpha(icl):
    for batch, d, scale, dtype in (((), 3, 1, torch.float64), ((4,), 1, 1e-3, torch.float32),
                                   ((2, 3), 4, 1e3, torch.float64)):  # fmt: skip
        X = scale * draws(*batch, d + 9, d)
        X[0] = 0  # the empty prefix, if there is a batch
        S = (X.mT @ X).to(dtype)
        alpha = call(icl.newton_start, S)
        check_form(alpha, (*batch, 1, 1), "a finite alpha for each S, S = 0 too", dtype)
        S, alpha = S[S[..., 0, 0] > 0].double(), alpha[S[..., 0, 0] > 0].double()
        largest = torch.linalg.eigvalsh(S)[..., -1:, None]
        assert (alpha * largest**2 <= 1 + 1e-5).all(), "alpha lambda_max^2 above 1: R_0 is negative"
        assert (alpha * largest**2 >= 0.9 / d**2).all(), "too small: every halving costs a step"


def test_ex04_trajectories(icl):
    for alpha in (30.0, 0.0):  # 0 is a number like any other: only None means the default

        def left(value, values, k):
            return (1 - alpha * value**2) ** (2.0**k)

        check_solver(icl.newton, left, alpha=alpha)


def test_ex04_default_start(icl):
    """Whatever safe alpha is the default, it is each prefix's own, made of S + ridge I."""
    with mock.patch.object(icl, "newton_start", lambda S: 0.7 / ((S @ S).diagonal(
            dim1=-2, dim2=-1).sum(-1)[..., None, None] + 1e-30)):  # fmt: skip
        xs = (orthonormal(3, 10, 4, 4).flatten(1, 2)[:, :10] / torch.linspace(4, 10, 4)) * 7
        xs, ys = xs * torch.tensor([1, 1e-3, 1e3])[:, None, None], draws(3, 10)
        goal = slow_answers(xs, ys, 0, lambda *_: 0.0)[0]
        run = call(icl.newton, xs, ys, steps=30)
        close(run[-1], goal, "the default alpha must suit each prefix, S = 0 too", 1e-6)
        xs, ys = draws(2, 6, 3) * 3.0 ** torch.arange(6)[:, None], draws(2, 6)
        for p, t in np.ndindex(2, 6):
            S, b = xs[p, :t].mT @ xs[p, :t], xs[p, :t].mT @ ys[p, :t]
            ridge = 3 * torch.linalg.matrix_norm(S, 2).item()
            S = S + ridge * torch.eye(3)
            first = icl.newton(xs, ys, steps=0, ridge=ridge)[0, p, t]
            size = first / (xs[p, t] @ S @ b) * torch.linalg.matrix_norm(S, 2) ** 2 if t else 0.5
            assert size <= 1 + 1e-6, "the default alpha must be made of S + ridge I, not of S"
            assert size >= 0.09, "the default alpha must be each prefix's own"


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
        expected = torch.stack([(one * b)[..., 1:].sum(-1) for one in a]).mean(-1)
        size = size * torch.arange(1.0, P + 1)[:, None]
        inputs = [z.to(dtype) for z in (size * a + ys, size * b + ys, ys)]
        why = "mean over prompts of the cosine of prediction - y over t = 1..n; 0 for an error of 0"
        close(call(icl.similarity_of_errors, *inputs), expected, why, 5e-4)


def test_ex09_linear_heads(icl):
    Q, K, V, h = draws(2, 3), draws(2, 3), draws(3, 3), draws(5, 3)
    added = icl.relu_attention(h, icl.linear_heads(Q, K, V), torch.ones(5, 5).double()) - h
    close(added, (h @ Q.mT) @ (h @ K.mT).mT @ (h @ V.mT), "two heads add s V, sign and all")


def test_ex10_newton_layer(icl):
    for n, d, width in ((7, 3, 7), (3, 5, 11), (3, 1, 3)):
        with mock.patch.object(icl, "linear_heads", lambda Q, K, V: [(Q, K, V), (-Q, K, -V)]):
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


def test_ex11_optimal_preconditioner(icl):
    for d, n, dtype in ((3, 4, torch.float64), (5, 11, torch.float32), (1, 2, torch.float64)):
        U, values = orthonormal(d, d), torch.linspace(0.3, 2, d).double()
        A = call(icl.optimal_preconditioner, ((U * values) @ U.mT).to(dtype), n=n)
        check_form(A, (d, d), "one matrix A (d, d)", None)
        inside = U.mT @ A.double() @ U
        close(inside, inside.diagonal().diag(), "A must have Sigma's eigenvectors", 1e-4)
        rest = (1 / inside.diagonal() - (n + 1) / n * values) / values.sum()  # should be 1/n
        for wrong, mistake in (
            (0, "the trace of Sigma is missing: it comes from E S^2"),
            (1, "the trace of Sigma goes over n"),
            (1 / n - values / n / values.sum(), "n, not n+1: E S^2 is not (E S)^2"),
        ):
            assert (rest - wrong).abs().max() > 1e-4, mistake
        close(rest, torch.full((d,), 1 / n), "where the derivative of the expected loss is 0", 1e-3)


# ------------------------------------------------------------------------------------------------
# For lecturers (the student's copy ends above). Homework: python test_icl_newton.py FOLDER

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

PROGRAM = Path(__file__).with_name("icl_newton.py")
TEXT = PROGRAM.read_text("utf-8")
NUMBERS = {name: number for number, name, *_ in EXERCISES}
HEADS, ANSWERS, STUBS = {}, {}, {}  # of each function: to the docstring's end; the rest; no answer
for f in ast.parse(TEXT).body:
    if (name := getattr(f, "name", None)) in NUMBERS:
        lines, start = TEXT.splitlines(keepends=True), f.body[0].end_lineno
        HEADS[name] = "".join(lines[f.lineno - 1 : start])
        ANSWERS[name] = "".join(lines[start : f.end_lineno])
        STUBS[name] = f'    raise NotImplementedError("exercise {NUMBERS[name]}: {name}")\n'

WRONG = [  # function, what stands in its answer, what a wrong answer has there
    ("sample_prompts", "eigenvalues.sqrt()", "eigenvalues"),
    ("sample_prompts", "draw(prompts, d, d)", "draw(1, d, d)"),
    ("sample_prompts", "noise * draw(prompts, n + 1)", "noise * draw(prompts, 1)"),
    ("gradient_descent", "- eta * (times(S, weights[-1]) - b)", "- eta * times(S, weights[-1]) + b"),
    ("gradient_descent", "eigvalsh(S)[..., -1:]", "eigvalsh(S)[:, -1:, -1:]"),
    ("gradient_descent", "(xs, ys, ridge)", "(xs.roll(-1, 1), ys.roll(-1, 1), ridge)"),
    ("newton_start", "return 1", "return 2 * S.shape[-1]"),
    ("newton_start", "S @ S.mT", "S"),
    ("newton_start", ".clamp_min(TINY)", ""),
    ("newton", "M @ S @ M", "S @ M @ M"),
    ("newton", "newton_start(S) if alpha is None else alpha", "alpha or newton_start(S)"),
    ("newton", "2 * M", "1.9 * M"),
    ("newton", "newton_start(S) if", "newton_start(S - ridge * torch.eye(S.shape[-1]).to(S)) if"),
    ("newton", "newton_start(S) if", "newton_start(S[:, -1:]) if"),
    ("interleave", "[:, :-1]", ""),
    ("interleave", "(0, xs.shape[-1] - 1)", "(xs.shape[-1] - 1, 0)"),
    ("causal_attention", ".triu(1)", ".triu(0)"),
    ("causal_attention", ".softmax(-1)", ".softmax(-2)"),
    ("causal_attention", "math.sqrt(D)", "D"),
    ("least_squares_readout", "H.mT @ H,", "H.mT @ H + 1e-8 * torch.eye(H.shape[-1]).to(H),"),
    ("least_squares_readout", "times(H.mT, y)", "times(H.mT, y - y.mean())"),
    ("similarity_of_errors", "[..., 1:]", ""),
    ("similarity_of_errors", "z.double() - ys", "z.double()"),
    ("similarity_of_errors", "/ ys.shape[0]", "/ ys.shape[1]"),
    ("linear_heads", "(-Q, K, -V)", "(-Q, K, V)"),
    ("newton_layer", "V=-0.5", "V=0.5"),
    ("newton_layer", "Q=Tx, K=x", "Q=x, K=Tx"),
    ("newton_layer", "[Tx, -Tx]", "[Tx, 0 * Tx]"),
    ("optimal_preconditioner", "(n + 1) / n *", "1 *"),
    ("optimal_preconditioner", "eigenvalues.sum() / n", "eigenvalues.sum()"),
]
RIGHT = [
    ("gradient_descent", "weights[-1] - eta * (times(S, weights[-1]) - b)",
     "eta * b + times(torch.eye(S.shape[-1]).to(S) - eta[..., None] * S, weights[-1])"),
    ("newton_start", "1 / torch.linalg.matrix_norm(S @ S.mT, keepdim=True).clamp_min(TINY)",
     "1 / torch.linalg.eigvalsh(S)[..., -1:, None].square().clamp_min(TINY)"),
    ("newton", "newton_start(S)", "1 / (S @ S.mT).square().sum((-2, -1), True).sqrt().clamp_min(TINY)"),
    ("newton", "2 * M - M @ S @ M", "M @ (2 * torch.eye(S.shape[-1]).to(S) - S @ M)"),
    ("causal_attention", "-math.inf", "-1e9"),
    ("least_squares_readout", "torch.linalg.pinv(H.mT @ H, hermitian=True, rtol=1e-12), times(H.mT, y)",
     "torch.linalg.pinv(H), y"),
    ("newton_layer", "return heads,", "return heads[::-1],"),
]  # fmt: skip


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


@pytest.mark.parametrize("change", WRONG + RIGHT, ids=lambda change: " ".join(change)[:60])
def test_wrong_answers_fail_and_right_ones_pass(change):
    name, old, new = change
    assert old in ANSWERS[name], "nothing changes"
    found = failure(NUMBERS[name], ANSWERS | {name: ANSWERS[name].replace(old, new)})
    assert (found is None) == (change in RIGHT), found


@pytest.mark.parametrize("name", NUMBERS)
def test_no_exercise_needs_another(name):
    assert failure(NUMBERS[name], STUBS | {name: ANSWERS[name]}) is None


SHEETS = {  # title: (exercises, what to read, text); lines that begin with > are for lecturers
    "1. How fast does Newton converge?": ((1, 4), "sections 1 to 3 of icl_newton.py (25 minutes)", """
Afterwards you can sample regressions of any condition number, derive why Newton's digits double,
and say how many more steps gradient descent needs and why.

Predict, in a line each, before you begin (your answers are handed in, not graded by tests):

1. Halve alpha in Newton's start, and eta in GD. How many more steps does each need?
> Newton about one, whatever the number: 2^k takes the factor in a step. GD twice as many.
2. S has condition number 100 in place of 1, and *every* direction must be found. By which factor grow
   GD's steps, and by how many steps grow Newton's?
> GD's 100 times, Newton's by 2 log2 100 = 13: 2^k = kappa^2. (For a large error fewer: at kappa = 100
> of Sigma the small directions carry a hundredth of it.)
3. What is the least *expected* squared error / d after t < d examples, at kappa = 1, without noise?
> 1 - t/d: the examples show t of the d directions of w*.

One paragraph (5 points, graded by hand): Newton's R_k is squared in every step, yet the first steps
hardly lower the error. Explain with eigenvalues what the first steps do gain.
> Along lambda the share left is (1 - alpha lambda^2)^(2^k). While 2^k alpha lambda^2 << 1 it is about
> 1. Each step doubles the exponent, so it widens the set of directions found, lambda > lambda_max
> 2^(-k/2). Full marks: the formula, reach, and that digits double only when the smallest is reached.
"""),
    "2. What does a layer know?": ((5, 8), "sections 4 to 9 (35 minutes; sheet 1 is needed)", """
Afterwards you can build a prompt of tokens, read a prediction out of every layer, compare two
learners by two rulers, and say what each ruler cannot tell. When all exercises of sheets 1 and 2 pass:
`python icl_newton.py --preset quick`, then `python icl_newton.py --figures rates,heatmaps,products`.

Predict before you run:

1. A layer's errors have similarity .97 with a Newton step's. Is the layer a Newton step?
> At t < d most of an error no method can avoid; deviations shuffled over prompts score nearly so.
2. Put conjugate gradient in the layers' place. Which Newton step does its step 4 match at d = 20?
> About 8, though it is first-order; later its steps are worth less and less: its curve is concave.
3. The last layer is worth more than L products with S. What is excluded, and why not CG?
> Methods of one product a step with sizes fixed, or from lambda_max. CG's sizes depend on the prompt.

One paragraph (5 points, graded by hand): from `rates` and `products` of your own run, is a layer a
Newton step? Name one number for it, one against it, and what a second seed would have to show.
> Looked for: both rulers, the control CG, and that a rate alone does not identify an algorithm.
"""),
    "3. Weights by hand, weights by theory": ((9, 11), "sections 11 to 13 (25 minutes)", """
Afterwards you can write weights of attention that run Newton's method, and derive what one layer of
linear attention learns. When all pass: `python icl_newton.py --figures by_hand,preconditioners,stages`.

Predict before you run:

1. With a causal mask, what goes wrong in the hand-written layers?
> Every x_j would carry its own prefix's T, so the sums are not T S T of one S.
2. With n = 20 examples, does the best one-layer A stretch small eigenvalues of Sigma as 1/lambda does?
> Less: the trace of Sigma, over n, is added to each eigenvalue before the inverse.

One paragraph (5 points, graded by hand): derive the A of exercise 11 from the expected loss.
> E (w.x_q - x_q^T A^T S w / n)^2 is quadratic in A; E S^2 = n (n+1) Sigma^2 + n tr(Sigma) Sigma.
"""),
}


def sheet_text(title):
    """A sheet in Markdown, lecturers' lines too."""
    (first, last), reading, text = SHEETS[title]
    rows = [row for row in EXERCISES if first <= row[0] <= last]
    table = "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
    return f"""# {title}

Read {reading}.
{text}
## Exercises {first} to {last}

Where icl_newton.py raises NotImplementedError, write the answer that the docstring promises, for
every argument and on the edges: no example yet (S = 0), fewer than d, d = 1, 0 steps. No exercise
needs another. About {sum(row[3] for row in rows)} minutes without reading.

    python -m pytest -k ex{first:02}              # one exercise
    python -m pytest -k test_ex           # all, a line each, with points

| number | function | idea | minutes | points |
|---|---|---|---|---|
{table}"""


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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "icl_newton.py").write_text(student, "utf-8")
    (folder / "test_icl_newton.py").write_text(tests, "utf-8")
    for title in SHEETS:
        sheet = re.sub("(?m)^> .*\n", "", sheet_text(title))
        (folder / f"SHEET{title[0]}.md").write_text(sheet, "utf-8")
    everything = "\n".join(map(sheet_text, SHEETS))
    lecturers.write_text(f"{everything}\n```python{solutions}```\n", "utf-8")


def shell(folder, *command):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)


def test_homework(tmp_path):
    week, grade = tmp_path / "week1", "-m pytest -q -p no:cacheprovider -k test_ex".split()
    assert shell(tmp_path, __file__, "week1").returncode == 0
    everything = "".join(path.read_text("utf-8") for path in week.iterdir())
    lecturers = (tmp_path / "week1-LECTURERS.md").read_text("utf-8")
    hidden = re.findall("(?m)^> .*", "".join(text for *_, text in SHEETS.values()))
    for answer in [*ANSWERS.values(), *hidden]:
        assert answer in lecturers and answer not in everything, answer
    assert all(stub in everything for stub in STUBS.values()) and len(STUBS) == 11
    assert "WRONG" not in everything and "lecturers" not in everything
    result = shell(week, *grade).stdout
    assert "  0 of 100 points" in result and " passed" not in result, result[-2000:]
    assert "Traceback" not in result and result.count("exercise 4: newton") == 1, result
    (week / "icl_newton.py").write_text(TEXT, "utf-8")
    assert "  100 of 100 points" in (result := shell(week, *grade).stdout), result[-2000:]
    for bad in ("week1", "week1-LECTURERS.md", "--help", ""):  # work in it; a file; no folder
        run = shell(tmp_path, __file__, *bad.split())
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert len(list(tmp_path.iterdir())) == 2, "nothing else is written"


# --------------------------------------------------------------------------------------------------
# Everything but the exercises

import dataclasses
import json
import math
import runpy

import torch.nn.functional as F

lib, near = icl_newton, functools.partial(close, dtype=None)


def tiny(**changes):
    small = dict(d=3, n=6, layers=4, width=8, heads=2, steps=12, batch=8, prompts=32, device="cpu",
                 tuning=5, curriculum=0, seeds=1)  # fmt: skip
    return lib.Config(**small | changes)


def test_fresh_prompts():
    config = tiny(n=30, noise=0.5, kappa=1e4)
    (xs, ys), others = lib.fresh_prompts(config, 200, 1), lib.fresh_prompts(config, 200, 2)
    assert torch.isin(xs, others[0]).float().mean() < 0.01, "purposes share prompts: readouts judge themselves"
    other_seed = lib.fresh_prompts(tiny(n=30, seed=2), 200, 1)[0]
    assert torch.isin(xs, other_seed).float().mean() < 0.01, "seeds share prompts"
    assert torch.equal(xs, lib.fresh_prompts(config, 200, 1)[0])
    rest = ys[..., None] - xs @ torch.linalg.pinv(xs) @ ys[..., None]
    near(rest.square().sum() / 200 / 28, 0.25, "noise", 0.1)
    spread = torch.linalg.svdvals(xs)
    assert (spread[:, 0] > 20 * spread[:, -1]).float().mean() > 0.9, "kappa"


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
        near(lib.conjugate_gradient(xs, ys, 5, ridge), slow, "CG; exact after d steps", 1e-6)
        near(lib.ols(xs, ys, ridge), slow[3:4], "least squares", 1e-6)
        gd = lib.gradient_descent(xs, ys, 64, ridge)[[0, 1, 2, 4, 8, 16, 32, 64]]
        near(lib.gradient_descent_doubling(xs, ys, 6, ridge), gd, "GD after 0, 1, 2, 4, ... steps")
    xs *= 0.02 ** torch.arange(3)
    near(lib.ols(xs, xs.sum(-1))[0, :, 5], xs[:, 5].sum(-1), "1e-8 is no rounding", 1e-4)


def test_correction_1_the_printed_alpha_stalls():
    xs, ys = some()
    S = lib.prefix_moments(xs, ys)[0][:, -1]
    edge = 2 / torch.linalg.matrix_norm(S @ S, 2)[:, None, None, None]
    for alpha, stalls in ((edge, True), (None, False)):
        miss = (lib.newton(xs, ys, 40, alpha)[-1] - ys)[:, -1].abs().median()
        assert (miss > 1e-4) == stalls, "2/||S S^T||_2 stalls, the default does not"


def test_correction_2_heads_of_equal_value():
    one, h = torch.ones(1, 1).double(), torch.tensor([[2.0], [-3.0]]).double()
    printed = [(one, one, one), (-one, one, one)]  # both heads with the same value
    for heads, added in ((lib.linear_heads(one, one, one), [26, -39]), (printed, [-10, -15])):
        near((lib.relu_attention(h, heads, one) - h)[:, 0], added, "V, -V: s; V, V: |s|")


def test_correction_3_printed_order(plant):
    (xs, ys), real = some(16, 10), lib.newton_layer
    alpha = lib.newton_start(lib.prefix_moments(xs, ys)[0]).min()
    exact = lib.newton(xs, ys, 40, alpha)[..., -1]
    gap = lib.construction(xs, ys, 40, alpha) - exact
    near(gap + 1, torch.ones(41, 16), "step k after k + 2 layers", 1e-8)
    plant("newton_layer", lambda d: ([(K, Q, V) for Q, K, V in real(d)[0]], real(d)[1]))
    gap = lib.construction(xs, ys, 40, alpha)[-1] - exact[-1]
    assert gap.abs().max() > 1e-7, "T S T forgets rounding, T S T^T doubles it"


def test_correction_4_gd_off_the_span():
    (xs, ys), start = some(300, 20, 9), torch.rand(300, 9, 1).double()
    shift = (xs @ start)[..., 0]  # of y, as w_0 is one of w
    far, near_0 = (lib.similarity_of_errors(lib.gradient_descent_doubling(xs, ys - z, 30)[-1:] + z,
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
    for W, size in ((model.read_in, 0.5), (torch.cat(qkv), one), (up, one), (out, one / 2),
                    (down, one / 2)):  # fmt: skip
        near(W.std() / size, 1, f"standard deviation of {tuple(W.shape)}", 0.2)
    code = model.positions.double() / 0.3
    near((code @ code.mT).diagonal(), torch.full((81,), 32.0), "sin^2 + cos^2", 1e-5)
    near(code[:, [0, 31]], (torch.arange(81)[:, None] * torch.tensor([1, 0.01])).sin(), "1, .01", 1e-4)
    step = torch.linalg.lstsq(code[:-1], code[1:], driver="gelsd").solution
    near(code[:-1] @ step, code[1:], "a step to the next token is one linear map", 1e-4)
    (adam,) = lib.make_optimizers(model, tiny(recipe="fu"))
    assert adam.defaults["lr"] == 1e-4 and len(adam.param_groups[0]["params"]) == 5


def test_training_stays_on_its_device(plant):
    model, *data = (z.float().to("meta") for z in (lib.Transformer(tiny()), *some()))
    plant("sample_prompts", lambda *args: data)
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
    calls = plant("sample_prompts", lambda *args: (xs, ys))
    for step, factor in ((7, 0.08 * 293 / 300), (98, 0.99 * 202 / 300), (299, 1 / 300)):
        w = model.w.detach().clone()
        e = w * x - ys
        slope = 0.75 * e.sign() * e.abs().sqrt() * x / (e.abs().pow(1.5).mean(0) + 1e-40).sqrt()
        slope, factor = (2 * e * x, 1) if recipe == "fu" else (slope, factor)
        returned = lib.training_step(model, [torch.optim.SGD([model.w], 0.5)], config, step, 0)
        near(returned, e, "returns the errors before the step")
        w -= 0.5 * factor * slope.mean(0) / 7
        near(model.w.detach(), w, "root of mean |e|^1.5, scheduled; fu: squares")
    assert calls[0].args == (8, 6, 3, 1.0, 0.0, 0), "batch, n, d, kappa, noise, generator"
    grows = tiny(d=5, n=8, curriculum=10, steps=99)
    found = [lib.curriculum(grows, step) for step in (0, 9, 10, 20, 29, 30, 98)]
    assert found == [(2, 6), (2, 6), (3, 8), (4, 8), (4, 8), (5, 8), (5, 8)], found


def test_training_resumes_to_the_bit(tmp_path, plant, monkeypatch):
    def step(*args):
        if len(calls) == 301 + 2:  # two rehearsals come first
            raise KeyboardInterrupt
        return real(*args)

    config = tiny(steps=320, checkpoints=str(tmp_path / "a"), device="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    whole = lib.train(dataclasses.replace(config, checkpoints=str(tmp_path / "b")))
    real, calls = lib.training_step, plant("training_step", lambda *args: step(*args))
    with pytest.raises(KeyboardInterrupt):
        lib.train(config)
    first = len(calls)
    for model in lib.train(config), lib.train(config):
        for a, b in zip(whole.parameters(), model.parameters()):
            assert a.equal(b) and not b.requires_grad, "not bit for bit the same"
    steps = [c.args[3] for c in calls[first:]]
    assert steps == [0, 319, *range(250, 320), 0, 319], "goes on at the checkpoint; then at the end"
    plant("training_step", lambda *args: real(*args) * math.nan)
    with pytest.raises(FloatingPointError, match="step 12"):
        lib.train(tiny(checkpoints=str(tmp_path / "c")))
    assert not (tmp_path / "c").exists(), "a failed run is not saved"


def test_training_at_kappa_goes_on_from_kappa_1(tmp_path, plant):
    calls, real = plant("training_step"), lib.train
    config = tiny(kappa=9.0, checkpoints=str(tmp_path))
    hard, easy = real(config), real(dataclasses.replace(config, kappa=1.0))
    kappas = [c.args[2].kappa for c in calls]  # two of each training's are rehearsals
    assert kappas.count(1.0) == 2 + 12 + 2 and kappas.count(9.0) == 2 + 5, "once, then for `tuning`"
    plant("training_step", lambda *args: None)
    assert not hard.attention.equal(easy.attention)
    untrained = lib.train(tiny(kappa=9.0, steps=0, tuning=0, checkpoints=str(tmp_path / "none")))
    torch.manual_seed(1)
    assert untrained.mlp.equal(lib.Transformer(tiny()).mlp) and not (tmp_path / "none").exists()


def test_checkpoint_names(tmp_path, monkeypatch):
    def name(threads=None, **changes):
        config = tiny(**{"n": 9, "checkpoints": str(tmp_path)} | changes)
        torch.manual_seed(config.seed)
        model, generator = lib.Transformer(config), torch.Generator().manual_seed(config.seed)
        optimizers = lib.make_optimizers(model, config)
        return lib.Checkpoint(config, model, optimizers, generator).path.name

    same = dict(seeds=2, prompts=9, figures="rates", device="auto", out="x")
    assert name() == name(**same), "these do not decide the weights"
    other = dict(d=4, n=8, kappa=2.0, noise=0.1, layers=5, width=10, heads=1, recipe="fu", steps=9,
                 tuning=9, batch=9, muon_lr=0.02, adam_lr=0.02, curriculum=1, seed=2)  # fmt: skip
    names = {name()} | {name(**{key: value}) for key, value in other.items()}
    assert len(names) == len(other) + 1, "these do"
    for module, thing, value in (
        (torch, "__version__", "9"), (torch, "get_num_threads", lambda: 99),
        (lib, "causal_attention", lambda q, k, v: v), (lib, "orthogonalize", lambda G: G),
        (lib, "interleave", lambda xs, ys: lib.F.pad(xs.repeat_interleave(2, 1)[:, 1:], (0, 0))),
        (lib, "curriculum", lambda config, step: (2, 6)),
    ):  # fmt: skip
        with mock.patch.object(module, thing, value):
            names.add(name())
    assert len(names) == len(other) + 7, "another torch, other threads, changed code: another name"


def test_damaged_checkpoints(tmp_path):
    config = tiny(checkpoints=str(tmp_path))
    lib.train(config)
    (path,) = tmp_path.iterdir()

    def damage(change):
        saved = torch.load(path, weights_only=True)
        change(saved)
        return saved

    good = path.read_bytes()
    bad = [torch.zeros(3), [1, 2], {}, *map(damage, (
        lambda z: z["parts"][0].pop("read_out"),
        lambda z: z["parts"][0].update(read_out=torch.zeros(9)),
        lambda z: z["parts"][1].update(state={}), lambda z: z["parts"].pop(),
        lambda z: z.update(generator=z["generator"][:9]), lambda z: z.update(done=13),
        lambda z: z["parts"][0]["mlp"].fill_(math.nan), lambda z: z.update(done="12"),
    ))]  # fmt: skip
    for content in [b"", good[:99], good[: len(good) // 2], *bad]:
        torch.save(content, path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} is damaged: delete it"):
            lib.train(config)
    path.write_bytes(good)
    lib.train(config)


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "deep" / "file"
    lib.write_file(path, b"old")
    with mock.patch.object(Path, "replace", side_effect=OSError(28, "No space left")):
        with pytest.raises(OSError, match="cannot write .*file: No space left"):
            lib.write_file(path, b"new")
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1
    script = "ulimit -f 20; trap '' XFSZ; exec $0 $1 --preset quick --steps 30 --width 64"
    command = ["bash", "-c", script, sys.executable, PROGRAM]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "cannot write" in run.stderr
    assert not [name for *_, names in os.walk(tmp_path) for name in names if name[0] == "."]


def test_the_sheet_is_shared_and_the_curves_have_one_look():
    sheet = functools.cache(lib.make_sheet)
    axes = sheet("a", "b", ylabel="y")
    for label, seed in (("GD", 1), ("GD", 2), ("Newton, late", 1)):
        lib.curve(sheet("a", "b", ylabel="y")[0], label, [seed, 5])
    lines = axes[0].get_lines()
    assert [z.get_color() for z in lines] == [lib.LOOK[k][0] for k in ("GD", "GD", "Newton")]
    assert lib.draw(axes, "title")[1:4] == b"PNG"
    (legend,) = axes[0].figure.legends
    assert [z.get_text() for z in legend.get_texts()] == ["GD", "Newton, late"], "once a label"


L = 5
ORACLES = {  # name: its trajectory of L steps
    "Newton": lambda xs, ys: lib.newton(xs, ys, L),
    "GD": lambda xs, ys: lib.gradient_descent(xs, ys, L),
    "CG": lambda xs, ys: lib.conjugate_gradient(xs, ys, L),
    "zeros": lambda xs, ys: torch.zeros(L + 1, *ys.shape, dtype=torch.float64),
    "noise": lambda xs, ys: draws(L + 1, *ys.shape),
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLES)
def test_planted_learners(name, plant):
    """Every experiment, with a learner whose numbers are known in the layers' place."""
    plant("train", lambda config: None)
    calls = plant("read_layers", lambda model, fitting, prompts: ORACLES[name](*prompts))
    lib.study.cache_clear()
    config, numbers = tiny(d=8, n=16, layers=L, prompts=300), {}
    for experiment in (lib.rates, lib.convergence, lib.heatmaps, lib.products, lib.conditioning):
        axes, title, found = experiment(config, functools.cache(lib.make_sheet))
        drawn = [z for z in axes[0].get_lines() if z.get_label() == "Transformer"]
        assert drawn or experiment is lib.heatmaps, "the layers are not drawn"
        numbers |= {key: np.asarray(z, dtype=float) for key, z in found.items()}
        title.format(**numbers)
    _, (fitting, _), (judged, _) = calls[0].args
    assert len(fitting) == 4 * len(judged) == 1200 and not torch.equal(fitting[:300], judged)
    s, n = lib.study(config), config.n
    run = s.runs["Transformer"][1]
    error = ((run[-1, :, n] - s.ys[:, n]) ** 2).mean() / 8
    near(numbers["error"], error, "the last layer's error after n examples")
    a, b, ls = (((z - s.ys)[:, 1:]).numpy() for z in (run[-1], s.runs["GD"][1][2], s.least_squares[0]))
    cosine = np.mean([u @ v / max(np.linalg.norm(u) * np.linalg.norm(v), 1e-30) for u, v in zip(a, ls)])
    near(numbers["like_ols"], cosine, "similarity to least squares", 1e-6)
    pair = lib.squared_error(run[1:], s.ys, n), range(33), lib.squared_error(s.runs["Newton"][1], s.ys, n)
    slow = np.polyfit([3, 4, 5], lib.equal_error_steps(*pair)[2:], 1)[0]
    near(numbers["equal_rate"][0], slow, "equal error after n examples, layers 3..L", 1e-6)
    for key, t in (("products_d", 8), ("products_n", n)):
        best = lib.polynomial_errors(config, t)
        worth = lib.equal_error_steps(lib.squared_error(run[-1:], s.ys, t), range(129), best)
        near(numbers[key], [worth[0], L], "the last layer's products, and the layers", 1e-6)
    last = []
    for kappa in (100.0, 1.0):
        z = lib.study(dataclasses.replace(config, kappa=kappa))
        curves = [lib.squared_error(z.runs[k][1], z.ys, n) for k in ("Transformer", "Newton", "GD")]
        last += [lib.equal_error_steps(curves[0][-1:], counts, errors)[0] for counts, errors in
                 zip((lib.NEWTON_STEPS, lib.GD_STEPS), curves[1:])]  # fmt: skip
    near(numbers["kappa_newton"], [last[0], 1.5 * last[2]], "Newton: hard, 1.5 times easy", 1e-6)
    near(numbers["kappa_gd"], [last[1], 4 * max(last[3], 1)], "GD: hard, 4 times easy", 1e-6)
    e = np.log10([max(((z[:, n] - s.ys[:, n]) ** 2).mean().item(), 1e-300) for z in run])
    near(numbers["superlinear"], [e[4] - e[5], max(e[2] - e[3], 0.1)], "digits of late, early layers")
    for key, steps in (("newton_line", numbers["newton_steps"]), ("gd_exponential", numbers["gd_steps"])):
        fits = [lib.line_fit(z)[1] for z in (steps, lib.doublings(steps))]
        near(numbers[key], fits if key == "newton_line" else fits[::-1], "R^2: its shape, its rival")
    claims = lib.table({key: [z.tolist()] for key, z in numbers.items()})[1]
    holds = {key for key, claim in claims.items() if claim["holds"]}
    if name == "Newton":
        near(numbers["newton_steps"], np.arange(1, L + 1), "Newton matches itself")
        near(numbers["newton_rate"][0], 1, "slope 1")
        near(numbers["equal_rate"][0], 1, "slope 1 by equal error", 1e-6)
        near(numbers["newton_line"][0], 1, "R^2 of a line")
        near(numbers["like_newton"][0], 1, "similar to itself")
        near(numbers["null"], [1, 1], "no deviation, nothing to shuffle")
        near(numbers["kappa_newton"], [L, 1.5 * L], "kappa: the same step", 1e-6)
        assert {"newton_line", "like_newton", "kappa_newton"} <= holds
    elif name == "GD":
        near(numbers["gd_steps"][[0, 1, 3]], [1, 2, 4], "steps 1, 2 and 4 match themselves")
        assert numbers["like_newton"][1] > 0.99, "its last step is nearly one of GD's"
        assert numbers["products_n"][0] <= L + 0.1, "GD is worth one product a step, or less"
        assert not {"like_newton", "newton_rate", "equal_rate", "products_n"} & holds
    elif name == "CG":
        near(numbers["newton_rate"][0], lib.line_fit(lib.climb(config, "CG")[0])[0], "CG in both places")
        near(numbers["equal_rate"][0], lib.line_fit(lib.climb(config, "CG")[2])[0], "CG in both places")
    else:
        assert not holds - {"kappa_newton"}, holds
        assert numbers["products_n"][0] < 0.5 and numbers["newton_rate"][0] == 0
    if name == "zeros":
        near(numbers["error"], (s.ys[:, n] ** 2).mean() / 8, "no answer", 1e-6)
    lib.study.cache_clear()


def test_an_untrained_network_passes_no_claim_about_layers(tmp_path):
    config = tiny(d=5, n=10, layers=6, width=32, steps=0, tuning=0, prompts=300, out=str(tmp_path),
                  figures="rates,convergence,heatmaps,products,conditioning")  # fmt: skip
    found = lib.run(config)
    assert not [key for key, claim in found.items() if claim["holds"]], found


def test_rulers_by_slow_loops():
    (xs, ys), counts = some(30), [0, 1, 2, 4, 8]
    scales = torch.tensor([1, 2, 0.3, 0.05]), torch.tensor([7, 2, 0.6, 0.1, 0.01])
    layers, run = (ys + z[:, None, None] * draws(len(z), 30, 7) for z in scales)
    errors, run_errors = ([(z[:, 4] - ys[:, 4]).square().mean() for z in zs] for zs in (layers, run))
    near(lib.squared_error(layers, ys, 4), torch.stack(errors), "mean over prompts at t")
    expected = []
    for e in errors:
        k = max(i for i in range(4) if run_errors[i] >= e or i == 0)
        share = (run_errors[k] / e).log() / (run_errors[k] / run_errors[k + 1]).log()
        expected.append(counts[k] + share.clamp(0, 1) * (counts[k + 1] - counts[k]))
    near(lib.equal_error_steps(*map(torch.stack, (errors,)), counts, torch.stack(run_errors)),
         torch.stack(expected), "log-linear between steps", 1e-6)
    bump = torch.tensor([1.0, 0.1, 0.5, 0.01])
    near(lib.equal_error_steps(torch.tensor([0.3, 9, 1e-9, 0.05]), [0, 1, 2, 3], bump),
         [math.log10(1 / 0.3), 0, 3, 2 + math.log10(2)], "the least so far; clamped", 1e-6)
    near(lib.most_similar_steps(ys + 3 * (run - ys)[[3, 0, 2]], (counts, run), ys), [4, 0, 2],
         "steps, not indices")
    y = np.array([99, -7, 3, 5, 7, 9.0])
    near([*lib.line_fit(y), *lib.line_fit(y[2:], 1)], [2, 1, 2, 1], "from layer 3 on")
    z = np.random.default_rng(0).normal(size=9)
    near(lib.line_fit(z)[1], np.corrcoef(np.arange(7), z[2:])[0, 1] ** 2, "R^2")
    assert lib.line_fit(np.ones(9))[1] == 0, "a constant is no line"
    near(lib.doublings([0, 0.5, 1, 8]), [0, 0, 0, 3], "at least one step")


def test_the_null_keeps_steps_and_shuffles_deviations():
    ys, error = draws(2000, 5), draws(1, 2000, 5) + 2.0
    found = lib.null_similarity(ys + error * 1.001, ys + error, ys)
    assert found > 0.999, "small deviations change nothing"
    found = lib.null_similarity(ys + 1.5 * (error - 2), ys + error - 2, ys)
    assert found < 0.95, "half its own error more, or less, would score 1: take other prompts'"
    found = lib.null_similarity(ys + error + 5.0, ys + error, ys)
    slow = [F.cosine_similarity(error[..., 1:] + z, error[..., 1:], dim=-1).mean() for z in (5, -5)]
    near(found + 1, [1 + sum(slow) / 2], "a constant deviation: half of the signs are -", 0.08)
    own = torch.cat([error, -3 * error])
    near(lib.null_similarity(ys + own, ys + own, ys), [1, 1], "no deviation")


def test_layers_are_read_by_fitted_lines():
    model = SimpleNamespace(read_out=torch.zeros(1), states=lambda xs, ys: torch.stack([xs, xs**3]))
    prompts = [(xs.float(), (xs.sum(-1) + 5).float())
               for xs, _ in (some(40), some(9))]  # fmt: skip
    found = lib.read_layers(model, *prompts)
    close(found[0], prompts[1][1].double(), "y = 5 + a line of the state: the constant counts", 1e-5)
    assert found.shape == (2, 9, 7) and (found[1] - prompts[1][1]).abs().max() > 0.1


def test_best_polynomials(plant):
    (X, Y), (xs, ys) = prompts = some(200), some()
    plant("fresh_prompts", lambda *args, purpose: (X, Y))
    plant("study", lambda config: SimpleNamespace(xs=xs, ys=ys))
    found, powers = lib.polynomial_errors(tiny(), 5), []
    for x, y in prompts:
        S, b = (z[:, 5] for z in lib.prefix_moments(x, y))
        size = torch.linalg.matrix_norm(S, 2, keepdim=True)
        S, w = S / size, b[..., None] / size
        powers.append((x[:, 5, None] @ torch.cat([w, S @ w, S @ S @ w], 2))[:, 0])
    assert len(found) == 129
    for D in (0, 1, 2, 3):
        fit, test = (z[:, :D] for z in powers)
        slow = (test @ torch.linalg.pinv(fit) @ Y[:, 5] - ys[:, 5]).square().mean()
        near(found[D], slow, f"{D} products", 1e-6)


def test_linear_attention():
    (xs, ys), A, P = some(2), draws(3, 3), torch.zeros(4, 4).double()
    M, Q = torch.eye(7).double(), P.clone()
    M[6, 6], P[3, 3], Q[:3, :3] = 0, 1, -A
    for x, y, answer in zip(xs, ys, lib.linear_attention(A, xs, ys)):
        Z = torch.cat([x, y[:, None]], 1).mT
        Z[3, 6] = 0
        Z = Z + P @ Z @ M @ (Z.mT @ Q @ Z) / 6
        near(answer, -Z[3, 6], "Z + (1/n) P Z M (Z^T Q Z)")


def test_softmax_attention_by_huangs_formula():
    """Two steps of gradient descent from Q = 0, with the gradient that Huang's formulas give."""
    K, p = 4, torch.tensor([0.4, 0.2, 0.2, 0.2])
    runs = [lib.train_attention(K, 0.4, 2, seed, eta=0.7) for seed in range(300)]
    shares = torch.multinomial(p.expand(50_000, K), 10 * K, True)
    a = F.one_hot(shares, K).double().mean(1)[:, :, None].expand(-1, K, K)  # [prompt, n, k]
    expected = []
    for _ in range(2):
        loss = (a - torch.eye(K)).square().sum(1).mean(0) / 2
        expected.append([loss[0], loss[1:].mean()])
        right = a.diagonal(dim1=1, dim2=2)[:, None]  # a_k
        others = a.square().sum(1, keepdim=True) - right**2
        moves = a * (others - a - right * (1 - right))  # B_{k,n}; and A_k on the diagonal
        moves = torch.where(torch.eye(K).bool(), right * ((1 - right) ** 2 + others), moves)
        a = (a.log() + 0.7 * p * moves.mean(0)).softmax(1)
    near(torch.stack(runs).mean(0).T, torch.tensor(expected), "losses, step by step", 0.01)


def test_theory_experiments(plant):
    sheet = functools.cache(lib.make_sheet)
    assert lib.by_hand(tiny(), sheet)[2]["by_hand"] < 1e-9
    assert lib.preconditioners(tiny(), functools.cache(lib.make_sheet))[2]["ahn_one"] < 0.03
    path = torch.ones(2, 50) * 0.01  # above a tenth of 1: feature 1 for 5 steps, the others for 40
    path[0, :5] = path[1, :40] = 1
    plant("train_attention", lambda *args: path)
    assert lib.stages(tiny(), functools.cache(lib.make_sheet))[2]["huang"] == 8


def test_the_table_and_several_seeds(capsys, tmp_path, monkeypatch):
    def stub(config, sheet):
        axes = sheet("panel")
        lib.curve(axes[0], "CG", [config.seed])
        numbers = {"like_ols": config.seed / 4, "equal_rate": (config.seed, 2.0), "error": 3.0}
        return axes, "{like_ols:.2f} and {equal_rate[0]:.0f}", numbers

    monkeypatch.setattr(lib, "EXPERIMENTS", {"rates": stub})
    results = lib.run(tiny(figures="rates", seed=2, seeds=3, out=str(tmp_path)))
    rows = (tmp_path / "table.md").read_text().split("\n")[2:]
    assert rows[0].endswith("| 2 3 4 > 2 | 2 of 3 |") and rows[1].endswith("| 0.5 0.75 1 > 0.975 | 1 of 3 |")
    printed = capsys.readouterr().out
    assert "rates: 0.75 and 3" in printed and all(row in printed for row in rows)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["measured"]["error"] == [3, 3, 3] and record["settings"]["seeds"] == 3
    assert results["equal_rate"] == dict(values=(2, 3, 4), bounds=(2, 2, 2), holds=2)
    one = lib.table({key: [0.5] if claim[2] else [(1.0, 1.0)] for key, claim in lib.CLAIMS.items()})
    assert len(one[0]) <= 18 and max(map(len, one[0])) <= 100
    assert sum(claim["holds"] for claim in one[1].values()) == 0, "equal is not more, nor less"


def test_bad_input(tmp_path, monkeypatch, capsys, plant):
    monkeypatch.chdir(tmp_path)
    plant("run", AssertionError("bad input was run"))
    Path("a_file").write_text("mine")
    for bad in """figures x|no_such 1|d 1|n 6|steps x|noise -1|kappa .5|muon_lr nan|heads 3
            |preset x|device x|recipe x|layers 3|batch 0|curriculum 200|adam_lr inf|seeds 0
            |preset quick,small|out a_file/x|checkpoints a_file|seed -1|curriculum -1|adam_lr 0
            |seed 92233720368547|kappa 1e39|noise 1e30|width 1e3|prompts 1|steps 9|d 9e9
            |muon_lr 1e300|tuning -1|figures rates,|seed 1e3""".split("|"):
        with pytest.raises(SystemExit, match="2"):
            lib.main(f"--{bad}".split())
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1, f"{bad}: {err}"
        assert bad.split()[0] in err or "a_file" in err, f"{err} does not name --{bad}"
    assert Path("a_file").read_text() == "mine"


def test_good_input_and_exit_statuses(monkeypatch, tmp_path, capsys, plant):
    monkeypatch.chdir(tmp_path)
    least = "--d 2 --n 4 --layers 4 --width 2 --kappa 1 --noise 0 --curriculum 0 --seed 0"
    line, c = lib.parse(f"{least} --preset quick".split())
    assert (c.d, c.width, c.prompts, c.out, c.seed) == (2, 2, 256, "figures/quick", 0)
    assert "not to be trusted" in line and lib.parse([])[1] == lib.Config()
    for error in (FloatingPointError, ValueError, OSError, KeyboardInterrupt, MemoryError):
        plant("run", error("x"))
        assert lib.main(["--figures", "rates"]) == (130 if error is KeyboardInterrupt else 1)
        assert capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize("law", [dict(kappa=1e6), dict(seed=10**9), dict(noise=1e3), dict(prompts=2)])
def test_numbers_at_the_edge_work_to_the_end(law, tmp_path):
    plain = "rates,convergence,heatmaps,products,conditioning,by_hand"
    lib.run(tiny(figures=plain, out=str(tmp_path), checkpoints=str(tmp_path), **law))
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_the_program_runs_without_its_file(tmp_path, monkeypatch):
    """In a notebook, by exec or from standard input: nothing needs the source text."""
    monkeypatch.chdir(tmp_path)
    small = "d=3, n=6, layers=4, width=8, steps=3, tuning=2, prompts=32, curriculum=0, figures='rates'"
    for scope in ({}, {"__name__": "__main__"}):
        exec(TEXT, scope)
        assert "newton_rate" in eval(f"run(Config({small}))", scope)
    scope = runpy.run_path(str(PROGRAM))
    assert "newton_rate" in scope["run"](eval(f"Config({small})", scope))
    command = f"{TEXT}\nrun(Config({small}))\n"
    done = subprocess.run([sys.executable, "-"], input=command, capture_output=True, text=True)
    assert done.returncode == 0 and "rates:" in done.stdout, done.stderr


def test_the_readme_has_the_committed_table():
    readme, folder = PROGRAM.with_name("README.md").read_text("utf-8"), PROGRAM.with_name("figures")
    assert (folder / "three_seeds" / "table.md").read_text("utf-8") in readme
    for path in folder.glob("three_seeds*/results.json"):  # your own runs write elsewhere
        m = json.loads(path.read_text("utf-8"))["measured"]
        rate, error = (" ".join(f"{z:.2g}" for z in row) for row in (
            [pair[0] for pair in m["newton_rate"]], m["error"]))  # fmt: skip
        assert f"| {rate} | {error} |" in readme, f"{path.parent.name}: | {rate} | {error} |"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(print("usage: python test_icl_newton.py FOLDER", file=sys.stderr) or 2)
    try:
        write_homework(sys.argv[1])
    except ValueError as error:
        sys.exit(print(error, file=sys.stderr) or 2)
