"""The page of `mome serve` in a browser: a scan is uploaded, segmented and shown."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from driven_browser import DrivenBrowser
from server_process import TOKEN, Server, save_model
from small_models import small
from small_scans import large_body, patient_bytes

from mome.processing import MoMEProcessor

for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package, reason="the server needs mome[serve]")


@pytest.fixture
def browser() -> Iterator[DrivenBrowser]:
    browser = DrivenBrowser()
    yield browser
    browser.close()


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    for headers in ({}, {"Accept-Encoding": "gzip"}):
        answer = server.ask("GET", "/", headers=headers, token=None)
        assert answer.status == 200
        body = gzip.decompress(answer.body) if headers else answer.body
        assert b"<script src" not in body and b"<link" not in body and b"@import" not in body
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert "unsafe" not in policy["script-src"] and "http" not in str(policy)
        assert policy["connect-src"].split() == ["data:", "blob:", "'self'"]


@pytest.mark.wide
@pytest.mark.timeout(300)
def test_a_scan_is_segmented_and_shown(server: Server, browser: DrivenBrowser, tmp_path: Path) -> None:
    scan = tmp_path / "<b>Eisenbart.nii.gz"
    scan.write_bytes(gzip.compress(patient_bytes(), 1))
    part = "document.querySelector('[data-server={}]')".format
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.until(f"!{part('login')}.hidden")
    browser.run(f"{part('token')}.value = 'wrong'; {part('login')}.querySelector('button').click()")
    browser.until(f"{part('refused')}.innerText.includes('a valid token')")
    browser.run(f"{part('token')}.value = '{TOKEN}'; {part('login')}.querySelector('button').click()")
    browser.until(f"!{part('request')}.hidden")
    before = browser.picture()
    browser.choose("[data-server=files]", scan)
    assert browser.run(f"{part('chosen')}.textContent").startswith("<b>Eisenbart.nii.gz, ")
    browser.run(f"{part('prompts')}.value = 'left thingy'; {part('start')}.click()")
    browser.until(f"{part('status')}.innerText.includes('which is not understood')")
    browser.until(f"!{part('start')}.disabled")
    browser.run(f"{part('prompts')}.value = 'spleen'; {part('labels')}.querySelector('button').click()")
    assert browser.run(f"{part('prompts')}.value") == "spleen\nliver"
    browser.run(f"{part('start')}.click()")
    browser.until("document.documentElement.dataset.state === 'ready'")
    text = browser.run("document.body.innerText")
    assert "2 structures" in text and " ml" in text and "not trained on 'spleen'" in text
    after = browser.picture(tmp_path / "page.png")
    colourful = [(np.ptp(picture[60:, 320:], axis=2) > 60).mean() for picture in (before, after)]
    assert colourful[0] < 0.001 and colourful[1] > 0.002, colourful  # masks are drawn in colour over the grey scan
    grey = (after[60:, 320:].min(axis=2) > 60).mean()
    assert grey > 0.02, grey
    assert all(url.startswith((f"http://127.0.0.1:{server.port}/", "data:", "blob:")) for url in browser.requests)
    assert TOKEN not in " ".join(browser.requests)
    assert browser.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    browser.run("[...document.querySelectorAll('[data-server=list] button')].at(-1).click()")  # Delete
    browser.until(f"{part('jobs')}.hidden")
    refusals = ("401", "422")  # the browser notes them on its console
    assert [error for error in browser.errors if not any(code in error for code in refusals)] == []
    assert "Eisenbart" not in server.log.read_text()


@pytest.mark.wide
@pytest.mark.timeout(300)
def test_a_job_is_followed_through_a_restart_and_deleted_surely(browser: DrivenBrowser, tmp_path: Path) -> None:
    """Before, the page lost the job, and an entry that could not be deleted left the page as if it were."""
    part = "document.querySelector('[data-server={}]')".format
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(patient_bytes(large_body()), 1))
    server = Server(save_model(tmp_path / "model"), tmp_path / "server", token=None)
    try:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.until(f"!{part('request')}.hidden")
        browser.choose("[data-server=files]", tmp_path / "scan.nii.gz")
        browser.run(f"{part('prompts')}.value = 'liver'; {part('start')}.click()")
        browser.until(f"{part('list')}.innerText.includes('running')")
        server.kill()
        browser.until(f"{part('status')}.innerText.includes('The connection was lost')")
        server.start()
        browser.until("document.documentElement.dataset.state === 'ready'")
        assert "1 structure, " in browser.run(f"{part('list')}.innerText")
        server.stop()
        delete = f"[...{part('list')}.querySelectorAll('button')].at(-1)"
        browser.run(f"{delete}.click()")
        browser.until(f"{part('status')}.classList.contains('failed')")
        assert browser.run(f"{part('list')}.children.length") == 1
        server.start()
        browser.run(f"{delete}.click()")
        browser.until(f"{part('jobs')}.hidden")
        assert not any((server.data / "jobs").iterdir())
    finally:
        server.stop()


@pytest.mark.wide
@pytest.mark.timeout(300)
def test_the_labels_of_a_group_have_one_note(browser: DrivenBrowser, tmp_path: Path) -> None:
    """The page counts the notes of a job, and lists each once."""
    model = small(labels=["kidney_left", "kidney_right"], trained_labels=[])
    model.text_bank.set(torch.randn(2, 12, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "model")
    MoMEProcessor(spacing=[8, 8, 8]).save_pretrained(tmp_path / "model")
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(patient_bytes(), 1))
    part = "document.querySelector('[data-server={}]')".format
    server = Server(tmp_path / "model", tmp_path / "server", token=None)
    try:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.until(f"!{part('request')}.hidden")
        browser.choose("[data-server=files]", tmp_path / "scan.nii.gz")
        browser.run(f"{part('prompts')}.value = 'kidneys'; {part('start')}.click()")
        browser.until("document.documentElement.dataset.state === 'ready'")
        said = browser.run(f"{part('list')}.querySelector('.state').textContent")
        listed = browser.run("document.querySelectorAll('.warning').length")
        browser.run("HTMLAnchorElement.prototype.click = function () { window.saved = this.download; }")
        browser.run(f"[...{part('list')}.querySelectorAll('button')].find((one) => one.textContent === 'JSON').click()")
        browser.until("window.saved")
        saved = browser.run("window.saved")
    finally:
        server.stop()
    assert said.startswith("2 structures, ") and said.endswith(" 1 note") and listed == 1, (said, listed)
    assert saved == "scan_mome_json.json"  # files of two patients have two names


@pytest.mark.wide
@pytest.mark.timeout(300)
def test_a_list_of_structures_that_is_cut_says_so(server: Server, browser: DrivenBrowser) -> None:
    """Systems that hide scroll bars showed four lines of a longer list and nothing else."""
    part = "document.querySelector('[data-server={}]')".format
    labels = part("labels")
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.until(f"!{part('login')}.hidden")
    browser.run(f"{part('token')}.value = '{TOKEN}'; {part('login')}.querySelector('button').click()")
    browser.until(f"!{part('request')}.hidden && {labels}.children.length > 0")
    few = browser.run(f"{labels}.children.length")
    assert browser.run(f"{part('more')}.hidden && {labels}.scrollHeight <= {labels}.clientHeight")
    browser.run(f"for (let n = 0; n < 150; n++) {labels}.append({labels}.firstChild.cloneNode(true))")
    browser.until(f"{part('more')}.innerText === '{few + 150} structures, scroll the list for more'", 20)
    assert browser.run(f"{labels}.scrollHeight > {labels}.clientHeight")
    browser.run(f"{labels}.replaceChildren({labels}.firstChild)")
    browser.until(f"{part('more')}.hidden", 20)
