"""Reading YAML: which texts are numbers and booleans."""

from __future__ import annotations

from pathlib import Path

import pytest

from mome.errors import InputError
from mome.labels.dataset_file import open_dataset
from mome.yaml_file import read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10), ("0", 0), ("-5", -5), ("+3", 3), ("1_000", 1000), ("010", "010"), ("09", "09"), ("0x10", "0x10"),
        ("0b11", "0b11"), ("1:30", "1:30"), ("190:20:30", "190:20:30"), ("190:20:30.5", "190:20:30.5"),
        ("1.5", 1.5), ("-0.5", -0.5), (".5", 0.5), ("-.5", -0.5), ("1.", 1.0), ("1e3", 1000.0), ("1.5e-3", 0.0015),
        ("no", "no"), ("on", "on"), ("true", True), ("False", False), ("~", None), ("null", None), ("1.5.2", "1.5.2"),
    ],
)  # fmt: skip
def test_plain_values(text: str, value: object) -> None:
    found = read_yaml(f"key: {text}")["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", [".inf", "-.INF", ".nan"])
def test_numbers_that_are_not_finite_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="numbers are finite"):
        read_yaml(f"key: {text}")


def test_a_number_with_a_zero_before_it_is_not_read_as_another(tmp_path: Path) -> None:
    """In YAML 1.1, 010 is 8, and a label map would be read as another structure without a word."""
    (tmp_path / "mine.yaml").write_text("structures: {liver: 010}")
    with pytest.raises(InputError, match="liver is a positive whole number"):
        open_dataset(str(tmp_path / "mine.yaml"))
