"""The models of a worker: loaded once, and chosen for every job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mome.errors import InputError

if TYPE_CHECKING:
    from mome.inference import Segmenter


class ServedModels:
    """Models by their names; a name is that of the checkpoint's folder, or the last part of a Hub id.

    Args:
        segmenters: Name → model. The first is taken for prompts that none was trained on.
    """

    def __init__(self, segmenters: dict[str, Segmenter]) -> None:
        self._segmenters = segmenters
        configs = {name: each.model.config for name, each in segmenters.items()}
        self._trained = {
            name: {label: (config.synonyms or {}).get(label, []) for label in config.trained_labels}
            for name, config in configs.items()
        }

    @classmethod
    def load(cls, models: list[str], **options: Any) -> ServedModels:
        """Loads the models.

        Args:
            models: Folders, bundled names or Hub ids.
            options: Those of `Segmenter`.

        Raises:
            InputError: One cannot be loaded, or two have the same name.
        """
        from mome.inference import Segmenter

        names = [Path(os.path.abspath(model)).name for model in models]  # "." is a folder, too
        for place, name in enumerate(names):
            if name in names[:place]:
                raise InputError(f"two models have the name {name!r:.60}", hint="rename the folder of one of them")
        return cls({name: Segmenter(model, **options) for name, model in zip(names, models, strict=True)})

    def __getitem__(self, name: str) -> Segmenter:
        """Returns a model that `choose` has named."""
        return self._segmenters[name]

    def choose(self, prompts: list[str], asked: str | None) -> tuple[str, str | None]:
        """Returns the name of the model for some prompts, and a note where it was chosen among several.

        Args:
            prompts: Texts.
            asked: The model that the client has named; None for the one that knows most of the prompts.

        Raises:
            InputError: There is no such model, or no model knows all structures that some model knows.
        """
        if asked is not None:
            if asked not in self._segmenters:
                raise InputError(
                    f"this server has no model {asked[:60]!r}",
                    where="the field model",
                    hint=", ".join(self._segmenters),
                )
            return asked, None
        if len(self._segmenters) == 1:
            return next(iter(self._segmenters)), None
        from mome.inference.choose_model import best_model, chosen_note

        hint = "two jobs, one with model={} and one with model={}"
        name, found = best_model(prompts, self._trained, "model of this server", hint)
        return name, chosen_note(name, found) if found else None

    def able(self) -> dict[str, Any]:
        """Returns what the models can do: `models` by name, `labels` and `trained_labels` of all of them, and `model`,
        the one that is taken for prompts that none was trained on.
        """
        models: dict[str, dict[str, Any]] = {
            name: {
                "labels": list(each.model.config.labels),
                "trained_labels": list(self._trained[name]),
                "spacing_mm": list(each.processor.spacing),
            }
            for name, each in self._segmenters.items()
        }

        def together(key: str) -> list[str]:
            return list(dict.fromkeys(label for each in models.values() for label in each[key]))

        return {
            "model": next(iter(models)),
            "models": models,
            "labels": together("labels"),
            "trained_labels": together("trained_labels"),
        }
