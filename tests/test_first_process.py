"""Work of the first process that the others wait for, with the exchange of the processes played on one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from mome.data.cache_build import build_cache
from mome.errors import InputError
from mome.folder_lock import folder_lock
from mome.processing import MoMEProcessor
from mome.training import first_process
from mome.training.first_process import FirstProcessFailed, first_then_others


class Processes:
    """What is read of an Accelerator."""

    num_processes = 2

    def __init__(self, is_main: bool) -> None:
        self.is_main_process = is_main


def worked(progress: Any) -> int:
    return sum(progress([1, 2, 3]))


def unchanged(items: Iterable[Any]) -> Iterable[Any]:
    return items


def test_the_first_process_tells_of_every_item_and_the_others_begin_after_it(monkeypatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(first_process, "_exchanged", lambda state: (sent.append(state), state)[1])
    assert first_then_others(Processes(True), worked, unchanged) == 6
    assert sent == ["goes on", "goes on", "goes on", "done"]
    heard = iter(sent)
    monkeypatch.setattr(first_process, "_exchanged", lambda state: next(heard))
    assert first_then_others(Processes(False), worked, unchanged) == 6
    assert list(heard) == []


def test_an_error_of_the_first_process_reaches_the_others(monkeypatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(first_process, "_exchanged", lambda state: (sent.append(state), state)[1])

    def fails(progress: Any) -> None:
        for _ in progress([1, 2]):
            raise InputError("case 'a' is broken")

    with pytest.raises(InputError, match="^case 'a' is broken"):
        first_then_others(Processes(True), fails, unchanged)
    heard = iter(sent)
    monkeypatch.setattr(first_process, "_exchanged", lambda state: next(heard))
    with pytest.raises(FirstProcessFailed, match="could not prepare the data: case 'a' is broken"):
        first_then_others(Processes(False), fails, unchanged)


def test_two_builders_never_write_one_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mome.data.cache_build._WAIT_S", 0.1)
    processor = MoMEProcessor(spacing=[2, 2, 2], hu_window=[-200, 400])
    with folder_lock(tmp_path), pytest.raises(InputError, match="another process has been building caches here"):
        build_cache(tmp_path, "a", ["liver"], processor, [], "1")
    assert list(tmp_path.iterdir()) == []
