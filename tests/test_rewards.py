r"""The math reward: answers found, graded, and nothing that a model may write stops or misleads it."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from verl_pte.rewards.answer import final_answer
from verl_pte.rewards.grader import Grader
from verl_pte.rewards.math import compute_score

RIGHT = [
    ("42", "42"),
    (" 42 ", "42"),
    ("042", "42"),
    ("42.0", "42"),
    ("42.", "42"),
    ("+3", "3"),
    ("−3", "-3"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\dfrac{3}{4}", "0.75"),
    (r"\tfrac{3}{4}", r"\frac{6}{8}"),
    (r"1\frac{1}{2}", "1.5"),
    ("0.333333", r"\frac{1}{3}"),
    ("1,000", "1000"),
    (r"1{,}000", "1000"),
    (r"5\text{ cm}", "5"),
    (r"5\,\mathrm{m}", "5"),
    (r"\$12", "12"),
    ("$12$", "12"),
    (r"\$18.90", "18.90"),
    (r"12\%", "12"),
    ("50%", "50"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}"),
    (r"2\sqrt3", r"2\sqrt{3}"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"2\pi", "6.283185307"),
    ("x+1", "1+x"),
    ("(x+1)^2", "x^2+2x+1"),
    ("y = 2x + 1", "y=2x+1"),
    ("x=3", "3"),
    ("3", "x=3"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1, 2", "2, 1"),
    ("(1,2)", r"\left(1, 2\right)"),
    ("[0,1)", "[0, 1)"),
    (r"(-\infty,3]", r"(-\infty, 3]"),
    (r"(-\infty,0)\cup(0,\infty)", r"(0,\infty)\cup(-\infty,0)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\text{Monday}", "Monday"),
    (r"\text{(A)}", "A"),
    ("B.", "B"),
    ("10^{3}", "1000"),
    ("3!", "6"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    ("3+4i", "4i+3"),
    (r"\infty", r"\infty"),
]
WRONG = [
    ("41", "42"),
    ("5", "5.1"),
    ("-3", "3"),
    ("1/3", "0.33"),
    ("0.33", r"\frac13"),
    ("0.5", r"50\%"),
    ("3", "3,4"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("x+1", "x+2"),
    ("y=2x", "y=3x"),
    ("1:2", "2:1"),
    ("Tuesday", "Monday"),
    ("B", "A"),
    (r"\frac{1}{0}", "3"),
    ("10^{10^{10}}", "10^{10^{10}}+1"),
]
HOSTILE = [
    "9^{9^{9^9}}",
    "((10^{10})!)!",
    "10!^{10!}",
    "2^{100000000}",
    "1e999999999",
    r"\sum_{k=1}^{10^{9}} k^k",
    r"\int_0^1 x^{x^{x}} dx",
    "x" * 100_000,
    "9" * 100_000,
    "(" * 5000,
    "{}" * 10_000,
    r"\frac{" * 3000,
    r"\sqrt{" * 3000,
    "-" * 10_000 + "1",
    "1" + "+1" * 5000,
    "a_{b_{c_{d}}}" * 500,
    "\x00\x01",
    "\u202e42",
    "\ud800",
    "$$$$$$",
    "\\",
    "nan",
    "__import__('os').system('true')",
]


@pytest.fixture(scope="module")
def grader():
    patient = Grader(processes=1, seconds=60)
    yield patient
    patient.close()


@pytest.mark.parametrize(("answer", "truth"), RIGHT)
def test_equal(grader, answer, truth):
    assert grader.grade(answer, truth) == (1.0, "right")


@pytest.mark.parametrize(("answer", "truth"), WRONG)
def test_unequal(grader, answer, truth):
    assert grader.grade(answer, truth) == (0.0, "wrong")


def test_no_answer_is_unparsed_and_everything_is_counted():
    grader = Grader(processes=1, seconds=60)
    verdicts = [grader.grade(*pair).verdict for pair in ((None, "1"), ("$$$$", "1"), ("2", "2"), ("3", "2"))]
    assert verdicts == ["unparsed", "unparsed", "right", "wrong"]
    assert grader.counts == {"unparsed": 2, "right": 1, "wrong": 1}
    grader.close()


def test_hostile_answers_are_never_right_and_never_raise():
    """Many threads at once, two processes, little time for each item; a good answer between them is still right."""
    grader = Grader(processes=2, seconds=3)
    items = [item for hostile in HOSTILE for item in ((hostile, "42"), (r"\frac{84}{2}", "42"))]
    with ThreadPoolExecutor(8) as pool:
        grades = list(pool.map(lambda item: grader.grade(*item), items))
    assert {grade.verdict for grade in grades[::2]} <= {"wrong", "unparsed", "late"}
    assert grades[0].verdict == "late"
    assert sum(grade.verdict == "right" for grade in grades[1::2]) >= len(HOSTILE) - 2  # a busy machine may be late
    assert len(grader._all) <= 2
    grader.close()


def test_a_process_that_was_killed_is_replaced():
    grader = Grader(processes=1, seconds=60)
    assert grader.grade("1/2", "0.5").verdict == "right"
    grader._all[0].kill()
    assert [grader.grade("1/2", "0.5").verdict for _ in range(2)][-1] == "right"
    grader.close()


def test_after_a_fork_parent_and_child_have_processes_of_their_own():
    grader = Grader(processes=1, seconds=60)
    assert grader.grade("1/2", "0.5").verdict == "right"
    child = os.fork()
    if child == 0:
        right = grader.grade("0.25", r"\frac14").verdict == "right"
        grader.close()
        os._exit(0 if right else 1)
    end = time.monotonic() + 120
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        threading.Event().wait(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 0 and ended[0] == child
    assert grader.grade("1/2", "0.5").verdict == "right"
    grader.close()


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so it is \boxed{42}.", "42"),
        (r"\boxed{1}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed 7", "7"),
        (r"\fbox{3}", "3"),
        ("Answer: 42", "42"),
        ("**Answer:** $42$", "$42$"),
        ("The final answer is 3/4", "3/4"),
        ("Answer: 1\nAnswer: 2", "2"),
        (r"Answer: 1 but \boxed{2}", "2"),
        (r"it is \boxed{42", None),
        (r"\boxed{}", None),
        ("no idea", None),
        ("", None),
        (r"\boxed{" + "1" * 5000 + "}", None),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


def test_reward_is_what_verl_expects():
    assert compute_score("d", r"thus \boxed{\frac{2}{4}}", "0.5") == {"score": 1.0, "acc": 1.0, "unparsed": 0.0}
    assert compute_score("d", r"thus \boxed{3}", "0.5", extra_info={}) == {"score": 0.0, "acc": 0.0, "unparsed": 0.0}
    assert compute_score("d", "it was cut o", 0.5) == {"score": 0.0, "acc": 0.0, "unparsed": 1.0}
