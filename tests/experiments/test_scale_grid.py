"""Which scale a curve of scores asks for next."""

import pytest

from corrsteer.experiments.scale_grid import LEAST, MOST, at_an_end, highest_reward, next_scale


@pytest.mark.parametrize(
    "scores, unsteered, asked",
    [
        ({0.5: 0.4, 1: 0.5, 2: 0.6}, 0.4, 4),  # still rising
        ({0.5: 0.5, 1: 0.7, 2: 0.6}, 0.4, None),  # it has turned
        ({0.5: 0.5, 1: 0.6, 2: 0.6}, 0.4, 4),  # a plateau, which may rise again
        ({0.5: 0.5, 1: 0.6, 2: 0.6, 4: 0.5}, 0.4, None),
        ({0.5: 0.3, 1: 0.1, 2: 0.0}, 0.4, 0.25),  # too strong by far
        ({0.5: 0.0, 1: 0.0, 2: 0.0}, 0.4, 0.25),
        ({0.5: 0.2, 1: 0.1, 2: 0.2}, 0.4, 0.25),
        ({0.25: 0.4, 0.5: 0.3, 1: 0.1, 2: 0.0}, 0.4, None),  # so weak that it does nothing
        ({0.25: 0.45, 0.5: 0.3, 1: 0.1, 2: 0.0}, 0.4, 0.125),
        ({0.5: 0.4, 1: 0.4, 2: 0.4}, 0.4, 4),  # nothing has happened yet
        ({0.5: 0.4, 1: 0.4, 2: 0.3}, 0.4, None),  # and now it has, for the worse
        ({-0.5: 0.4, -1: 0.5, -2: 0.6}, 0.4, -4),
        ({1: 0.4}, 0.4, 2),
    ],
)
def test_the_grid_grows_at_whichever_end_is_best_until_the_curve_turns(scores, unsteered, asked):
    assert next_scale(scores, unsteered, 1.0) == asked


def test_the_grid_ends_at_strengths_that_no_feature_has():
    assert next_scale({MOST / 2: 0.5, MOST: 0.6}, 0.4, 1.0) is None
    assert next_scale({LEAST: 0.6, 2 * LEAST: 0.5}, 0.4, 1.0) is None


def test_where_every_sample_has_the_highest_reward_no_scale_is_better():
    assert next_scale({1: 0.8, 2: 1.0}, 0.4, highest_reward([0, 1, 0.5])) is None
    assert next_scale({1: 0.8, 2: 1.0}, 0.4, highest_reward([0, 1, 1.5])) == 4
    assert next_scale({1: 0.0, 2: 0.0}, 0.0, highest_reward([0])) == 4, "right answers there were none yet"


def test_the_ends_of_the_grid_are_about_its_middle():
    assert next_scale({1e-3: 0.5, 2e-3: 0.6}, 0.4, middle=1e-3) == 4e-3
    assert next_scale({MOST: 0.5, 2 * MOST: 0.6}, 0.4, middle=MOST) == 4 * MOST
    assert at_an_end(2e-3, [1e-3, 2e-3]) and not at_an_end(2, [1, 2, 4]) and at_an_end(-4, [-1, -4])
