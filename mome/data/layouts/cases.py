"""The layout of this project: `images/`, `labels/` and `cases.json`; see `mome.data.case_folder`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mome.data.case import Case
from mome.data.case_folder import cases_of_folder
from mome.data.layouts.base import Layout
from mome.errors import InputError
from mome.labels import LabelMap


class Cases(Layout):
    """images/<case>, labels/<case> and cases.json, which says what is annotated in each case."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The layout has no settings."""

    shape: ClassVar[str] = "images/<case>.nii.gz, labels/<case>.nii.gz, cases.json"

    def __init__(self, config: Config) -> None:
        pass

    def cases(self, folder: Path, dataset: LabelMap | None) -> list[Case]:
        if dataset is None:
            other = "layout nnunet" if (folder / "dataset.json").is_file() else "another layout (mome data list)"
            raise InputError(
                "layout 'cases' needs a data set, whose numbers its label maps use",
                where=str(folder),
                hint=f"dataset openkbp, or {other}",
            )
        return cases_of_folder(folder, dataset)
