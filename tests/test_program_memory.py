"""The memory of a program: values that live at once do not overlap, and no more is taken than has to be."""

from hypothesis import given
from hypothesis import strategies as st

from hfopt.program.memory import LINE, Lifetime, plan


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    found = []
    for _ in range(draw(st.integers(1, 20))):
        first = draw(st.integers(0, 30))
        found.append(Lifetime(draw(st.integers(1, 1000)), first, first + draw(st.integers(0, 10))))
    return found


@given(lifetimes())
def test_values_that_live_at_once_do_not_overlap(values: list[Lifetime]) -> None:
    places, size = plan(values)
    for index, (one, here) in enumerate(zip(values, places, strict=True)):
        assert here % LINE == 0 and here >= 0 and here + one.n_bytes <= size
        for other, there in list(zip(values, places, strict=True))[index + 1 :]:
            if one.first <= other.last and other.first <= one.last:
                assert here + one.n_bytes <= there or there + other.n_bytes <= here


def test_memory_is_given_anew_after_the_last_use() -> None:
    # x, its norm, x plus something: the third takes the place of the first
    chain = [Lifetime(640, index, index + 1) for index in range(10)]
    assert plan(chain) == ([0, 640] * 5, 1280)


def test_the_smallest_gap_that_fits_is_taken() -> None:
    living = [
        Lifetime(64, 0, 9),
        Lifetime(256, 0, 1),
        Lifetime(64, 0, 9),
        Lifetime(128, 0, 1),
        Lifetime(64, 0, 9),
    ]
    places, size = plan([*living, Lifetime(128, 2, 3)])
    assert places[-1] == places[3] and size == 64 + 256 + 64 + 128 + 64
