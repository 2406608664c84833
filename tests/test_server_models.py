"""A server with several models: the prompts choose one, or the client names it."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from driven_browser import DrivenBrowser
from server_process import TOKEN, Server, save_model
from small_models import liver_and_spleen
from small_scans import large_body, patient_bytes

from mome import MoMEProcessor
from mome.cli.main import main
from mome.errors import InputError
from mome.server.served_models import ServedModels
from mome.server.settings import ServerSettings

pytest.importorskip("fastapi", reason="the server needs mome[serve]")
pytest.importorskip("uvicorn", reason="the server needs mome[serve]")
pytest.importorskip("python_multipart", reason="the server needs mome[serve]")


def stand_in(*trained: str) -> SimpleNamespace:
    config = SimpleNamespace(labels=[*trained, "aorta"], trained_labels=list(trained), synonyms=None)
    return SimpleNamespace(model=SimpleNamespace(config=config), processor=SimpleNamespace(spacing=[2.0, 2.0, 3.0]))


def test_prompts_choose_the_model_that_knows_them() -> None:
    models = ServedModels({"neck": stand_in("mandible", "spinal_cord"), "torso": stand_in("liver", "spinal_cord")})
    assert models.choose(["Mandible"], None) == ("neck", "the model is neck, which was trained on mandible")
    assert models.choose(["hepar", "aorta"], None)[0] == "torso"
    assert models.choose(["spinal cord"], None)[0] == "neck" and models.choose(["a stone"], None) == ("neck", None)
    assert models.choose(["liver"], "neck") == ("neck", None)  # the client's own choice needs no note
    with pytest.raises(InputError, match="no model of this server knows both 'mandible' and 'liver'"):
        models.choose(["mandible", "liver"], None)
    with pytest.raises(InputError, match="this server has no model 'heart'"):
        models.choose(["liver"], "heart")
    able = models.able()
    assert able["model"] == "neck" and list(able["models"]) == ["neck", "torso"]
    assert able["trained_labels"] == ["mandible", "spinal_cord", "liver"]
    assert able["models"]["torso"] == {
        "labels": ["liver", "spinal_cord", "aorta"],
        "trained_labels": ["liver", "spinal_cord"],
        "spacing_mm": [2.0, 2.0, 3.0],
    }
    assert ServedModels({"neck": stand_in("mandible")}).choose(["liver"], None) == ("neck", None)


def test_labels_that_the_class_table_reads_otherwise_go_to_their_model() -> None:
    """The class table reads "kidneys" as left and right; a model that has a label of this very name is meant."""
    models = ServedModels({"first": stand_in("kidney_left", "kidney_right"), "own": stand_in("renal", "kidneys")})
    assert models.choose(["kidneys"], None)[0] == models.choose([" kidneys "], None)[0] == "own"
    assert models.choose(["left kidney"], None)[0] == "first"


def test_the_current_folder_has_a_name(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(save_model(tmp_path / "mine"))
    assert list(ServedModels.load(["."]).able()["models"]) == ["mine"]


def test_all_bundled_models_are_served_if_none_is_named() -> None:
    assert ServerSettings().models == ("mome-ct-tiny", "mome-ct-torso-tiny")


def test_two_models_of_one_name_are_refused(capsys, tmp_path: Path) -> None:
    for folder in (tmp_path / "a" / "m", tmp_path / "b" / "m"):
        save_model(folder)
    code = main(["serve", "-m", str(tmp_path / "a" / "m"), "-m", str(tmp_path / "b" / "m"), "--port", "0"])
    assert code == 2 and "two models have the name 'm'" in capsys.readouterr().err


def start_both(folder: Path) -> Server:
    spleen = liver_and_spleen()
    spleen.config.trained_labels = ["spleen"]
    torch.manual_seed(32)
    spleen.text_bank.set(4 * torch.randn(2, 6))
    spleen.save_pretrained(folder / "spleen")
    MoMEProcessor(spacing=[8, 8, 8]).save_pretrained(folder / "spleen")
    return Server(save_model(folder / "liver"), folder / "server", "-m", str(folder / "spleen"))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the small model of other tests, and of one that was trained on the spleen."""
    server = start_both(tmp_path_factory.mktemp("models"))
    yield server
    server.stop()


@pytest.mark.wide
@pytest.mark.timeout(400)
def test_a_job_of_a_model_that_is_served_no_more_fails(tmp_path: Path, ct: bytes) -> None:
    longer = gzip.compress(patient_bytes(large_body()), 1)
    server = start_both(tmp_path)
    server.wait(server.submit([("ct", longer)]).json["id"], ("running",))
    named, free = (server.submit([("ct", ct)], ["spleen"], **how).json["id"] for how in ({"model": "spleen"}, {}))
    server.kill()
    server = Server(tmp_path / "liver", tmp_path / "server")  # with the same queue
    assert server.wait(named)["error"]["what"] == "this server has no model 'spleen'"
    found = server.wait(free)["result"]
    assert found["model"] == "liver" and "not trained on 'spleen'" in found["structures"][0]["warning"]
    server.stop()


def test_jobs_run_in_the_model_that_was_chosen(both: Server, ct: bytes) -> None:
    liver, spleen = both.run(ct), both.run(ct, ["spleen"])
    assert (liver["result"]["model"], spleen["result"]["model"]) == ("liver", "spleen")
    assert "the model is spleen, which was trained on spleen" in spleen["result"]["notes"]
    assert not any(structure["warning"] for structure in spleen["result"]["structures"])
    named = both.run(ct, ["spleen"], model="liver")["result"]
    assert named["model"] == "liver" and named["structures"][0]["warning"]
    refused = both.submit([("ct", ct)], ["liver", "spleen"])
    assert refused.status == 422 and "knows both 'liver' and 'spleen'" in refused.json["what"]
    assert "model=liver" in refused.json["hint"]
    assert both.submit([("ct", ct)], ["liver"], model="kidney").json["what"] == "this server has no model 'kidney'"


@pytest.mark.wide
@pytest.mark.timeout(300)
def test_the_page_offers_the_models(both: Server, tmp_path: Path) -> None:
    scan = tmp_path / "a.nii.gz"
    scan.write_bytes(gzip.compress(patient_bytes(), 1))
    part = "document.querySelector('[data-server={}]')".format
    browser = DrivenBrowser()
    try:
        browser.open(f"http://127.0.0.1:{both.port}/")
        browser.until(f"!{part('login')}.hidden")
        browser.run(f"{part('token')}.value = '{TOKEN}'; {part('login')}.querySelector('button').click()")
        browser.until(f"!{part('request')}.hidden")
        assert browser.run(f"{part('labels')}.innerText").split() == ["liver", "spleen"]
        browser.run(
            f"const choice = {part('model')}.querySelector('select'); choice.value = 'spleen';"
            "choice.dispatchEvent(new Event('change'))"
        )
        assert browser.run(f"{part('labels')}.innerText").split() == ["spleen"]
        browser.choose("[data-server=files]", scan)
        browser.run(f"{part('prompts')}.value = 'liver'; {part('start')}.click()")
        browser.until("document.documentElement.dataset.state === 'ready'")
        assert "not trained on 'liver'" in browser.run("document.body.innerText")  # else the model liver is taken
    finally:
        browser.close()


def test_clients_of_monai_label_name_the_model(both: Server, ct: bytes) -> None:
    models = both.ask("GET", "/info/").json["models"]
    assert {name: each["labels"] for name, each in models.items()} == {"liver": {"liver": 1}, "spleen": {"spleen": 1}}
    for name in models:
        answer = both.submit([("ct.nii.gz", ct)], [], f"/infer/{name}?output=json", params="{}")
        assert answer.status == 200 and answer.json["label_names"] == {name: 1}, answer.body
