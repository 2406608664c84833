"""The page at `/`: the viewer of `mome.viz.page` with a form. All it needs is in it; nothing comes from elsewhere."""

from __future__ import annotations

import gzip
import html
import re
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from mome.viz.page import page

router = APIRouter(include_in_schema=False)

_ASSETS = Path(__file__).parent / "page"


@router.get("/")
async def index(request: Request) -> Response:
    """Returns the page. It holds no data and needs no token; what it shows, it asks for with the user's token."""
    compressed, policy = _page()
    headers = {
        "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
        "Cache-Control": "no-cache",
        "Vary": "Accept-Encoding",
    }
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        return Response(compressed, media_type="text/html; charset=utf-8", headers=headers)
    return Response(gzip.decompress(compressed), media_type="text/html; charset=utf-8", headers=headers)


@lru_cache(maxsize=1)
def _page() -> tuple[bytes, str]:
    """Returns the page, compressed by gzip, and its content security policy."""
    style, panel, *scripts = (
        (_ASSETS / name).read_text(encoding="utf-8") for name in ("panel.css", "panel.html", "connection.js", "page.js")
    )
    text = page("mome", panel=f"<style>{style}</style>\n{panel}", scripts=scripts, connect="'self'")
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert found is not None, "the page states its policy"
    return gzip.compress(text.encode("utf-8"), 6), html.unescape(found[1])
