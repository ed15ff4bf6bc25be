"""The stage: settings, counts, and the mark of done."""

import ast
import functools
import inspect
from dataclasses import fields
from typing import Any

import pytest

import pipelines.prepare as prepare_module
from declip_shards.errors import DeclipError
from declip_shards.stage import Stage
from pipelines.demo_data import DemoSettings, prepare_demo
from pipelines.demo_fakes import FAKE_SETTINGS, make_fake_packages
from pipelines.prepare import PrepareDemo

SMALL: dict[str, Any] = {
    "max_pairs": 60,
    "num_held_out_concepts": 2,
    "num_failures": 5,
    "num_junk": 2,
    "image_size": 16,
}


@pytest.fixture
def fake_packages(tmp_path, monkeypatch):
    packages, client = make_fake_packages(tmp_path / "origin")
    fake = functools.partial(prepare_demo, packages=packages, client=client, num_processes=1)
    monkeypatch.setattr(prepare_module, "prepare_demo", fake)
    monkeypatch.setenv("OPENDECLIP_CACHE", str(tmp_path / "cache"))


def test_it_is_a_stage(tmp_path):
    stage = PrepareDemo(root=str(tmp_path))
    assert isinstance(stage, Stage)
    assert (stage.num_cpus, stage.num_gpus) == (2, 0)
    assert stage.tasks() == ("all",)


def test_settings_are_the_demos_own(tmp_path):
    own = {f.name for f in fields(PrepareDemo)} - {"root"}
    assert own == {f.name for f in fields(DemoSettings)}
    stage = PrepareDemo(root=str(tmp_path), **SMALL)
    for name, value in SMALL.items():
        assert getattr(stage._settings(), name) == value
    assert PrepareDemo(root="x")._settings() == DemoSettings()


def test_root_is_no_part_of_the_fingerprint():
    by_name = {f.name: f for f in fields(PrepareDemo)}
    assert by_name["root"].metadata["fingerprint"] is False
    assert all("fingerprint" not in f.metadata for n, f in by_name.items() if n != "root")


def test_every_field_is_explained():
    (node,) = ast.parse(inspect.getsource(PrepareDemo)).body
    assert isinstance(node, ast.ClassDef)
    names = {f.name for f in fields(PrepareDemo)}
    for this, following in zip(node.body, node.body[1:]):
        if isinstance(this, ast.AnnAssign) and getattr(this.target, "id", "") in names:
            assert isinstance(following, ast.Expr)
            assert isinstance(following.value, ast.Constant)


def test_wrong_setting_is_refused_at_once():
    with pytest.raises(DeclipError, match="num_failures is -1"):
        PrepareDemo(root="x", num_failures=-1)


def test_task_leaves_the_mark_of_done_and_counts_that_add_up(fake_packages, tmp_path):
    stage = PrepareDemo(root=str(tmp_path / "out"), **SMALL)
    assert not stage.is_done("all")
    stats = stage.worker()("all")
    assert stage.is_done("all")
    assert stats.num_out == 60 + 5 + 2
    assert stats.num_in == stats.num_out + sum(stats.reasons.values())
    assert set(stats.reasons) == {"over_max_pairs"}
    for name in stats.files:
        assert (tmp_path / "out" / name).is_file()
    assert not PrepareDemo(root=str(tmp_path / "out"), **{**SMALL, "seed": 1}).is_done("all")
    assert stage.worker()("all") == stats


def test_nothing_left_out_is_no_reason(fake_packages, tmp_path):
    settings = {f.name: getattr(FAKE_SETTINGS, f.name) for f in fields(FAKE_SETTINGS)}
    stats = PrepareDemo(root=str(tmp_path / "out"), **settings).worker()("all")
    assert stats.reasons == {}
    assert stats.num_in == stats.num_out


def test_remote_root_is_refused():
    with pytest.raises(DeclipError, match="is not a local folder"):
        PrepareDemo(root="memory://demo").worker()
