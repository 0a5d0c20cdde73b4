"""The command lets torch's threads sleep while they wait, unless the user says otherwise or torch is there already."""

import os
import sys
from unittest import mock

import pytest

from rmx import cli
from rmx.openmp import CHOSEN_BY_THE_USER, let_threads_sleep


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing, before torch is loaded."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in CHOSEN_BY_THE_USER})
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != "torch"})
    return monkeypatch


@pytest.mark.usefixtures("bare")
def test_the_command_sets_it_before_any_command_runs() -> None:
    seen = []
    with mock.patch.object(cli, "app", side_effect=lambda: seen.append(os.environ.get("OMP_WAIT_POLICY"))):
        cli.main()
    assert seen == ["passive"]


@pytest.mark.parametrize("name", CHOSEN_BY_THE_USER)
def test_what_the_user_says_stands(bare: pytest.MonkeyPatch, name: str) -> None:
    os.environ[name] = "1"
    let_threads_sleep()
    assert [key for key in CHOSEN_BY_THE_USER if key in os.environ] == [name] and os.environ[name] == "1"


def test_it_is_left_where_torch_is_loaded(bare: pytest.MonkeyPatch) -> None:
    sys.modules["torch"] = object()  # type: ignore[assignment]
    let_threads_sleep()
    assert "OMP_WAIT_POLICY" not in os.environ
