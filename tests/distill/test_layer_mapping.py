from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kncompress.distill import layer_mapping


def test_distilgpt2s_layers():
    assert layer_mapping(12, 6) == (0, 2, 4, 7, 9, 11)


def test_halves_round_up_throughout():
    assert layer_mapping(4, 3) == (0, 2, 3)  # 1.5 -> 2
    assert layer_mapping(6, 3) == (0, 3, 5)  # 2.5 -> 3, where round() says 2


def test_one_layer_is_the_last():
    assert layer_mapping(5, 1) == (4,)


@settings(deadline=None)
@given(st.integers(1, 64), st.data())
def test_spread_evenly_from_first_to_last(teacher, data):
    student = data.draw(st.integers(1, teacher))
    layers = layer_mapping(teacher, student)
    assert len(layers) == student and layers[-1] == teacher - 1
    if student == teacher:
        assert layers == tuple(range(teacher))
    if student > 1:
        assert layers[0] == 0
        gaps = [b - a for a, b in pairwise(layers)]
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("student", [0, 5])
def test_impossible_depths(student):
    with pytest.raises(ValueError, match=f"student_layers={student}: must lie between 1 and the teacher's 4"):
        layer_mapping(4, student)
