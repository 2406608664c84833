"""HTML pages that show a CT with its masks in any browser. A page carries all it needs and opens from a file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mome.viz.niivue_source import niivue_licences, niivue_source

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("surfaces.js", "viewer.js")


def page(
    title: str,
    ct: bytes | str | None = None,
    layers: Sequence[Mapping[str, Any]] = (),
    *,
    notes: Sequence[str] = (),
    panel: str = "",
    scripts: Sequence[str] = (),
    connect: str = "",
) -> str:
    """Returns an HTML page with the viewer, and with a result where there is one.

    Names, notes and the title may be any text: none of them is read as HTML or as a script. The page's content security
    policy allows the scripts of this page alone, and no request except to `connect`.

    Args:
        title: The heading, such as the scan's name.
        ct: A NIfTI file of the CT in HU, gzip-compressed or not; or its URL; None for none.
        layers: NIfTI files of label ids, `{"data": bytes}` or `{"url": str}`, with `"structures"`, a list of
            `{"id", "name", "color", "volume_ml", "warning"}`. Structures of one layer do not overlap; see
            `mome.viz.page_layers`.
        notes: Sentences for the reader.
        panel: HTML for the top of the page's left column, such as a form. It is trusted: no text of a user.
        scripts: JavaScript that runs after the viewer's. It may call `momeViewer.show(data)`; see `assets/viewer.js`.
        connect: The sources that the page may request, such as `'self'`, in the words of a content security policy.

    Raises:
        ValueError: A script contains `</script`, which would end it.
    """
    data = None
    if ct is not None or layers:
        data = {
            "ct": None if ct is None else _source(ct),
            "layers": [
                {**_source(layer.get("data") or layer["url"]), "structures": layer["structures"]} for layer in layers
            ],
            "notes": list(notes),
        }
    sources = [niivue_source(), *(_asset(name) for name in _SCRIPTS), *scripts]
    return _filled(
        _asset("page.html"),
        {
            "title": html.escape(title),
            "style": _asset("page.css"),
            "policy": html.escape(_policy(sources, connect)),
            "panel": panel,
            "licences": html.escape(niivue_licences()),
            "data": json_in_html(data),
            "scripts": "\n".join(_script_element(source) for source in sources),
        },
    )


def json_in_html(value: Any) -> str:
    """Returns JSON that can stand inside a script element: no character in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source(file: bytes | str) -> dict[str, str]:
    """Returns a file for the viewer: its content in base64, or its URL."""
    return {"url": file} if isinstance(file, str) else {"base64": base64.b64encode(file).decode("ascii")}


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Replaces `{{name}}` in a template. What is filled in is not searched again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _script_element(source: str) -> str:
    if "</script" in source.lower():
        raise ValueError("a script that is put into a page must not contain '</script'")
    return f"<script>{source}</script>"


def _policy(scripts: Sequence[str], connect: str) -> str:
    """Returns the content security policy of a page: only these scripts run, and nothing is loaded from elsewhere.

    NiiVue loads its fonts and textures from data URLs and sets styles of its own.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(source.encode('utf-8')).digest()).decode('ascii')}'"
        for source in scripts
    )
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {hashes}",
            "style-src 'unsafe-inline'",
            "img-src data: blob:",
            "font-src data:",
            f"connect-src data: blob: {connect}".rstrip(),
            "base-uri 'none'",
            "form-action 'none'" if not connect else f"form-action {connect}",
        ]
    )
