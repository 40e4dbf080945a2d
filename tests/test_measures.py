"""Measures of pictures: the level of an outline, fronts of true, two-faced and faceless objects."""

import math

import pytest
import torch

from scaledreamer.camera.poses import orbit
from scaledreamer.eval.front_colours import front_colour_metrics, inner_mask
from scaledreamer.eval.fronts import front_azimuths, front_metrics, without_front
from scaledreamer.eval.picture_level import picture_level
from scaledreamer.eval.truth import ToyScene
from scaledreamer.toybox.captions import object_of
from scaledreamer.toybox.objects import COLORS, WITH_A_FRONT, ToyObject
from scaledreamer.toybox.renders import render_object


class TwoFaced(ToyObject):
    def distances(self, p):
        return super().distances(torch.cat([p[:, :1].abs(), p[:, 1:]], 1))


def around(obj):
    return render_object(obj, orbit(24), 64).over(torch.ones(3)).movedim(-1, 1)


@pytest.mark.parametrize("color", list(COLORS))
@pytest.mark.parametrize("shape", list(WITH_A_FRONT))
def test_fronts_of_true_two_faced_and_faceless_objects(shape, color):
    text = f"a {color} {shape}"
    obj = object_of(text)
    right, two, none = around(obj), around(TwoFaced(obj.shapes)), around(without_front(obj))
    assert [front_metrics(x, text)["fronts"] for x in (right, two, none)] == [1, 2, 0]
    assert front_metrics(right, text)["front_right"] == 1
    turned = front_metrics(right.roll(12, 0), text)
    assert (turned["fronts"], turned["front_right"], turned["janus"]) == (1, 0, 0)


def test_fronts_near_a_clearer_one_are_the_same():
    assert front_azimuths(torch.tensor([0.9, 0.7, 0.1, 0.6, 0.1, 0.1, 0.1, 0.8])) == [0, 135]
    assert front_azimuths(torch.zeros(8)) == []


def test_the_level_of_the_picture():
    scene, beta = ToyScene([]), 1 / 60
    level = picture_level(scene, beta)
    depth = math.exp(-level / beta) * math.sqrt(math.pi * 0.6 / (2 * beta))
    assert depth == pytest.approx(math.log(2))
    assert ((0.6 - level) / 0.6) ** 3 == pytest.approx(0.81, abs=0.01)


@pytest.mark.parametrize("color", list(COLORS))
@pytest.mark.parametrize("shape", list(WITH_A_FRONT))
def test_colours_of_a_front_of_true_two_faced_and_faceless_objects(shape, color):
    text = f"a {color} {shape}"
    obj = object_of(text)
    right, two, none = (
        front_colour_metrics(around(x), text)
        for x in (obj, TwoFaced(obj.shapes), without_front(obj))
    )
    assert right == {"front_amount": 1, "front_excess": 0}
    assert two["front_amount"] > 0.9 and two["front_excess"] > 0.4
    assert none["front_amount"] < 0.05 and abs(none["front_excess"]) < 0.05


@pytest.mark.parametrize("text", ["a purple head", "a orange house", "a blue snowman"])
def test_a_smeared_front_is_neither_a_front_nor_no_front(text):
    right, inside = around(object_of(text)), inner_mask(text, 24, 64)
    smeared = right.clone()
    for picture, where in zip(smeared, inside):
        pixels = picture[:, where]
        order = torch.randperm(pixels.shape[1], generator=torch.Generator().manual_seed(0))
        picture[:, where] = pixels[:, order]
    assert front_metrics(smeared, text)["fronts"] == 0
    found = front_colour_metrics(smeared, text)
    assert found["front_amount"] == pytest.approx(1) and found["front_excess"] == 0
    assert front_colour_metrics(right.roll(12, 0), text)["front_amount"] < 0.05


def test_an_object_without_a_front_has_no_amount_of_it():
    text = "a red ball"
    assert front_colour_metrics(around(object_of(text)), text)["front_amount"] is None
