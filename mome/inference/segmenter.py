"""The Segmenter: a model loaded once, then scans and prompts in, masks on the scans' own grids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mome.errors import InputError
from mome.inference.choose_model import choose_model
from mome.inference.disagreement import RouterWatch, on_scan
from mome.inference.doubtful_masks import filled_masks
from mome.inference.fingerprint import predictor_settings
from mome.inference.loaded_scan import LoadedScan, load_scan
from mome.inference.masks import predict_masks
from mome.inference.mirror import MirrorPredictor, read_axes, with_mirrored_rows
from mome.inference.network import unwrapped, without_float16
from mome.inference.phases import Phases
from mome.inference.precision import PRECISIONS, chosen_precision
from mome.inference.predictor import ModelPredictor, Predictor
from mome.inference.prepared import PreparedPrompts
from mome.inference.probabilities import ProbabilityMaps
from mome.inference.result import Segmentation
from mome.inference.statistics import scan_statistics
from mome.postprocess.rules import are_asked_by_name, asked_rules
from mome.postprocess.run import PostProcessing
from mome.processing import MoMEProcessor, processor_of
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
            One in float16 that is on the CPU is copied to float32.
        processor: The model's processor. Where None, it is the model's attribute `processor`, else the one saved with
            the model.
        overlap: The share of a tile that its neighbour covers too, 0 to 0.9.
        device: A torch device such as "cuda"; where None, the model stays where it is.
        precision: `fp32`, `bf16` or `fp16` inside the network, or `auto`; see `mome.inference.precision`.
        prompt_chunk: Prompts that are decoded at once; a smaller number needs less memory.
        exact: Lay tiles over the whole scan. Otherwise they are laid over the patient, and air and what lies in it is
            background without a look (`mome.inference.body_mask`).
        mirror: Axes along which tiles are mirrored too, `lr`, `ap`, `si`, several with commas, or `all`; the logits are
            averaged (`mome.inference.mirror`). Each axis doubles the time.
        postprocess: Rules that change the masks: a config string such as `largest_component` for every mask,
            `spinal_cord=keep_near(mm=10)`, a list of these, `rules` or `none` (`mome.postprocess.rules.asked_rules`).
            None for the rules of the checkpoint's processor, of which there may be none.

    Attributes:
        predictor: Computes the logits of a tile; see `mome.inference.predictor`.
        notes: Sentences about the model, which every result repeats.

    Raises:
        InputError: The model is no MoME, has no values or no processor, or a value is out of range.
    """

    def __init__(
        self,
        model: MoME | str | Path,
        processor: MoMEProcessor | None = None,
        *,
        overlap: float = 0.5,
        device: str | torch.device | None = None,
        precision: str = "auto",
        prompt_chunk: int = 32,
        exact: bool = False,
        mirror: str | None = None,
        postprocess: str | Sequence[str] | None = None,
    ) -> None:
        _check_default_device()
        self.mirror = read_axes(mirror) if mirror else ()
        chosen = None if device is None else _device(device)  # before the model is loaded, which takes longer
        if isinstance(model, str | Path):
            from mome.modeling import MoME

            # The model is loaded first, so that an error in the model is reported before one in its processor.
            network = MoME.from_pretrained(model)
            processor = processor or MoMEProcessor.from_pretrained(model)
        else:
            network = unwrapped(model)
            processor = processor or processor_of(network)
        if hasattr(network, "check_processor"):  # a predictor's model may be of another class
            network.check_processor(processor)
        if not isinstance(overlap, int | float) or not 0 <= overlap <= 0.9:
            raise InputError(f"overlap is from 0 to 0.9, got {overlap!r:.60}")
        if chosen is not None:
            torch.nn.Module.to(network, chosen)
        place = ModelPredictor(network).device
        precision = chosen_precision(precision, network, place)
        network, autocast, notes = without_float16(network, place, PRECISIONS[precision])
        self.model, self.processor = network.eval(), processor
        if not isinstance(prompt_chunk, int) or isinstance(prompt_chunk, bool) or prompt_chunk < 1:
            raise InputError(f"prompt_chunk is a whole number of at least 1, got {prompt_chunk!r:.60}")
        self.overlap, self.precision, self.prompt_chunk, self.exact = overlap, precision, prompt_chunk, exact
        self.predictor: Predictor = ModelPredictor(self.model, autocast)
        if self.mirror:
            self.predictor = MirrorPredictor(self.predictor, self.mirror, processor.orientation)
        self.postprocess = asked_rules(postprocess, processor.postprocess)
        self._asks_rules = are_asked_by_name(postprocess)
        self.notes = (*getattr(network, "load_notes", ()), *notes)

    def mask_settings(self) -> dict[str, Any]:
        """Returns all settings that may change a mask, as JSON; a folder run is resumed only where they are the same.

        The model is not among them: `mome.inference.fingerprint.model_fingerprint` stands for it. Whoever adds an
        option that changes masks adds it here. `prompt_chunk` and the device change none.
        """
        return {
            "overlap": self.overlap,
            "precision": self.precision,
            "exact": self.exact,
            "predictor": predictor_settings(self.predictor, self.model),
            "processor": self.processor.settings(),
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
        return load_scan(scan, self.processor, patch=patch, frame=frame, dicom=dicom, on_phase=on_phase)

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
        return PreparedPrompts(understood, text_PT)

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

        Raises:
            InputError: The scan is of another type or cannot be read, a prompt cannot be embedded, the logits are not
                finite, the GPU's memory does not suffice, or no router can disagree.
        """
        _check_default_device()
        phases = Phases()
        if not isinstance(scan, str | Path | Volume):
            raise _no_scan(scan)
        if isinstance(scan, Volume) and (frame is not None or dicom != DEFAULT_DICOM):
            raise InputError("frame and dicom concern files, and a Volume was given", hint="leave them out")
        prepared = prompts if isinstance(prompts, PreparedPrompts) else self.prepare(prompts)
        phases.end("prompts")
        ready = loaded or self.load(scan, frame=frame, dicom=dicom)
        phases.include(ready.seconds)
        volume, body = ready.volume, ready.body
        maps = _probability_maps(probabilities, prepared, volume.grid.shape)
        predictor = self.predictor
        if isinstance(predictor, MirrorPredictor):
            predictor = predictor.for_volume(ready.array.shape[2:])
        watch = RouterWatch(predictor, self.model, ready.array.shape[2:]) if disagreement else None
        try:
            with watch or nullcontext():
                masks = predict_masks(
                    watch or predictor,
                    ready.array,
                    ready.network,
                    volume.grid,
                    prepared,
                    overlap=self.overlap,
                    prompt_chunk=self.prompt_chunk,
                    wanted=None if body is None else body.wants,
                    probabilities=maps,
                    progress=progress,
                    phases=phases,
                )
        except torch.OutOfMemoryError as error:
            raise InputError(
                "the GPU's memory is not enough for this scan",
                hint="a smaller prompt_chunk, precision='bf16', or device='cpu'",
            ) from error
        rules = self._postprocessing(prepared.names)
        changes = rules.run(masks, volume.grid)
        if self.postprocess:
            phases.end("postprocess")
        measured = scan_statistics(masks, volume) if statistics else None
        source = None if isinstance(scan, Volume) else Path(scan)
        notes = (
            *volume.notes,
            *self.notes,
            *(what for _, what in implausible_settings(self.processor.settings())),
            *filled_masks(masks, volume.array),
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
            statistics=measured,
            disagreement=None if watch is None else on_scan(watch.result(), ready.network, volume.grid),
        )


def segment(
    scan: str | Path | Volume,
    prompts: str | Sequence[str],
    model: MoME | str | Path | None = None,
    processor: MoMEProcessor | None = None,
    *,
    overlap: float = 0.5,
    device: str | torch.device | None = None,
    precision: str = "auto",
    prompt_chunk: int = 32,
    exact: bool = False,
    mirror: str | None = None,
    postprocess: str | Sequence[str] | None = None,
    frame: int | None = None,
    dicom: DicomOptions = DEFAULT_DICOM,
    probabilities: bool | Sequence[str] = False,
    progress: Callable[[int, int], None] | None = None,
    statistics: bool = False,
) -> Segmentation:
    """Segments one scan; see `Segmenter`, which keeps the model for more scans.

    Where `model` is None, `choose_model` takes the bundled checkpoint that knows the prompts.
    """
    note = None
    if model is None:
        chosen = choose_model(prompts)
        model, note = chosen.model, chosen.note
    segmenter = Segmenter(
        model,
        processor,
        overlap=overlap,
        device=device,
        precision=precision,
        prompt_chunk=prompt_chunk,
        exact=exact,
        mirror=mirror,
        postprocess=postprocess,
    )
    segmenter.notes += (note,) if note else ()
    return segmenter.segment(
        scan,
        prompts,
        frame=frame,
        dicom=dicom,
        probabilities=probabilities,
        progress=progress,
        statistics=statistics,
    )


def _probability_maps(
    asked: bool | Sequence[str], prompts: PreparedPrompts, shape: tuple[int, int, int]
) -> ProbabilityMaps | None:
    """Returns empty maps of the prompts whose probabilities are asked; None where none is.

    Raises:
        InputError: A name is none of the prompts'.
    """
    if isinstance(asked, bool):
        return ProbabilityMaps(prompts.names, shape) if asked else None
    names = [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if name not in prompts.names:
            raise InputError(
                f"probabilities are asked of {name!r:.60}, which is no prompt here",
                hint="names of prompts, as in " + ", ".join(prompts.names[:5]),
            )
    return ProbabilityMaps(names, shape) if names else None


def _no_scan(given: Any) -> InputError:
    """The error for a scan of another type; an array does not say where its voxels are."""
    shape = getattr(given, "shape", None)
    of_shape = f" of shape {tuple(shape)}" if isinstance(shape, tuple) else ""
    is_image = hasattr(given, "affine") and hasattr(given, "get_fdata")
    hint = "Volume(image.get_fdata(), image.affine)" if is_image else "Volume(array, affine), array (i, j, k) in HU"
    return InputError(
        f"a scan is a path or a mome.volumes.Volume, got {type(given).__name__}{of_shape}",
        hint=f"{hint}; affine (4, 4) goes from voxels to mm in RAS",
    )


def _check_default_device() -> None:
    """Checks that new tensors get values.

    Raises:
        InputError: The default device is `meta`, whose tensors hold no numbers.
    """
    if torch.get_default_device().type == "meta":
        raise InputError(
            "torch's default device is 'meta', whose tensors hold no numbers",
            hint="call this outside of torch.device('meta')",
        )


def _device(device: str | torch.device) -> torch.device:
    """Returns a device that computes.

    Raises:
        InputError: There is no such device here, or it holds no numbers, as `meta`.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"no such device: {device!r:.60}", hint="cpu, cuda, cuda:1") from error
    if chosen.type == "cpu" and chosen.index:
        raise InputError(f"there is one device 'cpu', got {str(chosen)!r}", hint="device='cpu'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here", hint="device='cpu'")
    try:
        computes = torch.ones(1, device=chosen).add(1).item() == 2
    except Exception as error:  # backends raise errors of many types
        first = (str(error).splitlines() or [""])[0][:120]
        raise InputError(f"the device {str(chosen)!r} cannot be used: {first}", hint="device='cpu'") from error
    if not computes:
        raise InputError(f"the device {str(chosen)!r} does not compute", hint="device='cpu'")
    return chosen
