"""Changed config strings, YAML, JSON and safetensors files: accepted, or refused in at most three lines.

`pytest -m long tests/test_fuzz_configs.py` tries 10,000 inputs. `MOME_FUZZ_SEED` chooses other ones.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_inputs import changed_bytes, changed_json, changed_text, encoded
from small_models import liver_and_spleen
from training_runs import RECIPE, write_cases, write_recipe

from mome import MoME
from mome.cli.exit_codes import describe
from mome.data.cache import CaseCache
from mome.data.case_folder import CaseFolder
from mome.inference.report import is_complete, read_report
from mome.processing import MoMEProcessor
from mome.registry import REGISTRIES
from mome.training.checkpoint import TrainingState, load_checkpoint
from mome.training.config_file import load_run_config
from mome.training.loop import train
from mome.training.run_settings import check_same_run
from mome.training.setup import _check_overrides

SEED = int(os.environ.get("MOME_FUZZ_SEED", "0"))
LIMIT_S = 20.0  # for one input
STRINGS = (
    "swiglu(n=8)", "mlp(n=2, hidden=8)", "topk(k=2, normalize=true)", "unet(channels=[4, 8])", "linear",
    "a.b(c={'d': [1]})", "swin_unetr(feed_forward=moe(experts=swiglu(n=8), router=topk(k=2)))",
    "bce_dice(positive_weight=20)",
)  # fmt: skip


class Sandbox:
    """Valid files of every kind, made once, and a folder in which a changed copy is read."""

    def __init__(self, root: Path) -> None:
        self.root, self.work = root, root / "work"
        self.work.mkdir()
        recipe = write_recipe(root)
        settings = ["train.steps=1", "train.validate_every=0", "train.log_every=0", f"train.out={root / 'r'}"]
        self.run = load_run_config(recipe, settings)
        train(self.run)
        (self.cache,) = (root / "cache").iterdir()
        (self.state,) = (root / "r" / "checkpoints").iterdir()
        liver_and_spleen().save_pretrained(root / "model")
        MoMEProcessor(spacing=[4, 4, 4]).save_pretrained(root / "model")
        study = {"name": "a", "status": "done", "masks": ["a.nii.gz"], "notes": [], "seconds": 1.0}
        structure = {"name": "liver", "volume_ml": 1.0, "warning": None}
        self.report = {"studies": [{**study, "structures": [structure], "overlapping_voxels": None, "scan": {}}]}
        self.cases = write_cases(root / "cases", 2)

    def strings(self, rng: random.Random) -> None:
        registry = rng.choice(list(REGISTRIES.values()))
        registry.canonical(changed_text(rng, rng.choice(STRINGS)))

    def overrides(self, rng: random.Random) -> None:
        texts = (
            "experts=swiglu(n=8)",
            "train.steps=100",
            "router.k=2",
            "sources=[{kind: cases}]",
            "loss={name: bce_dice}",
        )
        run = load_run_config(self.root / "run.yaml", [changed_text(rng, rng.choice(texts))])
        _check_overrides(run)

    def yaml(self, rng: random.Random) -> None:
        path = self.work / "run.yaml"
        path.write_bytes(encoded(rng, changed_text(rng, RECIPE.format(root=self.root))))
        _check_overrides(load_run_config(path, []))

    def case_list(self, rng: random.Random) -> None:
        path = self.cases / "cases.json"
        value = {"c0": {"annotated": ["mandible"]}, "c1": {"annotated": ["parotid_gland_left", "mandible"]}}
        path.write_bytes(self._json(rng, value))
        CaseFolder(self.cases, "openkbp")

    def run_settings(self, rng: random.Random) -> None:
        (self.work / "run.json").write_bytes(self._json(rng, json.loads((self.root / "r" / "run.json").read_text())))
        check_same_run(self.work, self.run)

    def reports(self, rng: random.Random) -> None:
        path = self.work / "report.json"
        path.write_bytes(self._json(rng, self.report))
        for entry in read_report(path).values():
            is_complete(entry, self.work, {"name": "a"})

    def cache_index(self, rng: random.Random) -> None:
        (self.work / "index.json").write_bytes(self._json(rng, json.loads((self.cache / "index.json").read_text())))
        for path in self.cache.glob("*.npy"):
            shutil.copy(path, self.work)
        cache = CaseCache(self.work, list(self.run.labels))
        for i in range(len(cache)):
            cache[i]

    def training_state(self, rng: random.Random) -> None:
        import hashlib

        import torch
        from accelerate import Accelerator

        from mome.training.optimizer import build_optimizer
        from mome.training.setup import build_model
        from mome.training.weight_average import start_average

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        if not hasattr(self, "loaded"):
            model, _ = build_model(self.run)
            optimizer = build_optimizer(model, self.run.train)
            average = start_average(model, 0.9, accelerator.device)
            self.loaded = TrainingState(accelerator, *accelerator.prepare(model, optimizer), average, 4)
        state = self.work / self.state.name
        shutil.rmtree(state, ignore_errors=True)
        shutil.copytree(self.state, state)
        name = rng.choice(["model", "average", "optimizer", "random_0", "state"])
        if name == "state":
            (state / "state.json").write_bytes(self._json(rng, json.loads((state / "state.json").read_text())))
        else:
            path = state / f"{name}.safetensors"
            path.write_bytes(changed_bytes(rng, path.read_bytes(), 4000))
            contents = json.loads((state / "state.json").read_text())
            if rng.random() < 0.9:  # as somebody does who wants the file to be read
                contents["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            (state / "state.json").write_text(json.dumps(contents))
        generator = torch.get_rng_state()
        try:
            load_checkpoint(self.loaded, state)
        finally:
            torch.set_rng_state(generator)

    def model_config(self, rng: random.Random) -> None:
        folder = self._model()
        for name in rng.sample(["config.json", "preprocessor_config.json"], rng.randint(1, 2)):
            (folder / name).write_bytes(self._json(rng, json.loads((folder / name).read_text())))
        MoME.from_pretrained(folder)
        MoMEProcessor.from_pretrained(folder)

    def model_weights(self, rng: random.Random) -> None:
        folder = self._model()
        path = folder / "model.safetensors"
        path.write_bytes(changed_bytes(rng, path.read_bytes(), 4000))
        MoME.from_pretrained(folder)

    def _model(self) -> Path:
        folder = self.work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.root / "model", folder)
        return folder

    @staticmethod
    def _json(rng: random.Random, value: object) -> bytes:
        if rng.random() < 0.2:
            return encoded(rng, changed_text(rng, json.dumps(value)))
        return encoded(rng, json.dumps(changed_json(rng, value)))


KINDS = {
    "strings": 3, "overrides": 2, "yaml": 2, "case_list": 2, "run_settings": 1, "reports": 2, "cache_index": 1,
    "training_state": 1, "model_config": 2, "model_weights": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("fuzz"))


def attempt(read: Callable[[random.Random], None], seed: str) -> str | None:
    """Reads one changed input; returns what is wrong with how it ended, or None."""
    began = time.monotonic()
    try:
        read(random.Random(seed))
    except Exception as error:
        code, lines = describe(error)
        if code != 2:
            return f"{seed}: {type(error).__name__}: {error!s:.300}"
        if len(lines) > 3 or len("\n".join(lines)) > 4000:
            return f"{seed}: a long message: {error!s:.300}"
    if time.monotonic() - began > LIMIT_S:
        return f"{seed}: took {time.monotonic() - began:.0f} s"
    return None


LONG = [pytest.mark.long, pytest.mark.timeout(7200)]


@pytest.mark.parametrize(
    ("what", "count"),
    [("", 150), pytest.param("runs", 8_000, marks=LONG), pytest.param("model_", 2_000, marks=LONG)],
)
def test_changed_inputs_are_accepted_or_refused(sandbox: Sandbox, what: str, count: int, monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kinds = [kind for kind, share in KINDS.items() for _ in range(share)]
    if what:
        kinds = [kind for kind in kinds if kind.startswith("model_") == (what == "model_")]
    wrong = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        wrong.append(attempt(getattr(sandbox, kind), f"{SEED}-{kind}-{i}"))
    wrong = [text for text in wrong if text]
    assert not wrong, "\n".join([f"{len(wrong)} of {count}", *wrong[:20]])
    outside = {path.name for path in sandbox.root.iterdir()}
    assert outside == {"work", "run.yaml", "data", "cache", "r", "model", "cases"}
