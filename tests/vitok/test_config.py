import dataclasses
import json
from pathlib import Path

import pytest

from vitok.config import (
    config,
    describe_difference,
    flatten,
    parse_config,
    read_config,
    to_dict,
    write_config,
)


@config
class Wheel:
    """A wheel.

    Attributes:
        radius: in metres.
        spokes: numbers of the spokes.
    """

    radius: float
    spokes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ValueError(f"radius={self.radius} must be positive")


@config
class Cart:
    """A cart.

    Attributes:
        name: its name.
        wheels: one or more wheels.
        spare: one wheel more.
        limits: lower and upper.
    """

    name: str
    wheels: tuple[Wheel, ...]
    spare: Wheel
    limits: tuple[float, float] = (0.9, 0.95)


CART = Cart(
    name="red",
    wheels=(Wheel(radius=0.5), Wheel(radius=1.0, spokes=(7,))),
    spare=Wheel(radius=0.1, spokes=()),
)


def test_a_config_survives_json_with_its_tuples(tmp_path: Path) -> None:
    write_config(tmp_path / "cart.json", CART)
    loaded = read_config(tmp_path / "cart.json", Cart)
    assert loaded == CART
    assert isinstance(loaded.wheels, tuple)
    assert isinstance(loaded.wheels[1], Wheel)
    assert (loaded.wheels[1].spokes, loaded.spare.spokes) == ((7,), ())
    assert hash(loaded) == hash(CART)


def test_a_config_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CART.name = "blue"
    with pytest.raises(TypeError):
        Wheel(0.5)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("colour",), "red", "colour: "),
        (("spare", "hub"), 3, "spare.hub: "),
        (("wheels", 1, "hub"), 3, "wheels.1.hub: "),
        (("spare", "radius"), "wide", "spare.radius: "),
        (("limits",), [1.0], "limits.1: Field required"),
        (("spare", "radius"), -1.0, "radius=-1.0 must be positive"),
    ],
)
def test_reading_names_the_field_that_is_unknown_or_wrong(
    tmp_path: Path, path: tuple[str | int, ...], value: object, named: str
) -> None:
    fields = node = to_dict(CART)
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    file = tmp_path / "cart.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="is no Cart: ") as error:
        read_config(file, Cart)
    assert named in str(error.value)
    assert str(file) in str(error.value)


def test_a_missing_field_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^here is no Wheel: radius: "):
        parse_config(Wheel, {}, "here")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        read_config(tmp_path / "broken.json", Wheel)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        read_config(tmp_path / "absent.json", Wheel)


def test_flat_names_lead_to_every_field():
    assert flatten(CART) == {
        "name": "red",
        "wheels.0.radius": 0.5,
        "wheels.0.spokes": [1, 2],
        "wheels.1.radius": 1.0,
        "wheels.1.spokes": [7],
        "spare.radius": 0.1,
        "spare.spokes": [],
        "limits": [0.9, 0.95],
    }


def test_difference_lists_the_fields_that_changed_and_no_other():
    assert describe_difference(CART, CART) == []
    other = dataclasses.replace(
        CART, limits=(0.0, 0.95), wheels=(CART.wheels[0], Wheel(radius=2.0, spokes=(7,)))
    )
    assert describe_difference(CART, other) == [
        "limits: [0.9, 0.95] -> [0.0, 0.95]",
        "wheels.1.radius: 1.0 -> 2.0",
    ]
    fewer = dataclasses.replace(CART, wheels=CART.wheels[:1])
    assert describe_difference(CART, fewer) == [
        "wheels.1.radius: 1.0 -> None",
        "wheels.1.spokes: [7] -> None",
    ]
