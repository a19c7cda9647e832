"""Wrong values are told in weft's own words, whatever they are and wherever they stand."""

from __future__ import annotations

import pytest

import weft
from tests.helpers.allowed import ALLOWED
from tests.helpers.wrong_values import OF_DATA, is_own, raw_errors


@pytest.mark.parametrize("size", [250, pytest.param(20_000, marks=pytest.mark.long)])
def test_random_values_for_options_and_data_give_no_raw_errors(size: int) -> None:
    found = raw_errors(seed=7, size=size)
    assert not found, "\n".join(f"{place}: {texts[:3]}" for place, texts in found.items())


def test_a_raw_error_is_told_from_one_of_ours() -> None:
    with pytest.raises(ValueError) as ours:
        weft.TrainerConfig(epochs=-1)
    with pytest.raises(AttributeError) as raw:
        weft.config.complaints(int, 3)  # type: ignore[arg-type]
    assert is_own(ours.value) and not is_own(raw.value)


def test_what_each_option_allows_is_written_down_a_second_time() -> None:
    assert {*weft.TrainerConfig.__dataclass_fields__, *OF_DATA} == set(ALLOWED)
    defaults = {**vars(weft.TrainerConfig()), **{name: getattr(weft.Data({"x": [1.0]}), name) for name in OF_DATA}}
    assert all(ALLOWED[name](value) for name, value in defaults.items())
    assert not any(rule(object()) or rule(float("nan")) or rule([None]) for rule in ALLOWED.values())
