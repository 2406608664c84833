"""Any segmentation model as one more expert of the text-guided fusion.

The paper (arXiv 2510.26996) names foundation models as experts as its future work; how they are joined here is our
choice. The maps of the model's classes are joined to prompts by the names of the classes, which the class table
resolves. `mome.layers.extra_scale` makes a scale of the fusion from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mome import module_objects
from mome.errors import InputError, did_you_mean
from mome.experts.whole_model_classes import channels_by_name, checked_classes
from mome.experts.whole_model_reference import checked_spacing

# Logits are cut off at ±10, a probability of 0.99995, so that an overconfident model cannot outweigh the others.
LOGIT_LIMIT = 10.0
_CHOICES = {"activation": ("softmax", "sigmoid"), "values": ("logits", "probabilities")}


class WholeModel(nn.Module):
    """A segmentation model, the names of its classes, and the grid that it was trained on.

    Pass it as `extra_experts=[WholeModel(…)]` to `MoMEConfig`, `create_model` or `MoME.from_pretrained`. The caller
    keeps it alive until the model is built. A saved config holds the names of the classes, the spacing and a hash;
    whoever loads the checkpoint passes the object again. The weights of a frozen model are not saved, and loading
    refuses another model than the one that the fusion was trained with; those of a trained one are saved.

    Args:
        network: A torch module (a MONAI network, for example) or a function, (B, 1, D, H, W) → maps
            (B, classes, D, H, W) of the same sides. It is given the model's own input: HU on the network grid,
            windowed to [0, 1]. A network that reads other values wraps the conversion. Of a function only the name
            can be compared when a checkpoint is loaded.
        classes: The names of the maps, in order, "background" among them where there is such a map. A name is resolved
            as a prompt is, without correcting typos. A name that several maps have stands for their union.
        spacing: The voxel size (x, y, z) in mm that the network was trained on. It equals that of the processor.
        orientation: Three letters, the direction that each axis runs to; equals that of the processor.
        hu_window: The HU window that the network was trained on, which then equals that of the processor. None where
            the network takes any window.
        activation: `softmax` where the classes exclude each other (one of them is usually the background), `sigmoid`
            where every map stands for itself.
        values: Whether the network returns `logits` or `probabilities`.
        frozen: Whether the network stays as it is; it then runs in eval mode and without gradients.
        kind: The kind of model for the saved config: `module`, `function`, `export`, `mome` or `nnunet`.
        one_by_one: Whether the images of a batch are run one after the other, for networks of batch size one.

    Attributes:
        names: The names that prompts are joined by, one for each map of `forward`: labels of the class table, or the
            names of classes as given where the table has no such label.

    Raises:
        InputError: No class is given, there are too many, none has a name that a prompt can have, a setting is
            unknown, or a function is to be trained.
    """

    def __init__(
        self,
        network: nn.Module | Callable[[Tensor], Tensor],
        classes: Sequence[str],
        *,
        spacing: Sequence[float],
        orientation: str = "RAS",
        hu_window: Sequence[float] | None = None,
        activation: str = "softmax",
        values: str = "logits",
        frozen: bool = True,
        kind: str | None = None,
        one_by_one: bool = False,
    ) -> None:
        super().__init__()
        if not callable(network):
            raise InputError(
                f"a whole-model expert is a module or a function, got {type(network).__name__}",
                hint="WholeModel(network, classes, spacing=…); exported_model(path, …) reads a .pt2 file",
            )
        for key, value in (("activation", activation), ("values", values)):
            if value not in _CHOICES[key]:
                raise InputError(
                    f"{key} of a whole-model expert is {' or '.join(_CHOICES[key])}, got {value!r:.60}"
                    f"{did_you_mean(str(value), _CHOICES[key])}"
                )
        is_module = isinstance(network, nn.Module)
        if not frozen and not is_module:
            raise InputError("a function has no weights that can be trained", hint="frozen=True, or a torch module")
        self.network = network
        self.title = getattr(network, "__name__", type(network).__name__)
        self.kind = kind or ("module" if is_module else "function")
        self.classes = checked_classes(classes)
        self.spacing = checked_spacing(spacing, "a whole-model expert")
        self.orientation, self.hu_window = orientation.upper(), None if hu_window is None else [*map(float, hu_window)]
        self.activation, self.values, self.frozen, self.one_by_one = activation, values, frozen, one_by_one
        self.channels_of = channels_by_name(self.classes)
        self.names = tuple(self.channels_of)
        if not self.names:
            raise InputError(
                f"the classes of expert '{self.title}' hold nothing but the background: {', '.join(self.classes)}",
                hint="name the structure of each map, as in classes=['background', 'liver']",
            )
        if activation == "softmax" and any(len(c) == len(self.classes) for c in self.channels_of.values()):
            raise InputError(
                f"expert '{self.title}' has activation='softmax' and no class beside {self.names[0]!r}",
                hint="activation='sigmoid' for one map, or name its background too",
            )
        # In the state, so that the hash of the object depends on it.
        self.register_buffer("settings_sha256", self._settings_sha256())
        self._checked: set[tuple[int, ...]] = set()
        if frozen and is_module:
            _eval(network)

    def _settings_sha256(self) -> Tensor:
        """The SHA-256 of all that decides the result beside the weights, as 32 bytes."""
        function = self.network
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
        digest = hashlib.sha256(
            repr(
                (name, self.kind, self.classes, self.spacing, self.orientation, self.hu_window, self.activation)
                + (self.values, self.frozen, getattr(function, "settings", None))
            ).encode()
        ).digest()
        return torch.frombuffer(bytearray(digest), dtype=torch.uint8).clone()

    def reference(self) -> dict[str, Any]:
        """What a config stores for the expert; see `mome.module_objects`."""
        return {
            **module_objects.remember(self),
            "kind": self.kind,
            "classes": list(self.classes),
            "spacing": list(self.spacing),
            "frozen": self.frozen,
        }

    # -- running it -----------------------------------------------------------------------------------------------

    def forward(self, volume_BCDHW: Tensor) -> Tensor:
        """Volume → logits (B, N, D, H, W) float32 of the N names, each against the rest, cut off at ±10."""
        maps_BKDHW = self.run(volume_BCDHW).float()
        if self.activation == "softmax":
            log_BKDHW = maps_BKDHW if self.values == "logits" else maps_BKDHW.clamp(min=1e-12).log()
            log_BKDHW = log_BKDHW.log_softmax(dim=1)
            logits = [_against_rest(log_BKDHW[:, c].logsumexp(dim=1)) for c in self.channels_of.values()]
        else:
            logits_BKDHW = maps_BKDHW if self.values == "logits" else maps_BKDHW.logit(eps=1e-6)
            logits = [logits_BKDHW[:, c].amax(dim=1) for c in self.channels_of.values()]
        return torch.stack(logits, dim=1).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def run(self, volume_BCDHW: Tensor) -> Tensor:
        """Volume → the network's own maps; a frozen network is brought to the volume's device first."""
        network, x = self.network, volume_BCDHW
        like = next(_tensors(network), None)
        if like is not None:
            if self.frozen and like.device != x.device and isinstance(network, nn.Module):
                network.to(x.device)
            x = x.to(like.dtype)
        if self.frozen and isinstance(network, nn.Module):
            _eval(network)
        gradients = torch.no_grad() if self.frozen else nullcontext()
        precision = torch.autocast(x.device.type, enabled=False) if self.frozen else nullcontext()
        with gradients, precision:
            return torch.cat([network(image) for image in x.split(1)]) if self.one_by_one else network(x)

    # -- checks when a model is built -----------------------------------------------------------------------------

    def check_labels(self, labels: Sequence[str]) -> None:
        """Checks that a prompt can be joined to a class.

        Args:
            labels: The labels of the model that the expert becomes a part of.

        Raises:
            InputError: None of the classes is one of the labels.
        """
        if labels and not set(labels) & set(self.names):
            raise InputError(
                f"expert '{self.title}' has none of the model's labels: its classes are {_shown(self.names)}",
                hint=f"classes=[…] in the order of its maps, with some of {_shown(labels)}",
            )

    def check_output(self, in_channels: int, patch_size: Sequence[int]) -> None:
        """Checks the shape of the maps on an empty patch; without computing where the network can be traced so.

        Raises:
            InputError: The network fails on a patch, or returns something else than one map per class.
        """
        shape = (1, in_channels, *patch_size)
        if shape in self._checked:
            return
        maps = self._try(shape)
        wanted = (1, len(self.classes), *patch_size)
        if not isinstance(maps, Tensor):
            raise InputError(
                f"expert '{self.title}' returns {type(maps).__name__}, not a tensor of maps {wanted}",
                hint="wrap it in a module that returns the maps (a network with deep supervision: the first of them)",
            )
        if tuple(maps.shape) != wanted:
            raise InputError(
                f"expert '{self.title}' returns {tuple(maps.shape)} for a patch {shape}; with its "
                f"{len(self.classes)} classes that should be {wanted}",
                hint="name every map in classes=[…], the background too, and bring the maps to the sides of the patch",
            )
        self._checked.add(shape)

    def _try(self, shape: tuple[int, ...]) -> Any:
        like = next(_tensors(self.network), None)
        device = torch.device("cpu") if like is None else like.device
        # A model may be in the making on the meta device; and nothing may change the statistics of a norm.
        with torch.device(device), torch.no_grad(), _in_eval_mode(self.network):
            zeros = torch.zeros(shape, dtype=torch.float32 if like is None else like.dtype, device=device)
            if like is not None and self.kind != "export":
                try:
                    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                        return self.network(mode.from_tensor(zeros))
                except Exception:  # not every network can be traced; the run below is the one that counts
                    pass
            try:
                return self.network(zeros)
            except Exception as error:  # whatever the network raises
                if isinstance(error, InputError):
                    raise
                first = (str(error).splitlines() or [""])[0][:160]
                raise InputError(
                    f"expert '{self.title}' cannot segment a patch {shape}: {type(error).__name__}: {first}",
                    hint="patch_size=[…] of a size that it takes, or wrap it in a module that pads and crops",
                ) from error

    def check_grid(self, processor: Any) -> None:
        """Checks that a processor makes the grid and the values that the network was trained on.

        Raises:
            InputError: The spacing, the orientation or the HU window differs.
        """
        close = all(abs(a - b) <= 1e-3 * max(a, b) for a, b in zip(self.spacing, processor.spacing, strict=True))
        if not close:
            raise InputError(
                f"expert '{self.title}' was trained on voxels of {_mm(self.spacing)}, the model's processor makes "
                f"voxels of {_mm(processor.spacing)}",
                hint=f"a processor with spacing={self.spacing}, or an expert for the model's spacing",
            )
        if self.orientation != processor.orientation:
            raise InputError(
                f"expert '{self.title}' was trained on axes {self.orientation}, the model's processor makes "
                f"{processor.orientation}",
                hint=f"a processor with orientation={self.orientation!r}",
            )
        if self.hu_window is not None and self.hu_window != list(processor.hu_window):
            raise InputError(
                f"expert '{self.title}' was trained on the HU window {self.hu_window}, the model's processor has "
                f"{list(processor.hu_window)}",
                hint=f"a processor with hu_window={self.hu_window}, or a module around it that converts the values",
            )


def _against_rest(log_p: Tensor) -> Tensor:
    """log p → log(p / (1 − p)); p is kept below one."""
    log_p = log_p.clamp(max=-1e-6)
    return log_p - (-torch.expm1(log_p)).log()


def _tensors(network: Any) -> Any:
    """The floating-point weights of a network; none of a function."""
    if isinstance(network, nn.Module):
        yield from (tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point())


@contextmanager
def _in_eval_mode(network: Any) -> Iterator[None]:
    """Puts every module of a network into eval mode, and back into its own mode at the end."""
    modes = {m: m.training for m in network.modules()} if isinstance(network, nn.Module) else {}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _eval(network: Any) -> None:
    if network.training:
        network.eval()


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _mm(spacing: Sequence[float]) -> str:
    return " × ".join(f"{side:g}" for side in spacing) + " mm"


def path_of(path: str | Path, what: str) -> Path:
    """A path that the user typed.

    Raises:
        InputError: There is no such file or folder.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise InputError(f"there is no {what} here", where=str(path), hint="check the path")
    return found
