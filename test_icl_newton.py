"""Tests of icl_newton.py, and the grader of its exercises.

    python -m pytest                                      all tests
    python -m pytest -k test_ex                           the exercises, with points (-k ex04: one)
    timeout -s INT 120 python -m pytest -k test_ex        the same, for two minutes at most

Exercises are tried on new random numbers in every run; ICL_SEED=7 repeats the run of seed 7."""

import functools
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

try:
    import icl_newton
except Exception as error:  # say where a hand-in is broken, and give it its 0 points
    icl_newton, BROKEN = (
        None,
        " ".join("".join(traceback.format_exception_only(error)).split()),
    )
else:
    BROKEN = ""

SEED = int(os.environ.get("ICL_SEED", torch.seed() % 10**6))
SOLVED = []  # exercises that come solved in this folder
EXERCISES = {  # number: function, points
    1: ("sample_prompts", 10),
    2: ("gradient_descent", 10),
    3: ("newton_start", 5),
    4: ("newton", 15),
    5: ("gradient_descent_doubled", 10),
    6: ("interleave", 5),
    7: ("similarity_of_errors", 10),
    8: ("share_found", 10),
    9: ("newton_layer", 10),
    10: ("optimal_preconditioner", 15),
}
OUTCOMES = {number: [] for number in EXERCISES}  # what each of its tests has said


@pytest.fixture(scope="session", autouse=True)
def points(request):
    """At the end, a line for each exercise that was to run: points, and the first thing wrong."""
    yield
    names = [item.name for item in request.session.items]
    lines, total, most = [], 0, 0
    for number, (function, worth) in EXERCISES.items():
        tests = sum(name.startswith(f"test_ex{number:02}") for name in names)
        if not tests or number in SOLVED:
            continue
        said = OUTCOMES[number] + ["not run"] * (tests - len(OUTCOMES[number]))
        wrong = [text for text in said if text != "passed"]
        got = 0 if wrong else worth
        total, most = total + got, most + worth
        line = f"  ex{number:02} {function:<25}{got:>2} of {worth:<2} {' '.join(wrong[:1])}"
        lines.append(line.rstrip())
    if most:
        lines.append(f"  {total} of {most} points (to repeat: ICL_SEED={SEED})")
        with request.config.pluginmanager.get_plugin(
            "capturemanager"
        ).global_and_fixture_disabled():
            print("", *lines, sep="\n")


@pytest.fixture
def icl():
    """The program."""
    return icl_newton


def in_a_line(error):
    """What went wrong; of a crash also where."""
    text = (str(error).splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        frame.lineno for frame in frames if Path(frame.filename).name == "icl_newton.py"
    ]
    if lines:
        text = f"{type(error).__name__} in line {lines[-1]} of icl_newton.py: {text}"
    return text


def exercise(number):
    """A test of this exercise: its outcome is kept, and a failure is told in one line."""

    def decorate(test):
        @functools.wraps(test)
        def graded(icl):
            if number in SOLVED:
                pytest.skip("solved")
            torch.manual_seed(SEED)
            torch.set_deterministic_debug_mode("error")  # torch.empty is full of nan
            said = "stopped"
            try:
                assert not BROKEN, BROKEN
                test(icl)
                said = "passed"
            except pytest.skip.Exception:
                said = "skipped"
            except (Exception, SystemExit) as error:
                said = in_a_line(error)
            finally:
                torch.set_deterministic_debug_mode("default")
                OUTCOMES[number].append(said)
            if said == "skipped":
                pytest.skip(said)
            if said != "passed":
                pytest.fail(said, pytrace=False)

        return graded

    return decorate


def draws(*shape):
    """Standard normal numbers, float64."""
    return torch.randn(*shape, dtype=torch.float64)


def orthonormal(*shape):
    """Random matrices with orthonormal columns."""
    return torch.linalg.qr(draws(*shape)).Q


def call(function, *tensors, **options):
    """function(*tensors, **options), which must leave the tensors as they were."""
    before = [tensor.clone() for tensor in tensors]
    result = function(*tensors, **options)
    same = all(map(torch.equal, before, tensors))
    assert same, "an input was changed in place: work on a copy"
    return result


def check_form(z, shape, message, dtype=torch.float64):
    """The type, then the whole shape, then that all entries are numbers."""
    assert isinstance(z, torch.Tensor), f"{type(z).__name__}, not a tensor: {message}"
    found, wanted = tuple(z.shape), tuple(shape)
    assert found == wanted, f"shape {found}, expected {wanted}: {message}"
    assert z.dtype == (dtype or z.dtype), f"dtype {z.dtype}, not {dtype}: {message}"
    assert z.isfinite().all(), (
        f"some entries are nan or infinite, or never set: {message}"
    )


def close(actual, expected, message, tolerance=1e-9, dtype=torch.float64):
    """The form of `expected`, then its entries, relative to the largest."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    check_form(actual, expected.shape, message, dtype)
    miss = (actual.double() - expected.double()).abs().max()
    error = miss / expected.abs().max().clamp_min(1e-9)
    hint = ": float32, or an eps inside?" if tolerance < error < 1e-4 else ""
    assert error <= tolerance, f"{message} (largest relative error {error:.1e}{hint})"


def check_standard(z, message, tolerance, fourth=3):
    """z (samples, d) must have mean 0, covariance I and a normal's fourth moment."""
    with_one = F.pad(z, (0, 1), value=1.0)  # its last row and column hold the mean
    moments = with_one.mT @ with_one / len(z)
    identity = torch.eye(len(moments))
    close(
        moments,
        identity,
        f"{message}: mean or covariance",
        tolerance,
        dtype=None,
    )
    normal = abs((z**4).mean() / fourth - 1) < 1.5 * tolerance
    assert normal, f"{message}: not a normal distribution"


@exercise(1)
def test_ex01_shapes_and_generator(icl):
    for prompts, n, d, law in (
        (3, 4, 2, dict(kappa=7.0)),
        (2, 1, 1, {}),
        (1, 5, 3, dict(noise=0.1)),
    ):
        generator, again = (torch.Generator().manual_seed(SEED) for _ in range(2))
        first, same, next_ones = (
            icl.sample_prompts(prompts, n, d, generator=z, **law)
            for z in (generator, again, generator)
        )
        for xs, ys in first, icl.sample_prompts(prompts, n, d, **law):
            check_form(xs, (prompts, n + 1, d), "xs (prompts, n+1, d)", torch.float32)
            check_form(ys, (prompts, n + 1), "ys (prompts, n+1)", torch.float32)
        repeated = all(map(torch.equal, first, same))
        assert repeated, "same seed, other prompts: pass the generator to every draw"
        moved_on = not any(map(torch.equal, first, next_ones))
        assert moved_on, "the next draws from the generator gave the same prompts"


@exercise(1)
def test_ex01_covariance(icl):
    why = "trace d; d//2 eigenvalues are kappa times the others, and x scales by their *roots*"
    for d, kappa in ((4, 1.0), (5, 30.0), (2, 7.0), (1, 9.0)):
        eigenvalues = torch.tensor([1.0] * (d - d // 2) + [kappa] * (d // 2))
        shrink = (eigenvalues.mean() / eigenvalues).sqrt()
        for x in icl.sample_prompts(2, 20_000, d, kappa=kappa)[0].double():
            check_standard(x @ torch.linalg.eigh(x.mT @ x)[1] * shrink, why, 0.12)
    xs = icl.sample_prompts(15_000, 1, 3, kappa=1e4)[0].double()
    first, query = F.normalize(xs, dim=-1).unbind(1)
    parallel = ((first * query).sum(1).abs() > 0.9).double().mean()
    assert parallel > 0.9, "the query has the covariance of the examples"
    why = "each prompt has x's and a uniform eigenbasis of its own: of *normal* numbers"
    check_standard(3**0.5 * first, why, 0.05, fourth=1.8)


@exercise(1)
def test_ex01_rule_and_noise(icl):
    """One w* explains a prompt. What the same draws gain with more noise is the noise."""
    for kappa in (1.0, 25.0):
        (xs, ys), (_, less), (_, more) = (
            icl.sample_prompts(
                3000, 7, 3, kappa, noise, torch.Generator().manual_seed(SEED)
            )
            for noise in (0.0, 0.4, 1.4)
        )
        xs, ys, noise = xs.double(), ys.double(), (more - less).double()
        w = torch.linalg.pinv(xs) @ ys[..., None]
        why = "without noise y = w*.x, for one w* and the x that is returned"
        close((xs @ w)[..., 0], ys, why, 1e-3)
        check_standard(
            w[..., 0],
            "w* ~ N(0, I), one a prompt; y from the *finished* x",
            0.18,
        )
        check_standard(
            noise, "noise is a *standard deviation*; each y, the last too", 0.18
        )
        related = (noise[..., None] * xs).mean((0, 1)).abs().max()
        assert related < 0.1, "the noise must not depend on x"


def planted_moments(*batch, d, zeros=0):
    """S and b whose eigenvalues (..., d), some of them 0, and eigenvectors U are known."""
    eigenvalues = torch.linspace(0.1, 0.3, d).double() * (1 + torch.rand(*batch, 1))
    eigenvalues[..., :zeros] = 0
    U = orthonormal(*batch, d, d)
    S = (U * eigenvalues[..., None, :]) @ U.mT
    return S, (S @ draws(*batch, d, 1))[..., 0], eigenvalues, U


def check_solver(solver, first, missing):
    """A trajectory of all steps must leave these shares of the way: missing(eigenvalues, k)."""
    for steps, batch, d, zeros, why in (
        (5, (3, 2), 4, 0, "a sign, a factor, the size of a step"),
        (300, (2,), 3, 0, "rounding grew: float32, or the order of M S M"),
        (6, (2,), 5, 2, "fewer examples than dimensions"),
        (3, (2, 2), 3, 3, "no example: S = 0 and b = 0"),
        (2, (), 1, 0, "one S, d = 1"),
        (0, (2,), 2, 0, "no step: step 0 alone"),
    ):
        S, b, eigenvalues, U = planted_moments(*batch, d=d, zeros=zeros)
        shares = [1 - missing(eigenvalues, k) for k in range(steps + 1)]
        found = torch.stack(shares) / eigenvalues.clamp_min(1e-9)
        expected = torch.einsum("...ij,k...j,...lj,...l->k...i", U, found, U, b)
        result = call(solver, S, b, steps=steps)
        check_form(result, expected.shape, f"(steps+1, ..., d): {why}")
        close(result[0], expected[0], f"step 0: {first}")
        close(result, expected, why)


@exercise(2)
def test_ex02_each_step_goes_down_the_gradient(icl):
    check_solver(
        icl.gradient_descent,
        "w = 0",
        lambda z, k: (1 - z / z[..., -1:].clamp_min(1e-9)) ** k,
    )


@exercise(3)
def test_ex03_alpha_is_safe_and_not_much_less(icl):
    """For spectra from rank one to flat, of any size: 0 < alpha lambda_max^2 <= 1."""
    for batch, spectrum in (
        ((), [1]),
        ((4,), [0, 0, 1]),
        ((), [0, 1]),
        ((2, 3), [0.2, 0.5, 1]),
        ((3,), [1, 1, 1, 1]),
    ):
        d = len(spectrum)
        U = orthonormal(*batch, d, d)
        S = (U * torch.tensor(spectrum)) @ U.mT
        sizes = 10 ** (6 * torch.rand(*batch, 1, 1).double() - 3)
        alpha = call(icl.newton_start, S * sizes)
        check_form(alpha, (*batch, 1, 1), "an alpha for each S")
        strength = alpha * sizes**2
        assert (strength <= 1 + 1e-9).all(), (
            "alpha lambda_max^2 above 1: R_0 is negative"
        )
        small = "alpha is too small: the square forgotten, an eps added, one for all S?"
        assert (strength >= 0.2 / d**2).all(), small
        check_form(
            icl.newton_start(0 * S),
            (*batch, 1, 1),
            "a finite alpha for S = 0, too",
        )
    S = torch.tensor([[1.0, 0], [0, 0]]).double()
    assert icl.newton_start(S) <= 1 + 1e-9, "S = diag(1, 0): alpha is above 1"


@exercise(4)
def test_ex04_newton_from_a_given_start(icl):
    for share in (
        0.9,
        0.0,
    ):  # M_0 = 0 is a start like any other: only None means alpha S
        check_solver(
            lambda S, b, steps: icl.newton(S, b, steps, share * 4 * S),
            "M_0 b, of the M_0 that is given",
            lambda z, k: (1 - share * 4 * z**2) ** (2.0**k),
        )


@exercise(4)
def test_ex04_newton_from_its_own_start(icl):
    S, _, eigenvalues, U = planted_moments(5, d=4)
    S = S * torch.tensor([0, 1, 1e-6, 1e6, 3]).double()[:, None, None]
    rule = draws(5, 4)
    b = (S @ rule[..., None])[..., 0]
    run = call(icl.newton, S, b, steps=30)
    check_form(run, (31, 5, 4), "(steps+1, ..., d)")
    S_b = (S @ b[..., None])[..., 0]
    alpha = (run[0] * S_b).sum(-1) / (S_b * S_b).sum(-1).clamp_min(1e-30)
    close(
        run[0],
        alpha[:, None] * S_b,
        "step 0 is alpha S b, with an alpha for each S",
    )
    close(
        run[-1][1:],
        rule[1:],
        "30 steps from alpha S find w*: the alpha must suit S",
        1e-6,
    )
    close(run[:, 0], torch.zeros(31, 4), "S = 0: w = 0", dtype=None)


@exercise(5)
def test_ex05_doubled_steps_are_those_of_gradient_descent(icl):
    for batch, d, zeros in (
        ((3, 2), 4, 0),
        ((2,), 5, 2),
        ((2, 2), 3, 3),
        ((), 1, 0),
    ):
        S, b, eigenvalues, U = planted_moments(*batch, d=d, zeros=zeros)
        eta = 1 / eigenvalues[..., -1:].clamp_min(1e-9)
        w, one_by_one = torch.zeros_like(b), []
        for step in range(1, 65):
            w = w + eta * (b - (S @ w[..., None])[..., 0])
            if step in (1, 2, 4, 8, 16, 32, 64):
                one_by_one.append(w)
        result = call(icl.gradient_descent_doubled, S, b, doublings=6)
        close(
            result,
            torch.stack(one_by_one),
            "gradient descent after 1, 2, 4, ..., 64 steps",
        )
        close(
            icl.gradient_descent_doubled(S, b, 0),
            w[None] * 0 + one_by_one[0],
            "after 1 step",
        )


@exercise(6)
def test_ex06_tokens_alternate(icl):
    for prompts, n, d, dtype in (
        (3, 4, 3, torch.double),
        (2, 3, 1, torch.float),
        (1, 0, 2, torch.float),
    ):
        xs, ys = (
            draws(prompts, n + 1, d).to(dtype),
            draws(prompts, n + 1).to(dtype),
        )
        tokens = call(icl.interleave, xs, ys)
        why = "(prompts, 2n+1, d), of xs's dtype: the last y is left out"
        check_form(tokens, (prompts, 2 * n + 1, d), why, dtype)
        for t in range(n + 1):
            assert torch.equal(tokens[:, 2 * t], xs[:, t]), (
                "x_1, x_2, ... stand at 0, 2, ..."
            )
            if t < n:
                assert torch.equal(tokens[:, 2 * t + 1, 0], ys[:, t]), "y_t follows x_t"
                assert not tokens[:, 2 * t + 1, 1:].any(), "after y come zeros"
        elsewhere = icl.interleave(xs.to("meta"), ys.to("meta"))
        assert elsewhere.is_meta, "new tensors must be made on the device of xs"


@exercise(7)
def test_ex07_similarity_is_a_mean_cosine(icl):
    """Errors of known angles in a plane, of all lengths: the cosine of angle a - angle b."""
    why = "mean over prompts of the cosine of prediction - y over t = 1..n; zero errors: 0"
    for steps_a, steps_b, prompts, n, dtype in (
        (3, 2, 4, 5, torch.double),
        (1, 4, 3, 2, torch.float),
    ):
        plane = orthonormal(prompts, n, 2)
        ys = 10 * draws(prompts, n + 1)
        angles, runs = [], []
        for steps in steps_a, steps_b:
            angle = 6 * torch.rand(steps, prompts).double()
            turned = torch.stack([angle.cos(), angle.sin()], dim=-1)
            errors = (plane @ turned[..., None])[..., 0]
            errors = errors * torch.rand(steps, prompts, 1).double().exp()
            before = draws(steps, prompts, 1)  # after no example: does not count
            angles.append(angle)
            runs.append(torch.cat([before, errors], dim=-1) + ys)
        expected = (angles[0][:, None] - angles[1]).cos()
        runs[1][:, -1] = ys[-1]  # on the last prompt the second learner makes no error
        expected[..., -1] = 0
        inputs = [z.to(dtype) for z in (*runs, ys)]
        close(
            call(icl.similarity_of_errors, *inputs),
            expected.mean(-1),
            why,
            1e-3,
        )


@exercise(8)
def test_ex08_the_shares_of_a_planted_learner_are_found(icl):
    prompts, d, edges = 400, 6, torch.tensor([0, 0.2, 0.7, 1.0]).double()
    share, parts = torch.rand(prompts, d).double(), draws(prompts, d)
    planted = torch.tensor([[0.1, 0.5, 0.9], [1.2, 0.0, -0.4]]).double()
    bin_of = (share > 0.2).long() + (share > 0.7).long()
    answers = (planted[:, bin_of] * parts).sum(-1)
    found = call(icl.share_found, answers, share, parts, edges)
    close(
        found,
        planted,
        "(steps, bins): each bin's share, of bins in rising order",
    )
    unrelated = draws(prompts)
    known = torch.stack([(parts * (bin_of == i)).sum(1) for i in range(3)], dim=1)
    noise = unrelated - known @ (torch.linalg.pinv(known) @ unrelated)
    found = icl.share_found(answers + noise, share, parts, edges)
    close(found, planted, "least squares: what no bin explains changes nothing")
    found = icl.share_found(
        answers, share, parts, torch.tensor([0, 0.2, 0.7, 1, 2]).double()
    )
    close(found[:, :3], planted, "an empty bin must not disturb the others")


@exercise(9)
def test_ex09_a_layer_is_a_step_of_newton(icl):
    for n, d, width in ((7, 3, 7), (3, 5, 11), (3, 1, 3)):
        (one, two), (up, down) = icl.newton_layer(d)
        shapes = [(d, width), (d, width), (width, width)] * 2 + [
            (2 * d, width),
            (width, 2 * d),
        ]
        for matrix, shape in zip([*one, *two, up, down], shapes, strict=True):
            check_form(matrix, shape, "two heads (Q, K, V), then mlp = (up, down)")
        X, M, y = draws(n + 1, d), draws(d, d), draws(n + 1, 1)
        h = torch.hstack([X @ M.mT, X, y])
        is_example = torch.arange(n + 1) < n  # the last token is a query
        added = icl.relu_attention(h, [one, two], is_example.double()) - h
        mlp = (h @ up.mT).relu() @ down.mT
        only_top = not added[:, d:].any() and not mlp[:, d:].any()
        assert only_top, "write into the top block only"
        inner = X[:n].mT @ (X[:n] @ M)
        close(
            -2 * added[:, :d],
            X @ (M @ inner).mT,
            "attention: V's sign and factor; the second "
            "head's -Q *and* -V; scores are <x_j, M x_t>",
        )
        close(
            mlp[:, :d],
            h[:, :d],
            "the MLP must double the top block, negative entries too",
        )


THEORY = (  # n, the eigenvalues of Sigma, and those of A
    (3, [1, 2], [0.4285714286, 0.2727272727]),
    (11, [0.25, 1, 2, 4], [1.073170732, 0.5714285714, 0.352, 0.1990950226]),
    (2, [0.5], [1]),
)


@exercise(10)
def test_ex10_the_preconditioner_of_least_error(icl):
    why = "E S^2 is not (E S)^2: it has Sigma's trace, and n + 1 beside n"
    for n, eigenvalues, expected in THEORY:
        d = len(eigenvalues)
        U = orthonormal(d, d)
        Sigma = (U * torch.tensor(eigenvalues)) @ U.mT
        for dtype in torch.float32, torch.float64:
            A = call(icl.optimal_preconditioner, Sigma.to(dtype), n=n)
            check_form(A, (d, d), "one matrix A (d, d)", None)
            inside = U.mT @ A.double() @ U
            found = inside.diagonal()
            close(inside, found.diag(), "A must have Sigma's eigenvectors", 1e-4)
            close(found, torch.tensor(expected), why, 1e-4)


def students_tests(solved):
    """The tests as a student gets them: the text of this file up to this function.

    From here on the file is for lecturers, and for the rest of the program."""
    _, here = inspect.getsourcelines(students_tests)
    text = Path(__file__).read_text("utf-8").split("\n")[: here - 1]
    return "\n".join(text).rstrip().replace("SOLVED = []", f"SOLVED = {solved}") + "\n"


import argparse
import ast
import inspect
import subprocess
import sys

PROGRAM = Path(__file__).resolve().with_name("icl_newton.py")

SHEETS = """# Three sheets: how Transformers solve regressions

Install: `python3 -m venv .venv && .venv/bin/pip install numpy torch==2.13.0 matplotlib pytest`.
Edit `icl_newton.py` only: ten functions are emptied, and their docstrings say what they promise,
also on the edges (S = 0, d = 1, t < d, no steps). `.venv/bin/python -m pytest -k test_ex` grades
them; `-k ex04` grades one. Hand in `icl_newton.py`, and `answers.txt` with your predictions and
paragraphs. Predictions are not graded, but write them *before* you read on.

## 1. Two clocks (50 points, and 5 for the paragraph; about 3 hours)

1. Read section 1 (10 minutes). Exercise 1, `sample_prompts`: 10 points, 30 minutes.
2. Read section 2 (15 minutes). Exercise 2, `gradient_descent`: 10 points, 20 minutes.
3. Predict: lambda_max is 1, and another eigenvalue is 1/100. After how many steps has gradient
   descent found half of its direction?
   > 69 steps, as .99^69 = .50.
4. Read section 3 (30 minutes). Exercises 3 and 4, `newton_start` and `newton`: 5 and 15 points,
   15 and 30 minutes. Exercise 5, `gradient_descent_doubled`: 10 points, 15 minutes.
5. A paragraph: can gradient descent, with any fixed step size, walk the path of Newton from
   alpha S? If not: on which other matrix would it?
   > No: 1 - alpha lambda^2 is not 1 - eta lambda. On S^2 it would, with b replaced by S b (eta = alpha):
   > gradient descent on |S w - b|^2. 3 points for the reason, 2 for the matrix.

## 2. What does a layer know? (25 points, and 5 for the paragraph; about 2 hours)

1. Read section 4 (20 minutes). Exercise 6, `interleave`: 5 points, 15 minutes.
2. Read sections 5 and 6 (20 minutes).
3. Predict: a layer's errors have similarity .97 to those of Newton's step 12. Is the layer step 12
   of Newton? Who else could have that score?
   > No. At t < d most of an error nobody can avoid, so all decent learners are alike: conjugate
   > gradient, gradient descent after 64 steps, even Newton plus another prompt's deviations.
4. Read section 7 (20 minutes). Exercise 7, `similarity_of_errors`: 10 points, 20 minutes.
5. Read sections 8 and 9 (30 minutes). Exercise 8, `share_found`: 10 points, 30 minutes.
6. A paragraph: run `python icl_newton.py --preset quick`. Here d = 5. Does the first claim of
   `rates` tell Newton from conjugate gradient? Would it at d = 20, and why?
   > Not safely: at d = 5 a step of conjugate gradient is worth about 3 of Newton's, as is a layer
   > (2.5 to 4.5 in our runs), so the claim may hold or fail. At d = 20 it is worth 1. 3 points for
   > the comparison, 2 for the reason: conjugate gradient is exact after d steps.

## 3. Weights by hand, weights by theory (25 points, and 5 for the paragraph; about 2.5 hours)

1. Read section 10 (20 minutes).
2. Predict: a layer of a network holds [M x ; x ; y]. If a causal mask lets token j see tokens 1
   to j only, what would a layer of section 14 add in the place of M S M x?
   > The sum runs over earlier tokens, and each of them holds its own M: no M S M of one M and one S.
3. Read section 14 (25 minutes). Exercise 9, `newton_layer`: 10 points, 45 minutes.
4. Read section 15 (25 minutes). Exercise 10, `optimal_preconditioner`: 15 points, 45 minutes.
5. A paragraph: derive the A of exercise 10. Given: E x x^T B x x^T = 2 Sigma B Sigma + trace(Sigma B)
   Sigma for symmetric B.
   > The error E (w*.x_q - x_q^T A^T S w* / n)^2 is quadratic in A; its derivative is 0 where
   > A E[S^2]/n = E[S], and E S^2 = n (n+1) Sigma^2 + n trace(Sigma) Sigma. 2 points for the error, 2 for
   > E S^2, 1 for the result.
"""

LECTURERS = """# For lecturers

Sheets with expected answers (lines with >) and solutions. Points: 50 + 25 + 25 for exercises, 5 for
each paragraph, 115 in all. `--solved 1-5` makes a folder in which these are solved, for those who
start with a later sheet. To grade a pile of hand-ins with the untouched tests:

    for folder in hand-ins/*/; do
        cp week1/test_icl_newton.py "$folder"; echo "$folder"
        (cd "$folder" && timeout -s INT 120 python -m pytest -q -k test_ex | grep -E "^  ex|points|Error")
    done

A line says what is wrong first. "stopped" ran when the time was over, "not run" came after it.
"""


def stub(name):
    """The source of a function, and the same with nothing behind its docstring."""
    source = inspect.getsource(getattr(icl_newton, name))
    docstring = ast.parse(source).body[0].body[0]
    kept = source.split("\n")[: docstring.end_lineno]
    number = [name for name, _ in EXERCISES.values()].index(name) + 1
    kept.append(f'    raise NotImplementedError("exercise {number}: {name}")\n')
    return source, "\n".join(kept)


def write_homework(folder, solved):
    """The student's folder, and FOLDER-LECTURERS.md beside it. ValueError if it cannot be."""
    folder = Path(folder).resolve()
    lecturers = folder.with_name(f"{folder.name}-LECTURERS.md")
    if folder.is_relative_to(PROGRAM.parent):
        raise ValueError(
            f"{folder} is inside the checkout: choose a folder beside it, ../week1"
        )
    if (
        lecturers.exists()
        or folder.exists()
        and (folder.is_file() or any(folder.iterdir()))
    ):
        raise ValueError(f"{folder}, or its LECTURERS.md, is there already")
    cells = PROGRAM.read_text("utf-8").split("\n# %% ")
    program = "\n# %% ".join(cell for cell in cells if not cell.startswith("What "))
    solutions = []
    for number, (name, _) in EXERCISES.items():
        source, empty = stub(name)
        solutions.append(source)
        if number not in solved:
            program = program.replace(source, empty)
    sheets = "\n".join(
        line for line in SHEETS.split("\n") if not line.startswith("   >")
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("icl_newton.py", program),
        ("test_icl_newton.py", students_tests(solved)),
        ("SHEETS.md", sheets),
    ):
        (folder / name).write_text(text, "utf-8")
    code = "\n\n".join(["```python", *solutions, "```\n"])
    lecturers.write_text(f"{LECTURERS}\n{SHEETS}\n{code}", "utf-8")


def numbers(text):
    """1-4,7 -> [1, 2, 3, 4, 7]."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    if not found or not set(found) <= set(EXERCISES):
        raise ValueError
    return found


def make_homework():
    """The command line of this file."""
    parser = argparse.ArgumentParser("test_icl_newton.py")
    parser.add_argument("folder", help="a new folder outside the checkout, as ../week1")
    parser.add_argument(
        "--solved", type=numbers, default=[], help="exercises to solve: 1-4,7"
    )
    given = parser.parse_args()
    try:
        write_homework(given.folder, given.solved)
    except (ValueError, OSError) as error:
        print(f"test_icl_newton.py: {error}", file=sys.stderr)
        sys.exit(2)


# Everything else. `lib` is the program; whatever is planted in it is there for one test.

import json
import math
import multiprocessing

import numpy as np
from matplotlib.colors import to_hex

lib = icl_newton


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test is in an empty folder, and has the same random numbers in every run."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def near(actual, expected, tolerance=1e-9):
    """Tensors, arrays or lists have one shape, and one size up to the tolerance."""
    tensors = []
    for z in actual, expected:
        z = z.detach() if isinstance(z, torch.Tensor) else np.array(z, dtype=float)
        tensors.append(torch.as_tensor(z).double())
    close(*tensors, "not as expected", tolerance)


def tiny(**changes):
    """A Config that trains in a moment, in which no two numbers are alike."""
    sizes = dict(d=6, n=11, layers=5, width=12, heads=3, steps=14, tuning=7, batch=8)
    return lib.Config(**sizes | dict(curriculum=3, prompts=64, seed=4) | changes)


def some_prompts(prompts=60, n=11, d=6):
    """xs and ys in float64, with another variance in each direction."""
    xs = draws(prompts, n + 1, d) * 0.8 ** torch.arange(d)
    return xs, (xs @ draws(prompts, d, 1))[..., 0]


def moments_after(xs, ys, t):
    """S and b after t examples."""
    X, y = xs[:, :t].double(), ys[:, :t].double()
    return X.mT @ X, (X.mT @ y[..., None])[..., 0]


# Prompts and methods


def test_prompts_of_each_seed_and_purpose_differ():
    first = set()
    for seed in 3, 4:
        for purpose in lib.PURPOSES:
            xs, ys = lib.fresh_prompts(tiny(seed=seed), 2, purpose)
            assert (xs.shape, ys.shape) == ((2, 12, 6), (2, 12))
            first.add(xs[0, 0, 0].item())
    assert len(first) == 2 * len(lib.PURPOSES)


def test_weights_are_drawn_from_numbers_of_their_own():
    xs, _ = lib.fresh_prompts(tiny(), 2, "weights")
    near(lib.Transformer(tiny()).read_in[0, 0], xs[0, 0, 0] / 6**0.5, 1e-6)


def fresh(config):
    return lib.fresh_prompts(config, 400, "probes")


def of_training(config):
    return lib.training_prompts(config, 0, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prompts", [fresh, of_training])
def test_prompts_follow_the_settings(prompts):
    law = dict(kappa=1e4, noise=30.0)
    xs, ys = prompts(tiny(**law, curriculum=0, batch=400))
    spread = torch.linalg.svdvals(xs.double())
    assert (spread[:, 2] > 10 * spread[:, 3]).all()  # d // 2 directions are large
    near(ys.std(), math.sqrt(6 + 900), 0.1)


def test_least_squares_is_the_shortest_solution():
    for t in 3, 9:
        X, y = (
            np.random.default_rng(t).normal(size=(t, 5)),
            np.arange(1.0, t + 1),
        )
        w = lib.least_squares(torch.tensor(X.T @ X), torch.tensor(X.T @ y))
        near(w, np.linalg.lstsq(X, y, rcond=None)[0], 1e-8)
    small = torch.tensor([1, 1e-8]).double()  # no rounding error yet
    near(lib.least_squares(small.diag(), small), [1, 1], 1e-6)


def test_largest_eigenvalue_of_each_matrix():
    S = torch.diag_embed(torch.tensor([[2.0, 5, -7], [0, 0, 0]]).double())
    largest, of_zeros = lib.largest_eigenvalue(S)
    near(largest, 5)
    assert 0 < of_zeros < 1e-9


def test_conjugate_gradient_is_best_in_the_span_of_powers():
    xs, ys = some_prompts(prompts=4, n=7, d=3)
    S, b = lib.prefix_moments(xs, ys, ridge=0.7)
    run = lib.conjugate_gradient(S, b, 5)
    near(run[0], 0 * b)
    for k, p, t in np.ndindex(3, 4, 8):
        matrix, vector = S[p, t].numpy(), b[p, t].numpy()
        powers = [np.linalg.matrix_power(matrix, j) @ vector for j in range(k + 1)]
        span, _ = np.linalg.qr(np.array(powers).T)
        best = span @ np.linalg.solve(span.T @ matrix @ span, span.T @ vector)
        near(run[k + 1, p, t], best if t else 0 * vector, 1e-6)
    S = torch.tensor([1, 1.001]).double()
    near(lib.conjugate_gradient(S.diag(), S * 0 + 1, 2)[2], 1 / S)
    S, b = lib.prefix_moments(xs, ys)
    run = lib.conjugate_gradient(S, b, 5)
    near(run[3], lib.least_squares(S, b), 1e-6)
    near(run[5], run[3], 1e-6)


def test_paths_are_where_the_formulas_say():
    panels, (same,) = lib.paths()
    for panel, exponent, clock, learner in (
        (0, 1, 2, "gradient descent"),
        (0, 1, 2, "Newton from I/lambda_max"),
        (1, 2, 4, "Newton from alpha S"),
    ):
        assert ("gradient", "alpha")[panel] in panels[panel].title
        for name in learner, "its path":
            curves = panels[panel].curves[name]
            assert len(curves) == 10
            for k, (x, y) in enumerate(curves):
                near([x[0], x[-1]], [0.001, 1], 1e-6)
                near(
                    y,
                    -torch.expm1(clock**k * torch.log1p(-(x**exponent))),
                    1e-6,
                )
    assert same.relation == "<" and same.bar == 1e-12
    assert 0 < same.measured[0] < 1e-13


# Corrections to the paper


def test_correction_1_the_printed_alpha_stalls():
    S, b, *_ = planted_moments(60, d=3)
    edge = 2 / torch.linalg.matrix_norm(S @ S, 2)[:, None, None]
    for start, arrives in (edge * S, False), (None, True):
        miss = lib.newton(S, b, 40, start)[-1] - torch.linalg.solve(S, b)
        assert (miss.abs().median() < 1e-4) == arrives


def test_correction_2_two_heads_of_one_value_make_an_absolute_value():
    one, h = torch.ones(1, 1).double(), torch.tensor([[2.0], [-3.0]]).double()
    printed = [(one, one, one), (-one, one, one)]
    added = lib.relu_attention(h, printed, one) - h
    near(added[:, 0], [-10, -15])  # the sums of |s| h, where s is 4, -6 and -6, 9
    added = lib.relu_attention(h, lib.linear_heads(one, one, one), one) - h
    near(added[:, 0], [26, -39])  # of s h


def test_correction_3_the_printed_order_lets_rounding_grow(monkeypatch):
    xs, ys = some_prompts(prompts=16, n=10, d=3)

    def miss():
        return (lib.newton_by_hand(xs, ys, 60, 0.01)[-1] - ys[:, -1]).abs().max()

    assert miss() < 1e-9
    heads, mlp = lib.newton_layer(3)
    printed = [(K, Q, V) for Q, K, V in heads], mlp
    monkeypatch.setattr(lib, "newton_layer", lambda d: printed)
    assert miss() > 1e-7


def test_correction_4_gradient_descent_off_the_span_never_arrives():
    xs, ys = some_prompts(prompts=300, n=20, d=9)
    goal = lib.method_as_learner(lambda S, b: lib.least_squares(S, b)[None])(xs, ys)
    descent = lib.method_as_learner(lambda S, b: lib.gradient_descent_doubled(S, b, 30))
    start = (xs @ torch.rand(300, 9, 1).double())[..., 0]  # what w_0 answers
    for shift, arrives in (0 * ys, True), (start, False):
        answers = descent(xs, ys - shift)[-1:] + shift
        assert (lib.similarity_of_errors(answers, goal, ys) > 0.98) == arrives


# The network and its training


def slow_norm(z):
    z = z - z.mean(-1, keepdim=True)
    return z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def slow_attention(h, weights, heads):
    """Causal attention head by head and token by token."""
    size, out = h.shape[-1] // heads, []
    for head in range(heads):
        q, k, v = (h @ z[head * size :][:size].T for z in weights[:3])
        scores = slow_norm(q) @ slow_norm(k).mT / size**0.5
        mixed = [
            scores[:, i, : i + 1].softmax(-1)[:, None] @ v[:, : i + 1]
            for i in range(h.shape[1])
        ]
        out.append(torch.cat(mixed, 1))
    return torch.cat(out, -1) @ weights[3].T


def test_the_transformer_head_by_head():
    model = lib.Transformer(tiny()).double().requires_grad_(False)
    model.read_out.normal_()
    xs, ys = some_prompts(prompts=5, n=9)
    h = lib.interleave(xs, ys) @ model.read_in.T + model.positions[:19]
    states = [slow_norm(h[:, ::2])]
    for attention, (up, down) in zip(model.attention, model.mlp):
        h = h + slow_attention(slow_norm(h), attention, heads=3)
        inner = slow_norm(h) @ up.T
        h = h + (inner * inner.sigmoid()) @ down
        states.append(slow_norm(h[:, ::2]))
    answers = states[-1] @ model.read_out
    near(model.states(xs, ys), F.pad(torch.stack(states), (0, 1), value=1.0))
    near(model(xs, ys), answers)
    near(model(xs[:, :4], ys[:, :4]), answers[:, :4])  # no token sees what comes later


def test_first_weights_have_the_sizes_of_the_recipe():
    config = tiny(d=8, n=40, width=64, heads=2, curriculum=0)
    model = lib.Transformer(config).requires_grad_(False)
    stacks = [*model.attention.unbind(1), *model.mlp.unbind(1)]
    for weights, size in zip(stacks, [1, 1, 1, 0.5, 1, 0.5]):
        near(weights.std(), size / 192**0.5, 0.1)
    near(model.read_in.std(), 8**-0.5, 0.1)
    angles = np.arange(81)[:, None] * np.logspace(0, -2, 32)
    near(model.positions, 0.3 * np.hstack([np.sin(angles), np.cos(angles)]), 1e-4)
    assert not model.read_out.any()


def test_the_curriculum_adds_a_dimension_at_a_time():
    sizes = []
    for step in 0, 2, 3, 11, 12, 30:
        generator = torch.Generator().manual_seed(1)
        xs, ys = lib.training_prompts(tiny(n=12), step, generator)
        assert xs.shape[::2] == (8, 6) and ys.shape == xs.shape[:2]
        sizes.append((xs.any(0).any(0).sum().item(), xs.shape[1] - 1))
    assert sizes == [(2, 6), (2, 6), (3, 8), (5, 12), (6, 12), (6, 12)]


def test_the_loss_is_a_mean_over_t_of_roots_of_means():
    """Of errors 1, 4 after no example, and 9, 0 after one: the gradient, by small steps."""
    model = torch.nn.Module()
    model.read_in = torch.nn.Parameter(torch.tensor([1.0, 4, 9, 0]).double())
    model.forward = lambda xs, ys: model.read_in.view(2, 2).T
    errors, (gradient,) = lib.errors_and_gradients(model, None, torch.zeros(2, 2))
    near(errors, [[1, 9], [4, 0]])

    def loss(w):
        after_none, after_one = (w[0] ** 1.5 + w[1] ** 1.5) / 2, w[2] ** 1.5 / 2
        return (after_none**0.5 + after_one**0.5) / 2

    for i in range(3):
        w = np.array([1.0, 4, 9])
        w[i] += 1e-6
        near(gradient[i], (loss(w) - loss([1, 4, 9])) / 1e-6, 1e-4)
    assert gradient[3].isfinite() and not errors.requires_grad


def test_a_step_averages_four_quarters_on_schedule(monkeypatch):
    """A network of one number. The gradient of a quarter is its sum of 2^prompt: 255 in all."""
    model, config = (
        torch.nn.Linear(1, 1, bias=False),
        tiny(steps=300, curriculum=0),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    prompts = torch.zeros(8, 3, 6), torch.arange(8.0)[:, None].expand(-1, 3)

    def of_a_part(model, xs, ys):
        return ys, [(2.0 ** ys[:, 0]).sum().view(1, 1)]

    monkeypatch.setattr(lib, "errors_and_gradients", of_a_part)
    monkeypatch.setattr(
        lib, "training_prompts", lambda config, step, generator: prompts
    )
    for step, factor in (
        (7, 0.08),
        (98, 0.99),
        (99, 1),
        (120, 1),
        (150, 1),
        (225, 0.5),
        (299, 2 / 300),
    ):
        before = model.weight.item()
        errors = next(lib.training(config, model, [optimizer], None, step))
        near(before - model.weight.item(), 0.5 * factor * 255 / 4, 1e-4)
        near(errors, prompts[1])


def test_every_parameter_is_in_one_optimizer_and_moves():
    model, config = lib.Transformer(tiny()), tiny()
    adam, muon = optimizers = lib.make_optimizers(model, config)
    held = [id(p) for z in optimizers for p in z.param_groups[0]["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert set(held[-2:]) == {id(model.attention), id(model.mlp)}
    before = [parameter.detach().clone() for parameter in model.parameters()]
    steps = lib.training(config, model, optimizers, torch.Generator().manual_seed(1))
    next(steps), next(steps)
    after = [parameter.detach() for parameter in model.parameters()]
    read_in, positions, *others = (a - b for a, b in zip(after, before))
    for moved in (
        read_in[:, :2],
        positions[:13],
        *others,
    ):  # 2 dimensions, 6 examples
        assert (moved != 0).double().mean() > 0.99


def test_optimizers_have_the_numbers_of_the_recipe():
    for kappa, muon_lr in (1, 0.018), (9, 0.009):
        adam, muon = lib.make_optimizers(lib.Transformer(tiny()), tiny(kappa=kappa))
        assert (adam.defaults["lr"], adam.defaults["betas"]) == (
            0.005,
            (0.9, 0.99),
        )
        assert (muon.defaults["lr"], muon.defaults["momentum"]) == (
            muon_lr,
            0.9,
        )


def test_muon_steps_along_orthogonal_matrices():
    p, average = torch.nn.Parameter(draws(7, 5, 3)), 0
    optimizer, slow = (
        lib.Muon([p], dict(lr=0.1, momentum=0.8)),
        p.detach().clone(),
    )
    for _ in range(2):
        p.grad = draws(7, 5, 3)
        average = 0.8 * average + 0.2 * p.grad
        ahead = 0.2 * p.grad + 0.8 * average
        U, s, V = torch.linalg.svd(ahead, full_matrices=False)
        s = s / s.norm(dim=1, keepdim=True)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        slow -= 0.1 * 0.2 * 5**0.5 * U * s[:, None] @ V
        optimizer.step()
        near(p, slow)


def test_no_tensor_is_made_on_another_device():
    model = lib.Transformer(tiny()).to("meta")
    xs, ys = (z.float() for z in some_prompts(prompts=8))
    errors, gradients = lib.errors_and_gradients(model, xs, ys)
    assert errors.is_meta and all(gradient.is_meta for gradient in gradients)


# Learners


class Powers:
    """A network of two layers, whose states are x^k, x^3 and 1, for x the first coordinate."""

    def states(self, xs, ys):
        x = xs[..., 0]
        layers = [torch.stack([x**k, x**3, x**0], dim=-1) for k in (1, 2)]
        return torch.stack(layers)


def test_layers_are_read_by_lines_that_are_fitted_elsewhere():
    xs, ys = some_prompts(prompts=70)
    new_xs, new_ys = some_prompts(prompts=3)
    answers = lib.layers_as_learner(Powers(), xs, ys + 5)(new_xs, new_ys)
    tables = Powers().states(xs, ys).flatten(1, 2)
    new_states = Powers().states(new_xs, new_ys)
    for layer in 0, 1:
        line = torch.linalg.pinv(tables[layer]) @ (ys + 5).flatten()
        near(answers[layer], new_states[layer] @ line, 1e-6)


def test_a_method_answers_each_query_from_the_examples_before():
    """Each column of S, and b, is a w. In float64, from prompts in float32."""
    xs, ys = (z.float() for z in some_prompts(prompts=3, n=4, d=2))
    learner = lib.method_as_learner(
        lambda S, b: torch.stack([b, S[..., 0], S[..., 1]]), ridge=0.5
    )
    answers = learner(xs, ys)
    for t in range(5):
        S, b = moments_after(xs, ys, t)
        weights = torch.stack([b, *(S + 0.5 * torch.eye(2).double()).unbind(2)])
        near(answers[..., t], (weights * xs[:, t]).sum(-1), 1e-12)


def test_parts_are_small_and_joined_in_order():
    xs, ys = torch.arange(130.0), torch.arange(130.0) * 10

    def function(xs, ys):
        assert len(xs) <= 64
        return torch.stack([xs, ys])

    near(lib.in_parts(function, xs, ys), torch.stack([xs, ys]))


# Planted learners, of whom it is known what they are

D, N, LAYERS = 8, 17, 6


def of_shares(found):
    """The method that after l steps has found the share found(l, lambda/lambda_max) of w*."""

    def method(S, b):
        eigenvalues, U = torch.linalg.eigh(S)
        top = eigenvalues[..., -1:].clamp_min(1e-30)
        share = (eigenvalues / top).clamp_min(1e-12)
        of_inverse = [found(step, share) / share / top for step in range(LAYERS + 1)]
        return lib.times(U, torch.stack(of_inverse) * lib.times(U.mT, b))

    return method


def gd_plus_plus(step, share):
    """x <- (3 x - S x) / 2 in each layer, and a step of 1.2 on the S that is left."""
    left, missing = torch.ones_like(share), torch.ones_like(share)
    for _ in range(step):
        missing = missing * (1 - 1.2 * left**2 * share)
        left = left * (3 - left**2 * share) / 2
    return 1 - missing


def newton_twice(S, b):
    return lib.newton(S, b, 2 * LAYERS)[::2]


PLANTED = {  # learner: its method, and which claims it passes
    "Newton, two steps a layer": (newton_twice, "faster doubling fixed"),
    "Newton from I": (
        lambda S, b: lib.gradient_descent_doubled(S, b, LAYERS),
        "faster doubling fixed path",
    ),
    "gradient descent": (lambda S, b: lib.gradient_descent(S, b, LAYERS), "path"),
    "conjugate gradient": (  # at d = 8 its steps double those of descent, too
        lambda S, b: lib.conjugate_gradient(S, b, LAYERS),
        "doubling fixed path",
    ),
    "ridge": (
        of_shares(lambda step, share: share / (share + 2.4**-step)),
        "faster doubling fixed path",
    ),
    "principal components": (
        of_shares(lambda step, share: (share > 2.0**-step).double()),
        "faster doubling",
    ),
    "GD++": (of_shares(gd_plus_plus), "faster doubling fixed path"),
    "zeros": (lambda S, b: b.expand(7, *b.shape) * 0, ""),
    "noise": (lambda S, b: draws(7, *b.shape), ""),
}
MATCHES = {  # learner: its best matches among the steps of Newton, of gradient descent
    "Newton, two steps a layer": ("2 4 6 8 10 12", None),
    "Newton from I": (None, "1 2 3 4 5 6"),
    "gradient descent": (None, "0 1 2 2 2 3"),
    "zeros": ("0 0 0 0 0 0", "0 0 0 0 0 0"),
}
WORDS = {  # of each claim
    "more steps": "faster",
    "doubles": "doubling",
    "fixed sizes": "fixed",
    "noise of the network": "noise",
    "near the path": "path",
}


@pytest.fixture
def plant(monkeypatch):
    """Makes a Study in which a learner, prompts -> trajectory, is in the network's place."""
    real = lib.fresh_prompts

    def fewer(config, count, purpose):
        return real(config, min(count, 2000), purpose)

    def planted(learner, **changes):
        sizes = dict(d=D, n=N, layers=LAYERS, prompts=150, curriculum=0)
        return lib.Study(tiny(**sizes | changes), learner)

    monkeypatch.setattr(lib, "fresh_prompts", fewer)
    monkeypatch.setattr(lib, "layers_as_learner", lambda network, xs, ys: network)
    return planted


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_learner_passes_what_it_should(name, plant):
    method, passes = PLANTED[name]
    study, held = plant(lib.method_as_learner(method)), set()
    for experiment in lib.rates, lib.convergence, lib.filters:
        _, claims = experiment([study])
        for claim in claims:
            (word,) = [z for text, z in WORDS.items() if text in claim.sentence]
            held |= {word} if lib.in_words(claim)[2] == "1 of 1" else set()
    assert held == set(passes.split())


@pytest.mark.parametrize("name", MATCHES)
def test_a_planted_learner_is_matched_to_what_it_is(name, plant):
    panels, _ = lib.rates([plant(lib.method_as_learner(PLANTED[name][0]))])
    for panel, expected in zip(panels, MATCHES[name]):
        found = in_text(panel.curves["Transformer"][0])
        assert found == (expected or found)


# The rulers


def in_text(numbers):
    """[1, 2, 3] -> "1 2 3"."""
    return " ".join(map(str, numbers))


def slopes(curves):
    """From layer 3 on."""
    return [np.polyfit(range(len(z) - 2), z[2:], 1)[0] for z in curves]


def test_rates_of_two_seeds_side_by_side(plant):
    """The first is Newton's step 2 l in layer l, the second is gradient descent."""
    methods = newton_twice, lambda S, b: lib.gradient_descent(S, b, LAYERS)
    studies = [plant(lib.method_as_learner(z)) for z in methods]
    (left, right), (faster, doubling) = lib.rates(studies)
    first, second = left.curves["Transformer"]
    assert in_text(first) == "2 4 6 8 10 12" and second[-1] < 8
    first, second = right.curves["Transformer"]
    assert in_text(second) == "0 1 2 2 2 3" and first[-1] > 5
    near(faster.measured, slopes(left.curves["Transformer"]))
    near(faster.bar, slopes(left.curves["conjugate gradient"]))
    near(doubling.measured, slopes(right.curves["Transformer"]))
    assert (faster.relation, doubling.relation, doubling.bar) == (">", ">", 0.9)
    assert "Newton" in left.title and "descent" in right.title


def test_rates_show_fus_own_layers(plant):
    (left, right), _ = lib.rates([plant(lib.method_as_learner(newton_twice))])
    (newton_steps,) = left.curves["Fu's Transformer"]
    (doublings,) = right.curves["Fu's Transformer"]
    (line,) = right.curves["twice the steps in each layer"]
    assert in_text(newton_steps) == "1 1 2 5 8 10 14 16 20 20 21 21"
    assert in_text(doublings) == "0 0 2 3 5 6 8 9 10 12 12 12"
    assert in_text(line) == "-1 0 1 2 3 4"


def test_conjugate_gradient_is_compared_before_it_is_exact(plant):
    study = plant(lib.method_as_learner(newton_twice), d=5)
    (left, _), (faster, _) = lib.rates([study])
    assert len(left.curves["conjugate gradient"][0]) == 4 and 2 < faster.bar[0] < 4


def test_a_study_compares_on_its_own_prompts_with_the_best_ridge(plant):
    seen = []

    def learner(xs, ys):
        seen.append(xs)
        return ys[None]

    study = plant(learner, noise=0.3)
    assert torch.equal(torch.cat(seen), study.xs) and len(study.xs) == 150
    S, b = moments_after(study.xs, study.ys, 12)
    w = torch.linalg.solve(S + 0.09 * torch.eye(D).double(), b)  # noise^2
    answers = study.runs["least squares"][0, :, 12]
    near(answers, (w * study.xs[:, 12]).sum(1), 1e-6)


def test_readouts_are_fitted_on_prompts_of_their_own(monkeypatch):
    seen = {}

    def fit(network, xs, ys):
        seen["readouts"] = xs
        return lambda xs, ys: ys[None]

    monkeypatch.setattr(lib, "layers_as_learner", fit)
    study = lib.Study(tiny(), None)
    expected, _ = lib.fresh_prompts(tiny(), 256, "readouts")
    assert torch.equal(seen["readouts"], expected)
    assert not torch.equal(expected[:64], study.xs)


def test_error_curves_count_the_steps(plant):
    study = plant(lib.method_as_learner(newton_twice))
    for learner, counts in (
        ("Newton", range(33)),
        ("gradient descent", 2 ** np.arange(17)),
    ):
        steps, errors = study.error_curve(learner, 9)
        assert list(steps) == list(counts)
        miss = study.runs[learner][:, :, 9] - study.ys[:, 9]
        near(errors, [(z @ z) / 150 / D for z in miss])
    study.runs["Transformer"] = study.runs["Transformer"].flip(0)
    miss = study.runs["Transformer"][LAYERS, :, 9] - study.ys[:, 9]
    near(study.last_error(9), miss @ miss / 150 / D)


def test_similarity_beside_shuffled_deviations(plant):
    study = plant(lib.method_as_learner(newton_twice))
    layers, newton = study.runs["Transformer"], study.runs["Newton"]
    layers += 0.1 * draws(7, 150, N + 1)
    (left, right), claims = lib.similarity([study])
    for layer in range(1, 7):
        steps, scores = left.curves[f"layer {layer}"][0]
        assert list(steps) == list(range(33)) and scores.argmax() == 2 * layer
        near(1 - right.curves["Newton"][0][layer - 1], scores.max(), 1e-6)
        best = newton[2 * layer]
        deviations = layers[layer] - best
        of_others = torch.cat([deviations[-1:], deviations[:-1]])
        errors = (best + of_others - study.ys)[:, 1:], (best - study.ys)[:, 1:]
        control = 1 - F.cosine_similarity(*errors).mean()
        near(right.curves["shuffled deviations"][0][layer - 1], control, 1e-5)
    descent = study.similarity("Transformer", "gradient descent")[-1].max()
    assert f"{descent:.3f} to descent" in right.title and not claims


def test_known_paths_have_their_exponents():
    share, parts = torch.rand(800, 8).double() ** 3, draws(800, 8)
    for p, N in (1, 3.0), (1, 100.0), (2, 50.0), (0.5, 2.0):
        answers = ((1 - (1 - share**p) ** N) * parts).sum(-1)
        assert abs(lib.path_exponent(answers, share, parts) - p) < 0.11
    assert math.isnan(lib.path_exponent(draws(800), share, parts))


def test_filters_show_the_share_that_each_layer_has_found(plant):
    found = plant(lib.method_as_learner(of_shares(gd_plus_plus)), prompts=1500)
    other = plant(lib.method_as_learner(newton_twice), seed=9)
    panels, (claim,) = lib.filters([found, other])
    for panel in panels[:2]:
        assert "layer 2" not in panel.curves
        for layer in range(3, LAYERS + 1):
            x, y = panel.curves[f"layer {layer}"][0]
            near(y[6:], gd_plus_plus(layer, x)[6:], 0.1)
    exponents = [y for x, y in panels[2].curves["Transformer"]]
    assert [len(y) for y in exponents] == [4, 4]
    near(claim.measured, abs(np.mean(exponents, axis=1) - 1))
    assert claim.measured[0] < 0.3 and claim.measured[1] > 0.7
    assert (claim.relation, claim.bar) == ("<", 0.5)
    numbers, two = panels[2].curves["Newton from alpha S"][0]
    assert list(numbers) == [3, 4, 5, 6] and two == [2] * 4


def test_the_spectrum_rebuilds_S_and_the_answer():
    xs, ys = some_prompts(prompts=5)
    share, U, query, best = lib.spectrum(xs, ys, 7)
    S, _ = moments_after(xs, ys, 7)
    top = torch.linalg.matrix_norm(S, 2)[:, None, None]
    near(U @ torch.diag_embed(share) @ U.mT, S / top)
    near((query * best).sum(1), ys[:, 7], 1e-6)


# What the stream holds


def test_a_probe_is_judged_on_prompts_that_it_did_not_see():
    x_q, hidden, noise = draws(400, 5), draws(400, 5), draws(400, 90)
    holds_it = torch.cat([hidden @ draws(5, 80), noise[:, :10]], 1)
    targets = torch.stack([hidden, hidden + 7 * x_q, draws(400, 5)])
    found = lib.probe(torch.stack([noise, holds_it]), targets, x_q)
    near(found[1, :2], [1, 1], 1e-2)
    assert (found[0] < 0.1).all() and found[1, 2] < 0.1
    only_query = lib.probe(x_q[None], targets[1:2], x_q)
    assert abs(only_query) < 0.2  # a multiple of x_q does not count


class HandWritten:
    """Theorem 5.1: after layer k, the query's token is [M_k x_q ; x_q ; y_q]."""

    def states(self, xs, ys):
        h = torch.cat([xs / 60, xs, ys[..., None]], -1).double()
        is_example = torch.ones(xs.shape[1]).double()
        is_example[-1] = 0
        heads, (up, down) = lib.newton_layer(xs.shape[-1])
        stream = [h]
        for _ in range(LAYERS):
            h = lib.relu_attention(h, heads, is_example)
            h = h + (h @ up.mT).relu() @ down.mT
            stream.append(h)
        return torch.stack(stream)


class YAlone:
    """Ahn: linear attention that rewrites y alone: the query's token is [x_q ; - answer]."""

    def states(self, xs, ys):
        xs, ys = xs.double(), F.pad(ys[:, :-1].double(), (0, 1))
        stream = []
        for _ in range(LAYERS + 1):
            stream.append(torch.cat([xs, ys[..., None]], -1))
            ys = ys - lib.times(xs @ xs[:, :-1].mT, ys[:, :-1]) / 20
        return torch.stack(stream)


class HoldsRule:
    """Gradient descent, had it a w in its stream: the query's token is [w* ; x_q]."""

    def states(self, xs, ys):
        w = lib.times(torch.linalg.pinv(xs[:, :-1].double()), ys[:, :-1].double())
        w = w[:, None].expand(-1, xs.shape[1], -1)
        return torch.cat([w, xs.double()], -1).expand(LAYERS + 1, -1, -1, -1)


def test_probes_find_what_planted_networks_hold():
    xs, ys = lib.fresh_prompts(tiny(d=D, curriculum=0), 2000, "probes")
    targets, _ = lib.probe_targets(xs, ys, D)
    networks = HandWritten(), YAlone(), HoldsRule()
    written, y_alone, rule = (lib.explained(z, xs, ys, D, targets) for z in networks)
    share, k = written["M_k x_q"].max(1)
    assert (share[1:] > 0.8).all() and (k.diff() >= 0).all() and k[-1] > k[0]
    for found in written, y_alone:
        assert found["w*"].max() < 0.1 and found["b"].max() < 0.1
    assert y_alone["M_k x_q"].max() < 0.1 and rule["M_k x_q"].max() < 0.1
    assert rule["w*"].min() > 0.99


@pytest.fixture
def wanted():
    """What probes look for in 4 prompts after 6 examples; x_q, S / lambda_max, S and b."""
    xs, ys = some_prompts(prompts=4)
    S, b = moments_after(xs, ys, 6)
    unit_S = S / torch.linalg.matrix_norm(S, 2)[:, None, None]
    return *lib.probe_targets(xs, ys, 6), xs[:, 6], unit_S, S, b


def test_probe_targets_are_newtons_own_iterates(wanted):
    targets, _, x_q, unit_S, *_ = wanted
    M_x, from_S = targets["M_k x_q"], targets["M_k x_q, from alpha S"]
    near(M_x, lib.newton(unit_S, x_q, 11, torch.eye(6).double())[1:], 1e-6)
    near(from_S, lib.newton(unit_S, x_q, 17, unit_S)[1:], 1e-6)
    near(targets["M_7 x_q"], M_x[6:7])


def test_probe_targets_w_and_b_and_the_whitened_query(wanted):
    targets, _, x_q, unit_S, S, b = wanted
    values, U = torch.linalg.eigh(unit_S)
    expected = lib.times(U, (values + 0.01) ** -0.5 * lib.times(U.mT, x_q))
    near(targets["whitened x_q"][0], expected, 1e-6)
    near(targets["w*"][0], torch.linalg.solve(S, b), 1e-6)
    near(targets["b"][0] * torch.linalg.matrix_norm(S, 2)[:, None], b, 1e-6)


def test_the_control_of_probes_is_a_quadratic_in_S(wanted):
    _, powers, x_q, unit_S, *_ = wanted
    expected = [x_q, lib.times(unit_S, x_q), lib.times(unit_S @ unit_S, x_q)]
    near(powers, torch.cat(expected, 1), 1e-6)


def test_probes_look_at_the_layers_and_not_at_the_embedding(monkeypatch):
    xs, ys = some_prompts(prompts=4)
    number_of_layer = torch.arange(3)[:, None, None].expand(3, 4, 9)

    def probe(states, targets, x_q):
        near(x_q, xs[:, 6])
        return states[:, :1, 0] + targets[:, 0, 0]

    monkeypatch.setattr(lib, "query_states", lambda *arguments: number_of_layer)
    monkeypatch.setattr(lib, "probe", probe)
    targets = dict(a=torch.tensor([10, 20]), b=torch.tensor([30]))
    targets = {name: z[:, None, None].expand(-1, 4, 6) for name, z in targets.items()}
    found = lib.explained(None, xs, ys, 6, targets)
    near(found["a"], [[11, 21], [12, 22]])
    near(found["b"], [[31], [32]])


def test_inside_of_planted_networks(plant):
    studies = []
    for network in HandWritten(), HoldsRule():
        studies.append(plant(lib.method_as_learner(newton_twice)))
        studies[-1].network = network
    (by_step, controls, relatives), (_, remains, rule) = lib.inside(studies)
    near(remains.measured[0], 1, 0.05)
    assert math.isnan(remains.measured[1])  # nothing to remain
    assert rule.measured[0] < 0.1
    near(rule.measured[1], 1, 0.01)
    assert list(by_step.curves["layer 6"][0][0]) == list(range(1, 12))
    assert in_text(by_step.curves).count("layer") == LAYERS
    assert controls.curves["M_7 x_q, untrained"][0].max() < 0.2
    assert controls.curves["M_7 x_q, random y"][1].max() < 0.2
    assert len(controls.curves["w*"][0]) == LAYERS
    names = ["M_k x_q", "M_k x_q, from alpha S", "whitened x_q"]
    assert list(relatives.curves) == names


def test_inside_reads_its_tables(plant, monkeypatch):
    """Of four layers, with shares that can be told apart; answers are known by their size."""

    def explained(network, xs, ys, t, targets):
        is_random = not torch.equal(ys, study_ys)
        M_7 = torch.tensor([0.2, 0.8, 0.5, 0.4]) / (2 if is_random else 1)
        kinds = torch.tensor([0.9, 0.1]).expand(4, 2)
        columns = {"M_7 x_q": M_7, "whitened x_q": M_7, "w*": M_7 / 10, "b": M_7 / 4}
        tables = {name: column[:, None] for name, column in columns.items()}
        return tables | {"M_k x_q": kinds, "M_k x_q, from alpha S": kinds}

    def probe(states, targets, x_q):
        near(states, powers[None])
        near(targets, wanted["M_7 x_q"])
        return torch.tensor([[0.6]])

    study = plant(lib.method_as_learner(newton_twice))
    study_xs, study_ys = lib.fresh_prompts(study.config, 4000, "probes")
    wanted, powers = lib.probe_targets(study_xs, study_ys, D)
    monkeypatch.setattr(lib, "explained", explained)
    monkeypatch.setattr(lib, "probe", probe)
    panels, (inverse, remains, rule) = lib.inside([study])
    near([*inverse.measured, *inverse.bar], [0.8, 0.6], 1e-6)
    near([*remains.measured, *rule.measured], [0.5, 0.2], 1e-6)
    assert (inverse.relation, remains.relation, rule.relation) == (">", ">", "<")
    assert (remains.bar, rule.bar) == (0.9, 0.1)
    near(panels[1].curves["M_7 x_q, random y"][0][1], 0.4, 1e-6)
    near(panels[2].curves["M_k x_q"][0], [0.9] * 4, 1e-6)


def test_controls_are_random_answers_and_an_untrained_network(plant, monkeypatch):
    seen, real = [], lib.explained

    def recorded(network, xs, ys, t, targets):
        seen.append((network, xs, ys))
        return real(network, xs, ys, t, targets)

    monkeypatch.setattr(lib, "explained", recorded)
    study = plant(lib.method_as_learner(newton_twice))
    study.network = YAlone()
    lib.inside([study])
    (network, xs, ys), (same, _, random), (untrained, *_) = seen
    assert network is same is study.network and not untrained.read_out.any()
    assert all(torch.equal(xs, other) for _, other, _ in seen)
    near(random.std(), ys.std(), 0.05)
    w = torch.linalg.pinv(xs) @ random[..., None]  # no rule explains them
    left = random - (xs @ w).squeeze(-1)
    assert left.square().mean() > 0.3 * random.square().mean()


# Noise, and methods with fixed steps


def half_of_least_squares(xs, ys):
    return lib.method_as_learner(lambda S, b: lib.least_squares(S, b)[None] / 2)(xs, ys)


def test_averaging_over_copies_removes_noise_and_nothing_else(plant):
    def noisy(xs, ys):
        return half_of_least_squares(xs, ys) + 2 * draws(*ys.shape)

    for learner, tolerance in (half_of_least_squares, 1e-6), (noisy, 0.5):
        study = plant(learner, prompts=1000)
        half = half_of_least_squares(study.xs, study.ys)[0]
        error = (half - study.ys)[:, 12].square().mean() / D
        near(lib.averaged_errors(study, 12, copies=4), [error], tolerance)


def test_copies_are_the_same_regression(plant):
    seen = []

    def learner(xs, ys):
        seen.append((xs, ys))
        return ys[None] * 0

    study = plant(learner, prompts=64)
    seen.clear()
    lib.averaged_errors(study, 10, copies=4)
    S, b = moments_after(study.xs, study.ys, 10)
    signs = []
    for xs, ys in seen:
        copied_S, copied_b = moments_after(xs, ys, 10)
        near(torch.linalg.eigvalsh(copied_S), torch.linalg.eigvalsh(S), 1e-5)
        near(copied_b.norm(dim=1), b.norm(dim=1), 1e-5)
        near(abs(ys[:, 10]), abs(study.ys[:, 10]), 1e-5)  # the query is the last
        assert not torch.allclose(copied_S, S)  # rotated
        assert not torch.allclose(
            abs(ys[:, 0]), abs(study.ys[:, 0])
        )  # in another order
        signs.append((ys[:, 10] / study.ys[:, 10]).mean().round().item())
    assert sorted(signs) == [-1, -1, 1, 1]


def test_the_best_fixed_steps_by_brute_force(plant):
    study = plant(lib.method_as_learner(newton_twice))
    fitting = lib.fresh_prompts(study.config, 10_000, "polynomials")

    def table(xs, ys):  # of what S^j b answers, in units of 1/lambda_max
        S, b = moments_after(xs, ys, 12)
        S = S / torch.linalg.matrix_norm(S, 2)[:, None, None]
        powers = b, lib.times(S, b), lib.times(S @ S, b)
        top = torch.linalg.matrix_norm(moments_after(xs, ys, 12)[0], 2)
        return torch.stack([(xs[:, 12] * z).sum(-1) / top for z in powers], dim=1)

    fit, judge = table(*fitting), table(study.xs, study.ys)
    found = lib.best_fixed_steps(study, 12, steps=3)
    for count in range(4):
        line = torch.linalg.pinv(fit[:, :count]) @ fitting[1][:, 12].double()
        miss = judge[:, :count] @ line - study.ys[:, 12]
        near(found[count], miss.square().mean() / D, 1e-5)


def test_convergence_after_n_and_after_d(plant):
    def learner(xs, ys):  # Newton, with a noise that depends on everything
        half = lib.method_as_learner(lambda S, b: lib.newton(S, b, LAYERS) / 2)
        return half(xs, ys) + torch.sin(1e4 * xs.sum(-1))

    study = plant(learner)
    (after_n, after_d), (fixed, noise) = lib.convergence([study])
    for panel, t in (after_n, N), (after_d, D):
        assert panel.title == f"After {t} examples"
        for name in "Newton,gradient descent,conjugate gradient,Transformer".split(","):
            steps, errors = study.error_curve(name, t)
            near(panel.curves[name][0][0], steps)
            near(panel.curves[name][0][1], errors)
        near(
            panel.curves["best fixed steps"][0][1],
            lib.best_fixed_steps(study, t, 3 * LAYERS),
        )
        averaged = lib.averaged_errors(study, t)
        near(panel.curves["Transformer, averaged"][0][1], averaged)
    left = lib.averaged_errors(study, N)[-1]
    near(noise.measured, [1 - left / study.last_error(N)])
    near(fixed.measured, [study.last_error(D)])
    near(fixed.bar, [lib.best_fixed_steps(study, D, LAYERS)[LAYERS]])
    assert (fixed.relation, noise.relation, noise.bar) == ("<", ">", 0.5)


def test_equal_error_by_hand():
    for error, steps, errors, expected in (
        (0.03, [0, 1, 2], [1, 0.1, 0.01], 1.5229),
        (0.03, [0, 4, 8, 16], [1, 0.1, 0.5, 0.01], 12.183),  # a rise gains nothing
        (2, [3, 4], [1, 0.1], 3),
        (0.2, [3, 4], [1, 0.1], 3.699),
        (1e-15, [3, 4], [1, 0], 3.5),
    ):
        near(lib.equal_error(error, steps, torch.tensor(errors)), expected, 1e-3)
    assert lib.equal_error(0.09, [3, 4], torch.tensor([1, 0.1])) == math.inf


def test_conditioning_compares_two_kappas(plant):
    """The layers are Newton's steps 1, 2, ... at kappa = 1, and 2, 4, ... at 100."""
    once = lib.method_as_learner(lambda S, b: lib.newton(S, b, LAYERS))
    easy, hard = (
        plant(once),
        plant(lib.method_as_learner(newton_twice), kappa=100.0),
    )
    panels, claims = lib.conditioning([easy, hard])
    assert panels[0].title == "kappa = 1: as Newton after 6 steps"
    assert panels[1].title == "kappa = 100: as Newton after 12 steps"
    for panel, study in zip(panels, (easy, hard)):
        drawn = panel.curves["Transformer"][0][1]
        near(drawn, study.error_curve("Transformer", N)[1])


# Theory


def test_linear_attention_token_by_token():
    """Tokens [x ; y] go through layers that rewrite y, and x."""
    xs, ys = some_prompts(prompts=3, n=9, d=4)
    S, b = moments_after(xs, ys, 9)
    numbers = torch.tensor([[0.5, 0.3, 0.9], [0.2, 0.15, 0.1]]).double()
    eigenvalues, U = torch.linalg.eigh(S / 9)
    missing = lib.shares_missing(eigenvalues, numbers)
    near(missing[0], torch.ones(3, 4))
    rule = lib.times(U.mT, torch.linalg.solve(S, b))
    x, y = xs, F.pad(ys[:, :-1], (0, 1))
    for layer, (a, g) in enumerate(numbers.T, 1):
        scores = x @ x[:, :-1].mT / 9
        y, x = (
            y - a * lib.times(scores, y[:, :-1]),
            x - g * (scores @ x[:, :-1]),
        )
        w = lib.times(U, (1 - missing[layer]) * rule)
        near(-y[:, -1], (w * xs[:, -1]).sum(-1), 1e-8)


def test_trained_linear_attention_is_the_best_polynomial():
    eigenvalues = torch.rand(60, 5).double() * 2 + 0.1

    def error(layers, rewrites):
        numbers = lib.train_linear_attention(eigenvalues, layers, rewrites)
        assert numbers.shape == (2, layers) and bool(numbers[1].any()) == bool(rewrites)
        return lib.shares_missing(eigenvalues, numbers)[-1].square().mean()

    for layers in 1, 2, 3:
        powers = eigenvalues.flatten()[:, None] ** torch.arange(1, layers + 1)
        _, squares, *_ = np.linalg.lstsq(powers, np.ones(300), rcond=None)
        near(error(layers, 0), squares[0] / 300, 1e-2)
    assert error(3, 1) < 0.3 * error(3, 0)


@pytest.fixture
def stubbed(monkeypatch):
    """The trained networks of section 15: y alone misses .5 in each layer, GD++ .1."""

    def trained(eigenvalues, layers, rewrites):
        assert eigenvalues.shape == (500, D) and abs(eigenvalues.mean() - 1) < 0.05
        trained.on = eigenvalues
        return torch.tensor([layers, rewrites])

    def missing(eigenvalues, numbers):
        assert eigenvalues.shape == (500, D)
        assert not torch.equal(eigenvalues, trained.on)
        share = (0.5, 0.1)[int(numbers[1])]
        return torch.full((2, 3), share ** int(numbers[0]), dtype=torch.float64)

    monkeypatch.setattr(lib, "train_linear_attention", trained)
    monkeypatch.setattr(lib, "shares_missing", missing)


def test_linear_attention_beside_newton(plant, stubbed):
    study = plant(lib.method_as_learner(newton_twice))
    (panel,), (_, theorem) = lib.linear_attention([study])
    for name, share in ("linear attention, y alone", 0.5), ("GD++", 0.1):
        layers, errors = panel.curves[name][0]
        assert in_text(layers) == "0 1 2 3 4 5 6"
        near(errors, [share ** (2 * k) for k in layers])
    near(theorem.measured, [1 - 0.25 / (1 - N / (N + 1 + D))], 1e-6)  # it errs 1 - a
    assert (theorem.relation, theorem.bar) == ("<", 0.03)
    worth = math.log10(study.last_error(N)) / -2
    assert f"after {worth:.1f} layers" in panel.title


def test_the_hand_written_network_beside_newton(plant, stubbed):
    study = plant(lib.method_as_learner(newton_twice))
    (panel,), (by_hand, _) = lib.linear_attention([study])
    assert by_hand.measured[0] < 1e-9
    assert (by_hand.relation, by_hand.bar) == ("<", 1e-6)
    steps, errors = panel.curves["network by hand"][0]
    assert len(steps) == len(errors) == 3 * LAYERS + 1
    near(errors[0], 1, 0.2)
    assert errors[-1] < 0.05


def test_softmax_attention_moves_by_huangs_formulas():
    p, Q, losses = np.array([0.4, 0.35, 0.25]), np.zeros((3, 3)), []
    for _ in range(4):
        a = p[:, None] * np.exp(Q)
        a = a / a.sum(0)
        own = a.diagonal()
        others = (a**2).sum(0) - own**2
        losses.append(((1 - own) ** 2 + others) / 2)
        change = a * (others - a - own * (1 - own))
        np.fill_diagonal(change, own * ((1 - own) ** 2 + others))
        Q = Q + 0.7 * p * change
    found = lib.train_attention(torch.tensor(p), 4, step_size=0.7)
    near(found, np.array(losses), 1e-6)


def test_stages_measure_the_imbalanced_features(monkeypatch):
    def losses(p, steps):
        """Above a tenth of the start for 5 steps; the others for 45, or 10 if all are alike."""
        assert p.shape == (16,) and abs(p.sum() - 1) < 1e-6 and (p[1:] == p[1]).all()
        path = torch.full((steps, 16), 0.1)
        path[:5, 0], path[: 45 if p[0] == 0.5 else 10, 1:] = 0.5, 0.4
        path[0] = 2.0
        return path

    monkeypatch.setattr(lib, "train_attention", losses)
    panels, (later,) = lib.stages()
    assert later.measured == [9.0] and (later.relation, later.bar) == (">", 5)
    near(
        panels[1].curves["queries for feature 1"][0][:6],
        [2, 0.5, 0.5, 0.5, 0.5, 0.1],
        1e-6,
    )
    assert "1/16" in panels[0].title and "1/2" in panels[1].title
    assert (panels[0].curves["queries for the others"][0] > 0.3).sum() == 10


# Settings


BAD = """figures=x figures=rates, d=4 d=9e9 d=1.5 d=None n=7 steps=x steps=12 steps=-1
    noise=-1 noise=None noise=nan kappa=.5 kappa=inf heads=5 heads=12 heads=0 layers=3
    layers=4.5 batch=9 batch=0 seeds=0 seed=-1 seed=1e9 prompts=63 width=0 tuning=-1
    curriculum=4"""


@pytest.mark.parametrize("bad", BAD.split())
def test_settings_that_cannot_work_are_refused(bad):
    name, _, text = bad.partition("=")
    with pytest.raises(ValueError, match=f"--({name}|steps)") as error:
        tiny(**{name: None if text == "None" else text})
    assert "\n" not in str(error.value)


def test_settings_may_be_numpys_or_paths():
    config = tiny(steps=np.int64(20), noise=np.float32(0.5), out=Path("o"), kappa=1)
    assert json.dumps([config.steps, config.noise, config.out]) == '[20, 0.5, "o"]'
    for bad in dict(figures=["rates"]), dict(layers=4.5), dict(noise=True + 1j):
        with pytest.raises(ValueError, match=f"--{[*bad][0]}"):
            tiny(**bad)


RECIPE = "d=20, n=40, kappa=1.0, noise=0.0, layers=8, width=64, heads=2, steps=2000, tuning=750, "
RECIPE += "batch=96, curriculum=12, seed=1, seeds=1, prompts=640, figures='all', out='figures'"
SMALL = "--d 5 --n 10 --batch 64 --curriculum 0"
PRESETS = {
    "quick": f"{SMALL} --width 32 --layers 6 --steps 1500 --prompts 256 "
    "--figures paths,rates,convergence",
    "small": f"{SMALL} --width 40 --steps 5000 --prompts 2048",
    "long": "--steps 8000 --tuning 2000",
    "paper": "--layers 12 --width 256 --heads 8 --steps 12000 --batch 256",
}


def test_defaults_and_presets_are_the_recipe():
    assert str(lib.parse([])) == f"Config({RECIPE})"
    assert list(lib.PRESETS) == list(PRESETS)
    for preset, flags in PRESETS.items():
        spelled_out = f"{flags} --out figures/{preset}".split()
        assert lib.parse(["--preset", preset]) == lib.parse(spelled_out)


def test_flags_are_stronger_than_the_preset():
    config = lib.parse("--preset quick --d 6 --n 12 --noise .5 --out x".split())
    assert (config.d, config.n, config.noise, config.out) == (6, 12, 0.5, "x")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_starts(preset):
    small = "--steps 0 --tuning 0 --layers 4 --width 8 --heads 2 --prompts 64 --out o"
    arguments = f"--preset {preset} {small} --figures rates".split()
    assert lib.main(arguments) == 0
    assert sorted(os.listdir("o")) == ["rates.png", "results.json"]


# Files


def test_a_file_is_whole_or_not_there():
    path = Path("a.txt")
    path.write_text("old")

    def full(half):
        half.write_text("n")
        assert path.read_text() == "old"
        raise OSError(28, "No space left")

    with pytest.raises(OSError, match="cannot write a.txt: No space left"):
        lib.write_file(path, full)
    assert path.read_text() == "old" and os.listdir() == ["a.txt"]
    with pytest.raises(OSError, match="cannot write gone/a.txt: No such file"):
        lib.write_file(Path("gone/a.txt"), Path.touch)


def test_what_a_kill_left_goes_and_a_run_beside_writes_again():
    path, attempts = Path("a.txt"), []
    Path("half-mine.txt").write_text("mine")

    def write(half):
        half.write_text("new")
        attempts.append(half)
        if len(attempts) == 1:
            lib.prepare_folder(half.parent)  # another run starts

    lib.write_file(path, write)
    assert path.read_text() == "new" and len(attempts) == 2
    attempts[0].write_text("left by a kill")
    lib.prepare_folder(Path())
    assert sorted(os.listdir()) == ["a.txt", "half-mine.txt"]


def test_a_killed_training_goes_on_bit_for_bit(monkeypatch, capsys):
    config, real, saves = tiny(kappa=9.0), lib.write_file, []
    whole = lib.train(config)
    for path in Path("checkpoints").iterdir():
        path.unlink()

    def killed(path, write):
        real(path, write)
        saves.append(path.suffix)
        if path.suffix == ".pt" and saves.count(".pt") in (8, 8 + 6 + 4):
            raise ZeroDivisionError  # in the curriculum; while tuning

    monkeypatch.setattr(lib, "SECONDS_BETWEEN_SAVES", 0)
    monkeypatch.setattr(lib, "write_file", killed)
    threads = torch.get_num_threads()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            lib.train(config)
        assert torch.get_num_threads() == threads
    for model in lib.train(config), lib.train(config):
        assert all(map(torch.equal, whole.parameters(), model.parameters()))
        assert not model.mlp.requires_grad
    said = capsys.readouterr().out
    for step in 8, 14, 4, 7:
        assert f", step {step}; delete it to train anew" in said
    assert len(os.listdir("checkpoints")) == 2


def test_training_at_kappa_goes_on_with_prompts_of_its_own(monkeypatch):
    seen, real = [], lib.training_prompts

    def prompts(config, step, generator):
        xs, ys = real(config, step, generator)
        law = config.kappa, config.curriculum, config.steps
        seen.append((law, xs[0, 0, 0].item()))
        return xs, ys

    def numbers(config, purpose):
        purposes.append(purpose)
        return real_numbers(config, purpose)

    real_numbers, purposes = lib.random_numbers, []
    monkeypatch.setattr(lib, "training_prompts", prompts)
    monkeypatch.setattr(lib, "random_numbers", numbers)
    hard, easy = lib.train(tiny(kappa=9.0)), lib.train(tiny())
    assert purposes[:4] == ["weights", "training", "weights", "tuning"]
    laws, first = zip(*seen)
    assert laws == ((1, 3, 14),) * 14 + ((9, 0, 7),) * 7 and len(set(first)) == 21
    far = (hard.mlp - lib.Transformer(tiny()).mlp).norm()
    assert 0 < (hard.mlp - easy.mlp).norm() < 0.5 * far


def test_training_reports_its_progress(capsys):
    threads = torch.get_num_threads()
    lib.train(tiny(n=13))
    first, last = capsys.readouterr().out.splitlines()
    assert "step 10 of 14" in first and "after 12 examples; about 0 s left" in first
    assert "step 14 of 14" in last and "after 13 examples" in last
    assert torch.get_num_threads() == threads


def test_training_saves_from_time_to_time(monkeypatch, capsys):
    seconds = iter(range(0, 10_000, 20))
    monkeypatch.setattr(lib.time, "perf_counter", lambda: next(seconds))
    lib.train(tiny())
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert steps == "2 4 6 8 10 12 14".split()  # each 40 s, and where it ends


def test_errors_that_are_not_finite_end_the_training(monkeypatch):
    def nan(model, xs, ys):
        return ys * math.nan, [torch.zeros_like(p) for p in model.parameters()]

    monkeypatch.setattr(lib, "errors_and_gradients", nan)
    with pytest.raises(FloatingPointError, match="step 10"):
        lib.train(tiny())
    assert not os.listdir("checkpoints")


def with_docstring(function, docstring):
    """The code of the function with another docstring."""
    code = function.__code__
    texts = {function.__doc__: docstring}
    return code.replace(co_consts=tuple(texts.get(z, z) for z in code.co_consts))


def test_a_name_knows_what_decides_the_weights(monkeypatch):
    first = lib.checkpoint_path(tiny())
    same = dict(tuning=9, seeds=2, prompts=99, figures="rates", out="x")
    assert lib.checkpoint_path(tiny(**same)) == first
    sizes = dict(d=5, n=12, kappa=2.0, noise=0.1, layers=6, width=18, heads=2)
    other = sizes | dict(steps=15, batch=12, curriculum=2, seed=5)
    names = {lib.checkpoint_path(tiny(**{key: other[key]})) for key in other}
    names |= {first, lib.checkpoint_path(tiny(kappa=2.0, tuning=9))}
    assert len(names) == len(other) + 2
    monkeypatch.setattr(lib.train, "__code__", with_docstring(lib.train, "other"))
    monkeypatch.setattr(lib.train, "__doc__", "other")
    assert lib.checkpoint_path(tiny()) == first
    version = torch.__version__.split("+")[0]
    for text, found in (f"{version}+cu126", True), ("9.9", False):
        monkeypatch.setattr(torch, "__version__", text)
        assert (lib.checkpoint_path(tiny()) == first) == found


THAT_TRAINS = """train random_numbers sample_prompts training_prompts training interleave
    errors_and_gradients sinusoids normalize orthogonalize make_optimizers Muon.step
    Transformer.__init__ Transformer.attend Transformer.stream Transformer.forward"""


@pytest.mark.parametrize("name", THAT_TRAINS.split())
def test_edited_code_that_trains_means_another_network(name, monkeypatch):
    owner, _, function = name.rpartition(".")
    place = getattr(lib, owner) if owner else lib
    edited = []
    for answer in 7, 8:  # the same but for a constant
        text = f"lambda *arguments: [(lambda: {answer})()]"
        monkeypatch.setattr(place, function, eval(text))
        edited.append(lib.checkpoint_path(tiny()))
    assert edited[0] != edited[1]


def test_damaged_checkpoints_are_named():
    lib.train(tiny())
    (path,) = Path("checkpoints").iterdir()
    good = path.read_bytes()
    for bad in b"", good[:99], b"x" + good[1:]:
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{path.name} is damaged: delete it"):
            lib.train(tiny())


def train_a_seed(seed):
    return lib.train(tiny(seed=seed)).mlp.sum().item()


def test_seeds_train_side_by_side_in_forked_processes():
    """Also where the first process has used Torch's threads before."""
    draws(1000, 1000).exp().sum()
    alone = train_a_seed(4)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(train_a_seed, [4, 5]).get(timeout=60)
    assert found[0] == alone != found[1]


# Pictures, tables, runs


@pytest.fixture
def picture():
    """Two panels: two seeds of the Transformer, and a layer; Newton, and the Transformer."""
    left = {"Transformer": [[3, 5], [4, 6]], "layer 3": [([1, 10], [0.5, 2])]}
    right = {"Newton": [torch.tensor([7.0, 8, 9])], "Transformer": [[1]]}
    axes = dict(xscale="log", ylim=(1, 3))
    panels = [lib.Panel("one", "x", "y", left, axes), lib.Panel("two", "", "", right)]
    return lib.draw("what was found", panels)


def test_a_picture_shows_its_curves(picture):
    left, right = ([z.get_xydata().tolist() for z in ax.lines] for ax in picture.axes)
    assert left == [[[1, 3], [2, 5]], [[1, 4], [2, 6]], [[1, 0.5], [10, 2]]]
    assert right == [[[1, 7], [2, 8], [3, 9]], [[1, 1]]]


def test_a_learner_has_one_look_in_all_panels(picture):
    colors = [to_hex(line.get_color()) for ax in picture.axes for line in ax.lines]
    orange, blue, of_layer = to_hex("C1"), to_hex("C0"), colors[2]
    assert colors == [orange, orange, of_layer, blue, orange]
    (legend,) = picture.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["Transformer", "layer 3", "Newton"]
    shown = [to_hex(line.get_color()) for line in legend.legend_handles]
    assert shown == [orange, of_layer, blue] and len(set(shown)) == 3


def test_a_picture_has_the_titles_and_axes_of_its_panels(picture):
    left, right = picture.axes
    texts = left.get_title(), left.get_xlabel(), left.get_ylabel(), right.get_title()
    assert texts == ("one", "x", "y", "two")
    assert picture.get_suptitle() == "what was found"
    assert (left.get_xscale(), right.get_xscale()) == ("log", "linear")
    assert left.get_ylim() == (1, 3)


def test_rivals_look_different():
    rivals = "Transformer,Newton,gradient descent,conjugate gradient,GD++".split(",")
    looks = [lib.LOOK[name] for name in rivals]
    for part in slice(2), slice(2, 3):  # colour; mark
        assert len({look[part] for look in looks}) == 5


def test_claims_in_words():
    for claim, expected in (
        (("a", [1, 3.14159], ">", 2), ("a", "1 3.14 > 2", "1 of 2")),
        (("b", [1, 3], "<", [2, 4]), ("b", "1 3 < 2 4", "2 of 2")),
        (("c", [2.0], ">", [2]), ("c", "2 > 2", "0 of 1")),
        (("d", [math.nan], "<", 1), ("d", "nan < 1", "0 of 1")),
    ):
        assert lib.in_words(lib.Claim(*claim)) == expected
    of_paths, of_stages = (
        dict(claims=[("e", [1], "<", 2)]),
        dict(claims=[claim]),
    )
    lines = lib.table(dict(stages=of_stages, paths=of_paths)).split("\n")
    assert lines[2:] == ["| e | 1 < 2 | 1 of 1 |", "| d | nan < 1 | 0 of 1 |"]


@pytest.fixture
def trained(monkeypatch):
    """Experiments that answer by the studies that they get; a list of what is trained."""

    def stub(name):
        def experiment(*given):
            of_seeds = (
                [[z.config.seed, z.config.kappa] for z in given[0]]
                if given
                else [[0, 0]]
            )
            claim = lib.Claim(f"{name}!", [float(seed) for seed, _ in of_seeds], ">", 4)
            return [lib.Panel(name, "", "", {"Newton": of_seeds})], [claim]

        return experiment

    networks = []
    names = lib.EXPERIMENTS
    monkeypatch.setattr(lib, "EXPERIMENTS", {name: stub(name) for name in names})
    monkeypatch.setattr(
        lib, "Study", lambda config, network: argparse.Namespace(config=config)
    )
    monkeypatch.setattr(lib, "train", lambda z: networks.append((z.seed, z.kappa)))
    return networks


NAMES = "paths stages rates similarity convergence filters inside linear_attention conditioning"


def test_a_run_makes_every_figure_of_all_seeds(trained, capsys):
    results = lib.run(tiny(seeds=2, kappa=3.0))
    assert list(results) == NAMES.split()
    four = [[4, 1.0], [5, 1.0], [4, 100.0], [5, 100.0]]
    for name, expected in (
        ("rates", [[4, 3.0], [5, 3.0]]),
        ("paths", [[0, 0]]),
        ("linear_attention", four[:2]),
        ("conditioning", four),
    ):
        assert results[name]["curves"] == {name: {"Newton": expected}}
    assert sorted(trained) == [(s, kappa) for s in (4, 5) for kappa in (1, 3, 100)]
    said = capsys.readouterr().out
    assert (
        "rates!: 4 5 > 4 (in 1 of 2)" in said
        and "| rates! | 4 5 > 4 | 1 of 2 |" in said
    )


def test_a_run_writes_pictures_and_a_record(trained):
    lib.run(tiny(seeds=2))
    record = json.loads(Path("figures/results.json").read_text())
    assert list(record["figures"]) == NAMES.split() and record["settings"]["d"] == 6
    assert record["figures"]["rates"]["claims"] == [["rates!", [4, 5], ">", 4]]
    for name in NAMES.split():
        assert Path(f"figures/{name}.png").read_bytes()[1:4] == b"PNG"


def test_a_partial_run_keeps_the_other_figures(trained):
    for figures in "rates,inside", "paths":
        results = lib.run(tiny(figures=figures))
    record = json.loads(Path("figures/results.json").read_text())
    assert list(results) == list(record["figures"]) == ["rates", "inside", "paths"]
    assert list(lib.run(tiny(figures="stages", seed=9))) == ["stages"]  # other settings
    for damaged in "{", "[]", "{}":
        Path("figures/results.json").write_text(damaged)
        assert list(lib.run(tiny(figures="rates"))) == ["rates"]
    assert list(lib.run(tiny(figures="rates,all"))) == ["rates"] + [
        name for name in NAMES.split() if name != "rates"
    ]


def test_a_run_sees_edited_methods(monkeypatch):
    config = tiny(steps=0, figures="rates")
    before = lib.run(config)["rates"]["curves"]

    def no_newton(S, b, steps, start=None):
        return b.expand(steps + 1, *b.shape)

    monkeypatch.setattr(lib, "newton", no_newton)
    assert str(lib.run(config)["rates"]["curves"]) != str(before)


def test_an_untrained_network_from_beginning_to_end(monkeypatch):
    monkeypatch.setattr(lib.train_linear_attention, "__defaults__", (60,))
    results = lib.run(tiny(steps=0, tuning=0, layers=4))
    claims = [claim for z in results.values() for claim in z["claims"]]
    held = [claim.sentence for claim in claims if lib.in_words(claim)[2] == "1 of 1"]
    theory = [z for z in held if z.startswith(("Newton from", "Thm.", "Ahn", "Huang"))]
    assert len(claims) == 12 and len(theory) == 4 and len(os.listdir("figures")) == 10
    assert set(held) - set(theory) == {"In no layer can w* or b be read (share)"}


# The command line


def test_bad_input_is_a_line_and_status_2(capsys):
    Path("a_file").write_text("mine")
    for bad in (
        "--d x",
        "--figures no",
        "--preset no",
        "--out a_file",
        "--n",
        "--x 1",
    ):
        with pytest.raises(SystemExit, match="2"):
            lib.main(bad.split())
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and bad.split()[-1] in err
    assert Path("a_file").read_text() == "mine" and os.listdir() == ["a_file"]


def test_statuses_with_which_it_exits(monkeypatch, capsys):
    for error, status in (
        (KeyboardInterrupt(), 130),
        (ValueError("it\nis"), 1),
        (OSError("it"), 1),
        (FloatingPointError("it"), 1),
        (RuntimeError("can't allocate memory\nframe 1"), 1),
        (MemoryError(), 1),
    ):

        def run(config):
            raise error

        monkeypatch.setattr(lib, "run", run)
        assert lib.main([]) == status
        said = capsys.readouterr().err
        assert said.startswith("icl_newton: " if status == 1 else "\nicl_newton: ")
        assert said.strip().count("\n") == 0
    ran = []
    monkeypatch.setattr(lib, "run", ran.append)
    assert lib.main(["--seed", "9"]) == 0 and ran[0].seed == 9


WHERE = os.environ | dict(PYTHONPATH=str(PROGRAM.parent), PYTHONDONTWRITEBYTECODE="1")


def start(*command, **options):
    """A Python process, of which the output is kept."""
    options |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *command], **options)


def test_who_starts_the_program():
    text = PROGRAM.read_text("utf-8")
    Path("copied.py").write_text(text, "utf-8")
    Path("other.py").write_text(f"exec({text!r})\nprint('not run')", "utf-8")
    copied, other, piped = (
        process.communicate()[0]
        for process in (
            start("copied.py", "--help"),
            start("other.py", "--help"),
            start("-", "--help", stdin=PROGRAM.open()),
        )
    )
    assert other == "not run\n"
    for said in copied, piped:
        assert "--curriculum" in said and "condition number" in said


def test_an_import_has_no_effects():
    state = "torch.get_num_threads(), torch.initial_seed(), os.listdir()"
    code = f"import os, torch; before = {state}; import icl_newton; print(before == ({state}))"
    assert start("-c", code, env=WHERE).communicate()[0] == "True\n"


# The classroom


def hand_in(folder, **answers):
    """Grades a folder with the solved program, but for these functions."""
    program = PROGRAM.read_text("utf-8")
    for name, text in answers.items():
        program = program.replace(stub(name)[0], text)
    Path(folder).mkdir()
    Path(folder, "icl_newton.py").write_text(program, "utf-8")
    Path(folder, "test_icl_newton.py").write_text(students_tests([]), "utf-8")
    return start(*"-m pytest -q -p no:cacheprovider -k test_ex".split(), cwd=folder)


def test_hand_ins_are_graded():
    wrong = dict(
        sample_prompts=stub("sample_prompts")[1],
        gradient_descent="def gradient_descent(S, b, steps):\n    return b\n",
        interleave="def interleave(xs, ys):\n    import pytest; pytest.skip('')\n",
        share_found="def share_found(*z):\n    raise KeyboardInterrupt\n",
    )
    graded = hand_in("1", **wrong), hand_in("2", newton="def newton(S, b:\n")
    some, broken = (process.communicate()[0] for process in graded)
    assert "  0 of 100 points" in broken and "line" in broken
    for line in (
        "icl_newton.py: exercise 1: sample_prompts",
        "ex02 gradient_descent          0 of 10 shape",
        "ex04 newton                   15 of 15",
        "ex06 interleave                0 of 5  skipped",
        "ex08 share_found               0 of 10 stopped",
        "ex09 newton_layer              0 of 10 not run",
        "  40 of 100 points",
    ):
        assert line in some, some


def test_homework_holds_no_answers():
    for folder, solved in ("week1", []), ("week2", [1, 2, 3, 4, 5]):
        write_homework(folder, solved)
        text = {
            name: Path(folder, name).read_text("utf-8") for name in os.listdir(folder)
        }
        notes = Path(f"{folder}-LECTURERS.md").read_text("utf-8")
        for number, (name, _) in EXERCISES.items():
            source, empty = stub(name)
            assert source in notes and f"`{name}`" in text["SHEETS.md"]
            assert (source in text["icl_newton.py"]) == (number in solved)
            assert (empty in text["icl_newton.py"]) == (number not in solved)
        assert "# %% What" not in text["icl_newton.py"]
        assert f"SOLVED = {solved}  #" in text["test_icl_newton.py"]
        assert "lecturers" not in text["test_icl_newton.py"]
        assert "   >" in notes and "   >" not in text["SHEETS.md"]
    assert sum(worth for _, worth in EXERCISES.values()) == 100


def test_homework_does_no_harm(monkeypatch, capsys):
    Path("work").mkdir()
    Path("work/mine").write_text("")
    inside = PROGRAM.with_name("week1")
    for arguments in (
        ["work"],
        ["work/mine"],
        [str(inside)],
        ["new", "--solved", "1-11"],
        ["new", "--solved", "5-3"],
    ):
        monkeypatch.setattr(sys, "argv", ["test_icl_newton.py", *arguments])
        with pytest.raises(SystemExit, match="2"):
            make_homework()
    assert os.listdir() == ["work"] and not inside.exists()
    assert numbers("1-3,7") == [1, 2, 3, 7]


# The README


def test_the_readme_tells_what_the_committed_runs_found():
    readme, folder = (
        PROGRAM.with_name("README.md"),
        PROGRAM.with_name("figures"),
    )
    if not readme.exists():
        pytest.skip("the two files alone")
    text = readme.read_text("utf-8")
    for path in folder.glob("three_seeds*/results.json"):
        record = json.loads(path.read_text("utf-8"))
        lines = lib.table(record["figures"]).split("\n")[2:]
        if path.parent.name == "three_seeds":
            assert record["settings"] == vars(lib.Config(seeds=3, out="")) | dict(
                out=""
            )
            assert all(line in text for line in lines)
        measured = lines[2].split("|")[2].split(">")[0].strip()
        assert measured in text, path


if __name__ == "__main__":
    make_homework()
