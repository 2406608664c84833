"""stand-in until the real one lands"""
import dataclasses, importlib, fnmatch
from mome.spec import canonical
class Registry:
    def __init__(self, kind, package, group): self.kind, self.package, self.t = kind, package, {}
    def register(self, name, target, summary=""): self.t[name] = target
    def _load(self): importlib.import_module(self.package)
    def names(self, pattern="*"): self._load(); return sorted(fnmatch.filter(self.t, pattern))
    def resolve(self, spec):
        self._load(); d = canonical(spec); m, c = self.t[d["name"]].split(":")
        cls = getattr(importlib.import_module(m), c)
        return cls, cls.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in d.items() if k != "name"})
    def build(self, spec, **rt): cls, cfg = self.resolve(spec); return cls(cfg, **rt)
    def canonical(self, spec):
        cls, cfg = self.resolve(spec)
        return {"name": canonical(spec)["name"], **{k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(cfg).items()}}
ENCODERS = Registry("encoder", "mome.encoders", "mome.encoders")
TEXT_ENCODERS = Registry("text encoder", "mome.encoders.text", "mome.text_encoders")
EXPERTS = Registry("expert", "mome.experts", "mome.experts")
ROUTERS = Registry("router", "mome.routers", "mome.routers")
FUSIONS = Registry("fusion", "mome.routers.fusion", "mome.fusions")
HEADS = Registry("head", "mome.layers.heads", "mome.heads")
LOSSES = Registry("loss", "mome.losses", "mome.losses")
