"""What a run puts on objects is taken off at its end, and lifted for a while where a user's own code runs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler

from trimtab.pipelines.graph import freeze
from trimtab.pipelines.interception import tap_call, tap_scheduler
from trimtab.pipelines.taps import Taps, set_attribute


def test_lifted_an_object_is_as_it_was_and_afterwards_as_before() -> None:
    thing, layer, scheduler = SimpleNamespace(colour="red"), torch.nn.Linear(2, 2), DDIMScheduler()
    before = [dict(vars(one)) for one in (thing, layer, scheduler)]
    with Taps() as taps:
        set_attribute(taps, thing, "colour", "blue")
        set_attribute(taps, thing, "size", 2)
        freeze(taps, layer)
        tap_call(taps, layer, lambda module, original, args, kwargs: "tapped")
        tap_scheduler(taps, scheduler, lambda scheduler, bound, original: "tapped", lambda *given: None)
        with taps.lifted():
            assert [dict(vars(one)) for one in (thing, layer, scheduler)] == before
            assert layer.weight.requires_grad and type(scheduler).step is DDIMScheduler.step
        assert vars(thing) == {"colour": "blue", "size": 2}
        assert str(layer(torch.ones(1, 2))) == "tapped" and not layer.weight.requires_grad
        assert str(scheduler.step(torch.ones(1), 2, torch.ones(1))) == "tapped"
    assert [dict(vars(one)) for one in (thing, layer, scheduler)] == before and layer.weight.requires_grad


def test_a_copy_of_a_scheduler_that_was_made_before_is_followed_again_afterwards() -> None:
    scheduler = DDIMScheduler()
    with Taps() as taps:
        tap_scheduler(taps, scheduler, lambda scheduler, bound, original: "tapped", lambda *given: None)
        twin = copy.deepcopy(scheduler)
        with taps.lifted():
            assert type(copy.deepcopy(scheduler)) is DDIMScheduler
        assert str(twin.step(torch.ones(1), 2, torch.ones(1))) == "tapped"


def test_what_others_changed_meanwhile_is_theirs() -> None:
    thing = SimpleNamespace()
    with Taps() as taps:
        set_attribute(taps, thing, "colour", "blue")
        set_attribute(taps, thing, "size", 2)
        thing.colour = "green"
        with taps.lifted():
            assert vars(thing) == {"colour": "green"}
            thing.size = 3
        assert vars(thing) == {"colour": "green", "size": 2}
    assert vars(thing) == {"colour": "green", "size": 3}
