"""One study of a batch: a scan, what is asked of it, and the name of its masks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mome.inference.fingerprint import model_fingerprint, scan_identity
from mome.inference.segmenter import Segmenter
from mome.inference.statistics import statistics_name
from mome.inference.study_files import file_names
from mome.volumes.dicom import DEFAULT_DICOM, DicomOptions
from mome.volumes.mask_names import file_part, mask_paths
from mome.volumes.writers.base import MaskWriter, build_writer, one_file_per_structure


@dataclass(frozen=True)
class Study:
    """A scan and what is asked of it.

    Attributes:
        name: Its name in the report; the part of its masks' file names is made from it.
        scan: A file, a DICOM folder or a ZIP archive.
        prompts: The prompts.
        multilabel: Write one map of ids instead of a mask per prompt.
        writer: A name from `mome.volumes.WRITERS`, or a config string of one.
        frame: The volume to take from a 4-D file, from 0.
        dicom: Which DICOM series is read and what is accepted.
        statistics: Measure every mask on its scan.
        files: Kinds of files beside the masks, names of `mome.inference.study_files.KINDS`.
    """

    name: str
    scan: Path
    prompts: tuple[str, ...]
    multilabel: bool = False
    writer: str = "nifti"
    frame: int | None = None
    dicom: DicomOptions = DEFAULT_DICOM
    statistics: bool = False
    files: tuple[str, ...] = ()

    @property
    def statistics_file(self) -> str:
        """The name of the file of its statistics."""
        return statistics_name(file_part(self.name))

    def file_paths(self, out: Path, structures: list[str]) -> list[Path]:
        """Returns the paths of the files beside its masks."""
        return [out / name for name in file_names(self.files, file_part(self.name), structures)]

    def mask_writer(self) -> MaskWriter:
        """Returns the writer of its masks.

        Raises:
            InputError: There is no such writer.
        """
        return build_writer(self.writer)

    def masks(self, out: Path, structures: list[str]) -> list[Path]:
        """Returns the paths of its masks.

        Raises:
            InputError: Two structures give one file name, or the writer cannot write this.
        """
        writer = self.mask_writer()
        separate = one_file_per_structure(writer, multilabel=self.multilabel)
        return mask_paths(out, file_part(self.name), structures, ending=writer.ending, separate=separate)


class Requests:
    """What determines the masks of studies, for comparison with the entries of a report.

    Args:
        segmenter: The model and its settings; they are read once.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self._model = model_fingerprint(segmenter.model)
        self._settings = segmenter.mask_settings()

    def of(self, study: Study) -> dict[str, Any]:
        """Returns `prompts`, `multilabel`, `writer`, `model` and `settings` of a study, as in the report.

        `statistics` and `file_kinds` are among them where they are asked for.
        """
        return {
            "prompts": list(study.prompts),
            "multilabel": study.multilabel,
            "writer": study.writer,
            "model": self._model,
            "settings": {**self._settings, "frame": study.frame, "dicom": asdict(study.dicom)},
            **({"statistics": True} if study.statistics else {}),
            **({"file_kinds": list(study.files)} if study.files else {}),
        }

    def of_scan(self, study: Study) -> dict[str, Any]:
        """Returns what `of` does, with the `name` of the study and the identity of its `scan`."""
        return {"name": study.name, **self.of(study), "scan": scan_identity(study.scan)}
