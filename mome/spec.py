"""stand-in until the real one lands"""
import ast
from mome.errors import InputError
SPEC_VERSION = 1
class SpecError(InputError): pass
def migrate(d, version=1): return d
def _v(n):
    if isinstance(n, ast.Constant): return n.value
    if isinstance(n, (ast.List, ast.Tuple)): return [_v(x) for x in n.elts]
    if isinstance(n, ast.UnaryOp): return -_v(n.operand)
    if isinstance(n, ast.Name): return {"name": n.id}
    if isinstance(n, ast.Call): return {"name": n.func.id, **{k.arg: _v(k.value) for k in n.keywords}}
    raise SpecError("bad")
def parse(t): return _v(ast.parse(t, mode="eval").body)
def canonical(s): return parse(s) if isinstance(s, str) else dict(s)
def dump(d, registry=None):
    return d["name"] + ("(" + ", ".join(f"{k}={v!r}" for k, v in d.items() if k != "name") + ")" if len(d) > 1 else "")
