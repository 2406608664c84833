"""The Segmenter: a model loaded once, then scans and prompts in, masks on the scans' own grids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mome.errors import InputError
from mome.inference.check_arguments import check_numbers, check_prepared, check_scan
from mome.inference.compiled import CompiledPredictor
from mome.inference.decoded_at_once import decoded_at_once
from mome.inference.disagreement import RouterWatch, on_scan
from mome.inference.doubtful_anatomy import upside_down
from mome.inference.doubtful_masks import filled_masks
from mome.inference.eval_mode import evaluating, in_evaluation_mode
from mome.inference.fingerprint import predictor_settings
from mome.inference.first_tile import FirstTile
from mome.inference.loaded_scan import LoadedScan, load_scan
from mome.inference.memory_plan import MemoryPlan
from mome.inference.mirror import MirrorPredictor, read_axes, with_mirrored_rows
from mome.inference.network import check_default_device, checked_device, network_and_processor, without_float16
from mome.inference.phases import Phases
from mome.inference.precision import PRECISIONS, chosen_precision, limit_compiled_products
from mome.inference.predictor import ModelPredictor, Predictor
from mome.inference.prepared import PreparedPrompts
from mome.inference.probabilities import asked_names
from mome.inference.result import Segmentation
from mome.inference.scan_memory import ScanMemory
from mome.inference.statistics import scan_statistics
from mome.inference.stream import wanted_tiles
from mome.inference.tiles import tile_steps
from mome.inference.within_memory import predict_within_memory
from mome.memory import parse_bytes
from mome.postprocess.rules import are_asked_by_name, asked_rules
from mome.postprocess.run import PostProcessing
from mome.processing import LARGEST_ROTATION_DEG, MoMEProcessor
from mome.processor_settings import implausible_settings
from mome.prompts import Prompt, embed_prompts, understand
from mome.volumes import Volume
from mome.volumes.dicom import DEFAULT_DICOM, DicomOptions
from mome.volumes.mask_names import structure_parts

if TYPE_CHECKING:
    from mome.modeling import MoME


class Segmenter:
    """Segments scans by text prompts.

    Args:
        model: A MoME, one inside `DataParallel` or `DistributedDataParallel`, or what `MoME.from_pretrained` accepts.
            One in float16 that is on the CPU is copied to float32. It runs in evaluation mode, and is afterwards in the
            mode that it was in.
        processor: The model's processor. Where None, it is the model's attribute `processor`, else the one saved with
            the model.
        overlap: The share of a tile that its neighbour covers too, 0 to 0.9; None for the processor's.
        device: A torch device such as "cuda"; where None, the model stays where it is.
        precision: `fp32`, `bf16` or `fp16` inside the network (`bf16` on the CPU: inside the encoder), or `auto`;
            see `mome.inference.precision`.
        prompt_chunk: Prompts that are decoded at once; a smaller number needs less memory.
        exact: Look at the whole scan, and keep sums of logits in float32. Otherwise they are kept in float16 where it
            holds them, and tiles without a part of the patient are left out: what lies in air is background without a
            look (`mome.inference.body_mask`). Of a turned scan, air beside the patient is left out either way
            (`mome.inference.scan_grid`).
        memory: The memory that the process may take, as in "4GB" or a number of bytes; what is free where None.
        mirror: Axes along which tiles are mirrored too, `lr`, `ap`, `si`, several with commas, or `all`; the logits are
            averaged (`mome.inference.mirror`). Each axis doubles the time.
        compile: Compile the head and, except in bf16 on the CPU, the encoder, which takes a minute or two; see
            `mome.inference.compiled`.
        postprocess: Rules that change the masks: a config string such as `largest_component` for every mask,
            `spinal_cord=keep_near(mm=10)`, a list of these, `rules` or `none` (`mome.postprocess.rules.asked_rules`).
            None for the rules of the checkpoint's processor, of which there may be none.

    Attributes:
        predictor: Computes the logits of a tile; see `mome.inference.predictor`.
        notes: Sentences about the model, which every result repeats.
        network_bytes: What the network takes for a tile beside its logits, measured with the first scan; None before.

    Raises:
        InputError: The model is no MoME, has no values or no processor, or a value is out of range.
    """

    def __init__(
        self,
        model: MoME | str | Path,
        processor: MoMEProcessor | None = None,
        *,
        overlap: float | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
        prompt_chunk: int = 32,
        exact: bool = False,
        memory: str | int | None = None,
        mirror: str | None = None,
        compile: bool = False,
        postprocess: str | Sequence[str] | None = None,
    ) -> None:
        check_default_device()
        check_numbers(overlap, prompt_chunk)
        limit_compiled_products()
        self.mirror = read_axes(mirror) if mirror else ()
        chosen = None if device is None else checked_device(device)  # before the model is loaded, which takes longer
        network, processor = network_and_processor(model, processor, chosen)
        place = ModelPredictor(network).device
        precision = chosen_precision(precision, network, place)
        network, autocast, notes = without_float16(network, place, PRECISIONS[precision])
        self.model, self.processor = network, processor
        self.overlap = processor.overlap if overlap is None else float(overlap)  # reports hold it as JSON
        self.precision, self.prompt_chunk, self.exact = precision, prompt_chunk, exact
        self.memory = None if memory is None else parse_bytes(str(memory), "memory")
        with evaluating(self.model):  # a compiled predictor runs it once
            self.predictor: Predictor = (CompiledPredictor if compile else ModelPredictor)(self.model, autocast)
        if self.mirror:
            self.predictor = MirrorPredictor(self.predictor, self.mirror, processor.orientation)
        self.postprocess = asked_rules(postprocess, processor.postprocess)
        self._asks_rules = are_asked_by_name(postprocess)
        self.network_bytes: int | None = None
        self.notes = (*getattr(network, "load_notes", ()), *notes)

    def mask_settings(self) -> dict[str, Any]:
        """Returns all settings that may change a mask, as JSON; a folder run is resumed only where they are the same.

        The model is not among them: `mome.inference.fingerprint.model_fingerprint` stands for it. Whoever adds an
        option that changes masks adds it here. `prompt_chunk` and the device change none.
        """
        in_the_encoder = self.precision == "bf16" and self.predictor.device.type == "cpu"
        return {
            "overlap": self.overlap,
            "tiles": "in even steps",
            "precision": f"{self.precision} in the encoder" if in_the_encoder else self.precision,
            "exact": self.exact,
            "sums": "float32" if self.exact else "float16 where it holds them",
            "predictor": predictor_settings(self.predictor, self.model),
            "processor": self.processor.settings(),
            "grid": f"upright around the patient where turned by more than {LARGEST_ROTATION_DEG:g} degrees",
            **({"extend_mm": self.processor.extend_mm} if self.processor.extend_mm else {}),
            **({"postprocess": self.postprocess} if self.postprocess else {}),
        }

    def load(
        self,
        scan: str | Path | Volume,
        *,
        frame: int | None = None,
        dicom: DicomOptions = DEFAULT_DICOM,
        on_phase: Callable[[str], None] | None = None,
    ) -> LoadedScan:
        """Reads a scan and brings it to the network grid, for `segment`; it may run in another thread.

        Args:
            scan, frame, dicom: As for `segment`.
            on_phase: Called with `read` and `resample` when that phase begins.

        Raises:
            InputError: The scan cannot be read, or its network grid is too large.
        """
        patch = None if self.exact else self.predictor.patch_size
        return load_scan(
            scan, self.processor, patch=patch, overlap=self.overlap, frame=frame, dicom=dicom, on_phase=on_phase
        )

    def has_room_for_another(self, loaded: LoadedScan, prompts: int) -> bool:
        """Says whether memory suffices to read a scan as large as another one while that is segmented.

        Args:
            loaded: The other scan.
            prompts: Number of its prompts.
        """
        memory = ScanMemory(
            loaded,
            self.predictor,
            prompts,
            limit=self.memory,
            chunk=self.decoded_at_once,
            exact=self.exact,
            reserved=loaded.nbytes,
            source=None,
        )
        return memory.leaves_reserved(self.network_bytes or 0)

    def understand(self, prompts: str | Sequence[str]) -> list[Prompt]:
        """Returns the prompts as the model understands them, each once; no network runs.

        Raises:
            InputError: There is no prompt, one is empty, two masks would have the same file name, or a rule of
                post-processing reads a structure that is not among the prompts.
        """
        understood = understand([prompts] if isinstance(prompts, str) else list(prompts), self.model)
        once = list({prompt.name: prompt for prompt in reversed(understood)}.values())[::-1]
        structure_parts([prompt.name for prompt in once])
        self._postprocessing([prompt.name for prompt in once])
        return once

    def _postprocessing(self, names: Sequence[str]) -> PostProcessing:
        return PostProcessing(self.postprocess, names, leave_out=not self._asks_rules)

    @in_evaluation_mode
    def prepare(self, prompts: str | Sequence[str] | Sequence[Prompt]) -> PreparedPrompts:
        """Understands and embeds prompts once; the result may be passed to `segment` for any number of scans.

        Args:
            prompts: Texts, or what `understand` returned.

        Raises:
            InputError: As for `understand`, or a prompt cannot be embedded.
        """
        if prompts is None:
            raise InputError("no prompt was given", hint="segment(scan, ['liver'])")
        given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        are_understood = bool(given) and all(isinstance(prompt, Prompt) for prompt in given)
        understood = given if are_understood else self.understand(given)
        text_PT = embed_prompts(understood, self.model)
        if self.mirror:
            text_PT = with_mirrored_rows(text_PT, understood, self.model, self.mirror)
        return PreparedPrompts(understood, text_PT, self.model, self.mirror)

    @in_evaluation_mode
    def segment(
        self,
        scan: str | Path | Volume,
        prompts: str | Sequence[str] | PreparedPrompts,
        *,
        frame: int | None = None,
        dicom: DicomOptions = DEFAULT_DICOM,
        probabilities: bool | Sequence[str] = False,
        disagreement: bool = False,
        progress: Callable[[int, int], None] | None = None,
        statistics: bool = False,
        loaded: LoadedScan | None = None,
        reserved_bytes: int = 0,
    ) -> Segmentation:
        """Returns masks of the prompts on the scan's own grid.

        All prompts share one encoder pass per tile. Logits are averaged over tiles, resampled by affine and
        thresholded at 0. A prompt that is given twice is segmented once.

        Args:
            scan: A file or DICOM folder (see `mome.volumes.read_volume`), a ZIP archive of one, or a Volume in HU.
            prompts: Names, synonyms, free text where the model's text encoder can embed it, or what `prepare` returned.
            frame: The volume to take from a 4-D file, from 0.
            dicom: Which DICOM series is read and what is accepted.
            probabilities: True, or names of prompts: their probabilities become `Segmentation.probabilities`; they are
                those before post-processing.
            disagreement: Draw how much the routers disagree, as `Segmentation.disagreement`.
            progress: Called with (tiles done, number of tiles).
            statistics: Measure every mask on the scan; see `Segmentation.statistics`.
            loaded: What `load` returned for the same scan; None to read it now.
            reserved_bytes: Memory that is left free where possible, as for a scan that is read meanwhile.

        Raises:
            InputError: The scan is of another type or cannot be read, a prompt cannot be embedded or was embedded for
                another model, the logits are not finite, memory does not suffice, or no router can disagree.
        """
        check_default_device()
        phases = Phases()
        check_scan(scan, frame, dicom)
        prepared = prompts if isinstance(prompts, PreparedPrompts) else self.prepare(prompts)
        check_prepared(prepared, self.model, self.mirror)
        phases.end("prompts")
        ready = loaded or self.load(scan, frame=frame, dicom=dicom)
        phases.include(ready.seconds)
        volume, wanted = ready.volume, ready.wanted
        source = None if isinstance(scan, Volume) else Path(scan)
        predictor = self.predictor
        steps = tile_steps(ready.whole.shape, predictor.patch_size, self.overlap)
        if isinstance(predictor, MirrorPredictor):
            predictor = predictor.for_volume(ready.whole.shape)
        memory = ScanMemory(
            ready,
            predictor,
            len(prepared.names),
            limit=self.memory,
            chunk=self.decoded_at_once,
            exact=self.exact,
            reserved=reserved_bytes,
            source=source,
            disagreement=disagreement,
        )
        known = self.network_bytes
        counted = known or 0
        plan = memory.plan(counted)

        def plan_for(network_bytes: int) -> MemoryPlan:
            nonlocal counted
            counted = network_bytes
            if not reserved_bytes:  # else a part of it may be another scan's
                self.network_bytes = network_bytes
            return memory.plan(network_bytes)

        watch = RouterWatch(predictor, self.model, ready.array.shape[2:], ready.origin) if disagreement else None
        with watch or nullcontext():
            masks, maps, memory_notes = predict_within_memory(
                watch or predictor,
                ready.array,
                ready.network,
                volume.grid,
                prepared,
                plan,
                asked=asked_names(probabilities, prepared.names),
                steps=steps,
                wanted=wanted,
                origin=ready.origin,
                progress=progress,
                phases=phases,
                first_tile=None if known is not None else FirstTile(plan, plan_for, reserved_bytes),
                in_float32=lambda: memory.plan(counted, in_float32=True),
            )
        rules = self._postprocessing(prepared.names)
        changes = rules.run(masks, volume.grid)
        if self.postprocess:
            phases.end("postprocess")
        measured = scan_statistics(masks, volume) if statistics else None
        doubtful = (*filled_masks(masks, volume.array), *upside_down(masks, volume.grid))
        notes = (
            *volume.notes,
            *self.notes,
            *memory_notes,
            *(what for _, what in implausible_settings(self.processor.settings())),
            *doubtful,
            *rules.notes,
            *changes,
            *(watch.notes() if watch else ()),
        )
        name = Path(str(getattr(self.model.config, "name_or_path", "") or "")).name
        return Segmentation(
            prepared.prompts,
            masks,
            volume.grid,
            volume.header,
            phases.seconds,
            notes,
            source,
            maps,
            model=name,
            scan_digest=ready.digest,
            statistics=measured,
            disagreement=None if watch is None else on_scan(watch.result(), ready.network, volume.grid),
            tiles=(
                len(wanted_tiles(ready.network.shape, predictor.patch_size, steps, wanted)),
                len(wanted_tiles(ready.whole.shape, predictor.patch_size, steps)),
            ),
            doubts=(*volume.notes, *doubtful),
        )

    @property
    def decoded_at_once(self) -> int:
        """Returns how many prompts are decoded at once where memory allows; see `mome.inference.decoded_at_once`."""
        return decoded_at_once(self.prompt_chunk, self.model, self.predictor.device)
