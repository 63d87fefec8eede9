"""The conditioning vector: what is unknown is said to be unknown, and nothing else of it can be read from the rest."""

from __future__ import annotations

import pytest

from models.condition import NAMES, Conditions, vector

EFFECTIVE = ("log_effective_dose", "relaxivity", "agent_known")


def values(field: float | None, agent: str | None, dose: float | None) -> dict[str, float]:
    made = vector(Conditions(field, agent, dose, "MPRAGE", 0.03, (0.35, 0.25, 0.15), (1.0, 1.0, 1.0)))
    return dict(zip(NAMES, made.tolist(), strict=True))


def test_a_known_acquisition_has_all_known_bits() -> None:
    known = values(3.0, "gadobutrol", 0.033)
    assert [known[name] for name in ("field_known", "dose_known", "agent_known")] == [1, 1, 1]
    assert known["log_dose_fraction"] == pytest.approx(-1.1087, abs=1e-4)


@pytest.mark.parametrize(
    ("field", "agent", "dose"), [(None, "gadobutrol", 0.033), (3.0, None, 0.033), (3.0, "gadobutrol", None)]
)
def test_an_effective_dose_of_which_a_part_is_unknown_is_unknown(
    field: float | None, agent: str | None, dose: float | None
) -> None:
    made = values(field, agent, dose)
    assert [made[name] for name in EFFECTIVE] == [0, 0, 0]
