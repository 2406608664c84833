"""The processor checks its settings, and keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_in_models import Contrast
from transformers import AutoProcessor

from mome import MoME
from mome.errors import InputError
from mome.inference import Segmenter
from mome.processing import MoMEProcessor


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spacng": [1, 1, 1]}, "no setting 'spacng', did you mean 'spacing'"),
        ({"spacing": 1.5}, "three positive numbers"),
        ({"spacing": [1, 1, 0]}, "three positive numbers"),
        ({"spacing": [1, 1, float("nan")]}, "three positive numbers"),
        ({"spacing": ["1", 1, 1]}, "three positive numbers"),
        ({"hu_window": [250, -175]}, "low < high"),
        ({"hu_window": [1, 2, 3]}, "low < high"),
        ({"orientation": "RAL"}, "one of R/L, A/P and S/I each"),
        ({"orientation": "RA"}, "three letters"),
        ({"orientation": 3}, "three letters"),
        ({"padding_hu": "air"}, "a number of HU"),
        ({"overlap": 0.95}, "overlap is from 0 to 0.9"),
        ({"overlap": True}, "overlap is from 0 to 0.9"),
        ({"overlap": "half"}, "overlap is from 0 to 0.9"),
        ({"overlap": float("nan")}, "overlap is from 0 to 0.9"),
        ({"overlap": 10**400}, "overlap is from 0 to 0.9"),  # beyond every float, as JSON may hold it
        ({"extend_mm": -1}, "extend_mm is from 0 to 200 mm"),
        ({"extend_mm": 201}, "extend_mm is from 0 to 200 mm"),
        ({"extend_mm": "far"}, "extend_mm is from 0 to 200 mm"),
        ({"padding_hu": -(10**400)}, "padding_hu is a number"),
        ({"hu_window": [0, 10**400]}, "hu_window is"),
    ],
)
def test_a_processor_checks_its_settings(settings: dict, words: str, tmp_path: Path) -> None:
    MoMEProcessor().save_pretrained(tmp_path)
    (key, value), processor = next(iter(settings.items())), MoMEProcessor()
    for act in (
        lambda: MoMEProcessor(**settings),
        lambda: setattr(processor, key, value),
        lambda: MoMEProcessor.from_pretrained(tmp_path, **settings),
    ):
        with pytest.raises(InputError, match=words) as caught:
            act()
        assert len(str(caught.value).splitlines()) <= 3
    assert processor.settings() == MoMEProcessor.from_pretrained(tmp_path).settings()


def test_a_processor_is_loaded_without_a_model(tmp_path: Path) -> None:
    """A folder with preprocessor_config.json alone was refused, since it has no config.json."""
    saved = MoMEProcessor(spacing=[1, 2, 3])
    saved.save_pretrained(tmp_path / "processor")
    for name in (tmp_path / "processor", f"local-dir:{tmp_path / 'processor'}"):
        assert MoMEProcessor.from_pretrained(name).settings() == saved.settings()
    with pytest.raises(InputError, match="no config.json and no preprocessor_config.json"):
        MoMEProcessor.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"this is a file\n.*\n.*{tmp_path / 'processor'}$"):
        MoMEProcessor.from_pretrained(tmp_path / "processor" / "preprocessor_config.json")
    with pytest.raises(InputError, match="it has no config.json\n"):  # it is no model
        MoME.from_pretrained(tmp_path / "processor")


def test_the_auto_class_loads_a_processor_without_a_model(tmp_path: Path) -> None:
    """The settings name a file of the folder, which only a saved model had."""
    MoMEProcessor(spacing=[1, 2, 3]).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modeling_mome.py", "preprocessor_config.json"]
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.settings() == MoMEProcessor(spacing=[1, 2, 3]).settings()


def test_a_segmenter_refuses_a_folder_as_processor(tmp_path: Path) -> None:
    """It was an AttributeError about a method of str."""
    MoMEProcessor().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="processor is a MoMEProcessor, got str\n.*from_pretrained"):
        Segmenter(Contrast(thresholds=(0.5,)), str(tmp_path))


def test_processor_settings_can_be_changed(tmp_path: Path) -> None:
    processor = MoMEProcessor()
    processor.spacing = (1, 2, 3)
    processor.save_pretrained(tmp_path)
    again = MoMEProcessor.from_pretrained(tmp_path, hu_window=[-200, 300])
    assert again.spacing == [1.0, 2.0, 3.0] and again.hu_window == [-200.0, 300.0]
    again.save_pretrained(tmp_path)
    assert MoMEProcessor.from_pretrained(tmp_path).settings() == again.settings()


def test_the_overlap_is_saved_where_it_is_not_the_usual_one(tmp_path: Path) -> None:
    assert "overlap" not in MoMEProcessor().to_dict()
    MoMEProcessor(overlap=0.25).save_pretrained(tmp_path)
    assert MoMEProcessor.from_pretrained(tmp_path).overlap == 0.25
    assert MoMEProcessor.from_pretrained(tmp_path, overlap=0.5).overlap == 0.5
    file = tmp_path / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.25", "0.75"))
    with pytest.raises(InputError, match="overlap in preprocessor_config.json"):
        MoMEProcessor.from_pretrained(tmp_path)


def test_a_number_of_too_many_digits_is_refused(tmp_path: Path) -> None:
    """Python reads no whole number of more than 4300 digits; it was a traceback."""
    (tmp_path / "preprocessor_config.json").write_text(f'{{"overlap": 1{"0" * 5000}}}')
    with pytest.raises(InputError, match="preprocessor_config.json cannot be read: Exceeds the limit"):
        MoMEProcessor.from_pretrained(tmp_path)
