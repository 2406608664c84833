"""The steps of one study: open, read, segment, write. Each may run in another thread; errors become its entry."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mome.checksums import file_sha256
from mome.errors import InputError, OutputError, is_bug, lacks_memory
from mome.inference.loaded_scan import LoadedScan
from mome.inference.peak_memory import PeakMemory
from mome.inference.phases import Phases
from mome.inference.prepared import PreparedPrompts
from mome.inference.provenance import versions
from mome.inference.result import Segmentation
from mome.inference.segmenter import Segmenter
from mome.inference.statistics import scan_of_statistics, write_statistics
from mome.inference.study import Study
from mome.inference.study_files import reads_scan, segment_options, write_files
from mome.volumes import Volume
from mome.volumes.archives import Unpacked, is_archive, unpacked
from mome.volumes.mask_names import file_part

logger = logging.getLogger(__name__)


class StudyRun:
    """One study from its scan to its entry of the report.

    `load`, `segment` and `write` are called in this order, `close` at the end. Each returns nothing; where one fails,
    `failed` makes the entry and the rest is left out.

    Args:
        study: The study.
        out: The folder of the masks.
        request: What determines the masks, with the study's name and its scan's identity: the entry begins with it.
        memory: Counts the memory of all studies of the process that are in work.
        debug: Raise errors that are not the user's, with their traceback.

    Attributes:
        entry: The entry of the report, once `write` or `failed` has made it.
        phase: What is being done: `read`, `resample`, `network` or `write`.
    """

    def __init__(
        self, study: Study, out: Path, request: dict[str, Any], memory: PeakMemory, *, debug: bool = False
    ) -> None:
        self.study, self.request, self._memory = study, request, memory
        self.entry: dict[str, Any] | None = None
        self.phase = "read"
        self._out, self._debug = out, debug
        self._opened = contextlib.ExitStack()
        self._archive: Unpacked | None = None
        self._loaded: LoadedScan | None = None
        self._result: Segmentation | None = None
        self._volume: Volume | None = None

    def load(self, segmenter: Segmenter) -> None:
        """Unpacks and reads the scan, and brings it to the network grid.

        Raises:
            InputError: The scan cannot be read, or its masks cannot be written in this format.
            OutputError: The disk is full while an archive is unpacked.
        """
        self.phase, study = "read", self.study
        self._memory.begin(study.name)
        if is_archive(study.scan):
            self._archive = self._opened.enter_context(unpacked(study.scan, self._out))
        writer = study.mask_writer()
        writer.check_source(self._scan)
        loaded = segmenter.load(self._scan, frame=study.frame, dicom=study.dicom, on_phase=self._begin)
        self.phase = "read"
        writer.check_volume(loaded.volume)
        self._loaded = loaded

    def segment(
        self,
        segmenter: Segmenter,
        prompts: PreparedPrompts,
        progress: Callable[[int, int], None] | None,
        read_ahead: bool = False,
    ) -> None:
        """Runs the network; the scan that was read is dropped after it.

        Args:
            segmenter, prompts, progress: See `Segmenter.segment`.
            read_ahead: Another scan is read meanwhile. It is taken to be as large as this one.

        Raises:
            InputError: See `Segmenter.segment`.
        """
        self.phase = "network"
        loaded, self._loaded = self._loaded, None
        self._volume = loaded.volume if loaded is not None and reads_scan(self.study.files) else None
        self._result = segmenter.segment(
            self._scan,
            prompts,
            frame=self.study.frame,
            dicom=self.study.dicom,
            progress=progress,
            statistics=self.study.statistics,
            loaded=loaded,
            reserved_bytes=loaded.nbytes if read_ahead and loaded is not None else 0,
            **segment_options(self.study.files),
        )

    def write(self) -> None:
        """Writes the masks and makes the entry.

        Raises:
            InputError: The masks cannot be written in this format.
            OutputError: The disk is full, or the like.
        """
        self.phase, study, result = "write", self.study, self._result
        assert result is not None
        phases = Phases()
        part = file_part(study.name)
        result.model_version = self.request["model"]
        # The run has checked what it may replace.
        paths = result.save(self._out, part, multilabel=study.multilabel, writer=study.writer, overwrite=True)
        structures = result.summary()
        self._write_statistics(result.statistics or {}, paths)
        if result.statistics is not None:
            for structure in structures:
                structure["mean_hu"] = result.statistics[structure["name"]]["mean_hu"]
        files = write_files(study.files, result, self._volume, self._out, part)
        self._volume = None
        phases.end("write")
        notes = [*result.notes, *(self._archive.notes if self._archive else ())]
        seconds = {**result.seconds, **phases.seconds}
        self.entry = {
            **self.request,
            "status": "done",
            "masks": [path.name for path in paths],
            "mask_bytes": [path.stat().st_size for path in paths],
            "mask_sha256": [file_sha256(path) for path in paths],
            **({"files": [path.relative_to(self._out).as_posix() for path in files]} if files else {}),
            "structures": structures,
            "overlapping_voxels": result.overlapping_voxels,
            "notes": notes,
            "doubts": list(result.doubts),
            "seconds": round(sum(seconds.values()), 2),
            "phases": seconds,
            "tiles": list(result.tiles),
            **self._circumstances(),
        }
        self._result = None

    def _write_statistics(self, measured: dict[str, dict[str, Any]], masks: Sequence[Path]) -> None:
        """Writes the file of statistics; without new ones, those of masks that were replaced are removed from it."""
        path = self._out / self.study.statistics_file
        if not measured and scan_of_statistics(path) is None:  # there is none, or one of an earlier version
            return
        files = dict.fromkeys(measured, masks[0]) if len(masks) == 1 else dict(zip(measured, masks, strict=True))
        write_statistics(path, self.study.name, self.request["scan"], measured, files if measured else {})

    def entry_while_writing(self, masks: list[str]) -> dict[str, Any]:
        """Returns what the report says while masks of an earlier run are replaced, and after a process that is killed.

        Args:
            masks: Names of the files. They have no checksums: whether each was replaced already is not known.
        """
        reason, remedy = "the run ended while it wrote the masks", "run the same command with --resume"
        return {
            **self.request,
            "status": "failed",
            "masks": masks,
            "error": str(InputError(reason, hint=remedy)),
            "failure": {"phase": "write", "reason": reason, "remedy": remedy, "bug": False},
        }

    def failed(self, error: Exception) -> None:
        """Makes the entry of a study that failed.

        Raises:
            OutputError: It is one: the next study could not be written either.
            Exception: It is not the user's, and `debug` is set.
        """
        if isinstance(error, OutputError):
            raise error
        if self._archive is not None and isinstance(error, InputError):
            error = self._archive.renamed(error)
        if isinstance(error, InputError):
            text, reason, remedy = str(error), error.what, error.hint
        else:  # An error of one study must not lose the others.
            if self._debug:
                raise error
            logger.debug("%s failed", self.study.scan, exc_info=error)
            first_line = (str(error).strip().splitlines() or [""])[0][:200]
            text = reason = f"{type(error).__name__}: {first_line}"
            remedy = "look at the file and its disk, then run the same command with --resume"
            if is_bug(error):
                remedy = "run this study alone with --debug and report the traceback"
            elif lacks_memory(error):
                reason = "the memory of this machine is not enough"
                remedy = "a smaller scan, fewer prompts, or fewer programs beside this one"
                text = str(InputError(reason, hint=remedy))
        self.entry = {
            **self.request,
            "status": "failed",
            "error": text,
            "failure": {"phase": self.phase, "reason": reason, "remedy": remedy, "bug": is_bug(error)},
            **self._circumstances(),
        }

    def close(self) -> None:
        """Removes what was unpacked and drops what was read."""
        self._loaded = self._result = self._volume = None
        self._opened.close()

    @property
    def loaded(self) -> LoadedScan | None:
        """What `load` has read, until `segment` takes it."""
        return self._loaded

    @property
    def _scan(self) -> Path:
        return self.study.scan if self._archive is None else self._archive.path

    def _begin(self, phase: str) -> None:
        self.phase = phase

    def _circumstances(self) -> dict[str, Any]:
        ended = datetime.now(UTC).isoformat(timespec="microseconds")
        return {"ended": ended, "versions": versions(), **self._memory.end(self.study.name)}
