"""Runs many studies: reads the next scan and writes the last masks while the network is at work, and shares them.

Three threads take part. This one runs the network; a second one reads the next scan; a third one writes the masks of
the last study, then adds its entry to the report. So a study is in the report only once all its masks are on the disk.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mome.errors import InputError
from mome.inference.claims import TO_WRITE, WRITE_WAIT_S, Claims
from mome.inference.earlier_runs import run_that_wrote, runs_of
from mome.inference.one_thread import one_thread, submit, wait_for
from mome.inference.output_checks import has_results, refuse_masks_corrected_meanwhile
from mome.inference.peak_memory import PeakMemory
from mome.inference.prepared import PreparedPrompts
from mome.inference.report import Report, changed_masks
from mome.inference.segmenter import Segmenter
from mome.inference.study import Requests, Study
from mome.inference.study_run import StudyRun
from mome.prompts import Prompt
from mome.volumes.writers.base import one_file_per_structure

# How often studies that other processes hold are asked for.
_POLL_S = 0.3


class Batch:
    """One run over studies; see `mome.inference.segment_folder` for what its arguments mean.

    Args:
        segmenter: The model.
        studies: The studies; their names differ.
        understood: Prompts of a study → how the model understands them.
        requests: What determines the masks.
        report: The report in the folder of the masks.
        resume: Skip what is finished, and share the studies with other processes that resume in the same folder.
        overwrite: Replace masks that another run writes or somebody corrects meanwhile.
        part: (index, number) of this process among those that share the studies; it begins with every
            `number`-th study.
        read_ahead: Use the threads that read and write. A scan is read ahead only where memory suffices for it.
        progress, on_done, debug: See `segment_folder`.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        studies: Sequence[Study],
        understood: dict[tuple[str, ...], list[Prompt]],
        requests: Requests,
        report: Report,
        *,
        resume: bool,
        overwrite: bool = False,
        part: tuple[int, int] = (0, 1),
        read_ahead: bool = True,
        progress: Callable[[int, int], None] | None = None,
        on_done: Callable[[dict[str, Any]], None] | None = None,
        debug: bool = False,
    ) -> None:
        self._segmenter, self._studies, self._understood = segmenter, studies, understood
        self._requests, self._report, self._out = requests, report, report.path.parent
        self._resume, self._overwrite, self._debug = resume, overwrite, debug
        self._progress, self._on_done = progress, on_done
        self._threaded = read_ahead and len(studies) > 1
        own = list(studies[part[0] :: part[1]])
        names = {study.name for study in own}
        # The others come from the end, so that two processes seldom want the same study.
        self._pending = own + [study for study in reversed(studies) if study.name not in names]
        self._asked: dict[str, dict[str, Any]] = {}
        self._earlier = {name: [run.get("ended") for run in runs_of(entry)] for name, entry in report.entries.items()}
        self._claims, self._writes, self._memory = Claims(self._out), Claims(self._out, TO_WRITE), PeakMemory()
        self._prepared: dict[tuple[str, ...], PreparedPrompts] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._begun: list[str] = []  # names in the order in which `on_done` is called
        self._told = 0
        self._open: list[StudyRun] = []

    def run(self) -> list[dict[str, Any]]:
        """Runs the studies and returns their entries, in the order of the studies.

        After Ctrl-C or SIGTERM the study that is being written is finished; nothing else is.

        Raises:
            InputError: A prompt cannot be embedded, or another run writes other masks of the same studies.
            OutputError: A mask or the report cannot be written.
        """
        self._claims.remove_stale()
        self._writes.remove_stale()
        try:
            with contextlib.ExitStack() as stack:
                reader = stack.enter_context(one_thread("read")) if self._threaded else None
                writer = stack.enter_context(one_thread("write")) if self._threaded else None
                self._run_all(reader, writer)
        finally:
            for run in self._open:
                run.close()
            self._claims.release_all()
        return [self._entries[study.name] for study in self._studies]

    def _run_all(self, reader: ThreadPoolExecutor | None, writer: ThreadPoolExecutor | None) -> None:
        ahead: tuple[StudyRun, Future[None]] | None = None
        writing: Future[None] | None = None
        while True:
            current = ahead or self._load_next(reader)
            ahead = None
            if current is None:
                wait_for(writing)
                writing = None
                self._tell()
                current = self._load_next(reader, wait=True)
                if current is None:
                    self._tell()
                    return
            run, loading = current
            loaded = self._attempt(run, loading.result)
            if reader is not None and (not loaded or self._has_room_beside(run)):
                ahead = self._load_next(reader)
            is_reading = ahead is not None and not ahead[1].done()
            if loaded and self._segment(run, read_ahead=is_reading):
                wait_for(writing)
                self._tell()
                writing = submit(writer, self._write, run)
            elif run.entry is not None:
                wait_for(writing)  # the report has the studies in the order in which they were begun
                writing = None
                self._record(run)
            if writer is None:
                wait_for(writing)
                writing = None
            self._tell()

    def _load_next(
        self, reader: ThreadPoolExecutor | None, *, wait: bool = False
    ) -> tuple[StudyRun, Future[None]] | None:
        """Takes the next study and begins to read it; None where there is none that is free."""
        run = self._next(wait=wait)
        return None if run is None else (run, submit(reader, run.load, self._segmenter))

    def _has_room_beside(self, run: StudyRun) -> bool:
        """Says whether the next scan may be read while this one is segmented; it is taken to be as large."""
        prompts = len(self._understood[run.study.prompts])
        return run.loaded is not None and self._segmenter.has_room_for_another(run.loaded, prompts)

    def _next(self, *, wait: bool) -> StudyRun | None:
        """Returns the next study that this process may segment.

        Args:
            wait: Wait for studies that other processes hold: they finish them, or end.
        """
        while True:
            for study in list(self._pending):
                request = self._request(study)
                if self._resume:
                    if self._is_answered(study, request):
                        self._pending.remove(study)
                        continue
                    if not self._claims.take(study.name):
                        continue
                    if self._is_answered(study, request):  # it was finished before it was claimed
                        self._claims.release(study.name)
                        self._pending.remove(study)
                        continue
                self._pending.remove(study)
                self._begun.append(study.name)
                run = StudyRun(study, self._out, request, self._memory, debug=self._debug)
                self._open.append(run)
                return run
            if not wait or not self._pending:
                return None
            self._tell()
            time.sleep(_POLL_S)

    def _request(self, study: Study) -> dict[str, Any]:
        if study.name not in self._asked:
            self._asked[study.name] = self._requests.of_scan(study)
        return self._asked[study.name]

    def _is_answered(self, study: Study, request: dict[str, Any]) -> bool:
        """Says whether the report has the study's result, or another process failed on it during this run."""
        self._report.refresh()
        entry = self._report.entries.get(study.name)
        if entry is None:
            return False
        if has_results(entry, study, self._out, request):
            entry = self._kept(entry)
        elif not self._failed_elsewhere(entry, request):
            return False
        self._begun.append(study.name)
        self._entries[study.name] = {**entry, "skipped": True}
        return True

    def _failed_elsewhere(self, entry: dict[str, Any], request: dict[str, Any]) -> bool:
        is_new = entry.get("ended") is not None and entry["ended"] not in self._earlier.get(request["name"], ())
        same = all(entry.get(key) == value for key, value in request.items())
        return is_new and same and entry.get("status") == "failed"

    def _kept(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Returns the entry of a study that is finished, with a note on masks that somebody has changed since."""
        changed = changed_masks(entry, self._out)
        if not changed:
            return entry
        note = f"changed after they were written, and kept; volumes are those before the change: {', '.join(changed)}"
        if note not in entry["notes"]:
            entry = {**entry, "notes": [*entry["notes"], note]}
            self._report.add(entry["name"], entry)
        return entry

    def _attempt(self, run: StudyRun, step: Callable[..., None], *arguments: Any) -> bool:
        """Runs a step of a study; where it fails, the study gets its entry."""
        try:
            step(*arguments)
        except Exception as error:
            run.failed(error)
            return False
        return True

    def _segment(self, run: StudyRun, *, read_ahead: bool) -> bool:
        prompts = run.study.prompts
        if prompts not in self._prepared:
            # Embedding waits for the first scan that needs it: a finished run is resumed without the text encoder.
            self._prepared[prompts] = self._segmenter.prepare(self._understood[prompts])
        return self._attempt(run, run.segment, self._segmenter, self._prepared[prompts], self._progress, read_ahead)

    def _write(self, run: StudyRun) -> None:
        """Writes the masks of a study, and adds it to the report.

        No other run writes this study meanwhile: it would not know of masks that are no entry yet.
        """
        with self._writes.held(run.study.name, WRITE_WAIT_S):
            if self._resume and self._was_finished_meanwhile(run):
                self._close(run)
                return
            if not (self._resume or self._overwrite):
                self._refuse_masks_made_meanwhile(run)
            if self._overwrite or self._attempt(run, self._refuse_corrected_masks, run):
                self._tell_of_replacement(run)
                self._attempt(run, run.write)
            self._record(run)

    def _refuse_corrected_masks(self, run: StudyRun) -> None:
        run.phase = "write"
        self._report.refresh()
        masks = [self._out / name for name in self._mask_names(run.study)]
        refuse_masks_corrected_meanwhile(run.study, masks, self._report, resume=self._resume)

    def _tell_of_replacement(self, run: StudyRun) -> None:
        """Lets the report say that masks which it knows are being replaced.

        Else, after SIGKILL, the new masks would seem to be those of the earlier run, changed by somebody.
        """
        self._report.refresh()
        masks, entry = self._mask_names(run.study), self._report.entries.get(run.study.name, {})
        if any(run_that_wrote(entry, mask) for mask in masks):
            self._report.add(run.study.name, run.entry_while_writing(masks))

    def _mask_names(self, study: Study) -> list[str]:
        return [path.name for path in study.masks(self._out, [p.name for p in self._understood[study.prompts]])]

    def _refuse_masks_made_meanwhile(self, run: StudyRun) -> None:
        """Checks that no other run has written other masks of this study since this one began.

        Raises:
            InputError: One has: its masks would be replaced. The rest of this run would meet it, too.
        """
        self._report.refresh()
        study, entry = run.study, self._report.entries.get(run.study.name, {})
        writers = [run_that_wrote(entry, mask) for mask in self._mask_names(study)]
        known = self._earlier.get(study.name, ())
        new = [writer for writer in writers if writer and writer.get("ended") not in known]
        decisive = ["scan", "model", "settings"]
        if not one_file_per_structure(study.mask_writer(), multilabel=study.multilabel):
            decisive += ["prompts", "multilabel", "writer"]  # else structures of the other file would be lost
        if any(other.get(key) != run.request[key] for other in new for key in decisive):
            raise InputError(
                f"another run has meanwhile written other masks of {study.name!r:.60} into this folder",
                where=str(self._out),
                hint="another folder, or --overwrite (in Python overwrite=True)",
            )

    def _was_finished_meanwhile(self, run: StudyRun) -> bool:
        """Says whether a process that claims no studies finished this one meanwhile; then its result is kept."""
        self._report.refresh()
        entry = self._report.entries.get(run.study.name)
        if entry is None or not has_results(entry, run.study, self._out, run.request):
            return False
        self._entries[run.study.name] = {**entry, "skipped": True}
        return True

    def _record(self, run: StudyRun) -> None:
        assert run.entry is not None
        name = run.study.name
        # No report is begun where there is one scan only and it fails.
        if run.entry["status"] == "done" or len(self._studies) > 1 or self._report.entries:
            self._report.add(name, run.entry)
        self._entries[name] = run.entry
        self._close(run)

    def _close(self, run: StudyRun) -> None:
        run.close()
        self._open.remove(run)
        self._claims.release(run.study.name)

    def _tell(self) -> None:
        """Calls `on_done` for the studies that are finished, in the order in which they were begun."""
        while self._told < len(self._begun) and self._begun[self._told] in self._entries:
            entry = self._entries[self._begun[self._told]]
            self._told += 1
            if self._on_done is not None:
                self._on_done(entry)
