"""The fake packages: the same bytes every time, and in the place of every real one."""

from pipelines.demo_fakes import make_fake_packages
from pipelines.demo_packages import PACKAGES, fetch_packages


def test_fakes_are_the_same_every_time(tmp_path):
    first, _ = make_fake_packages(tmp_path / "a")
    second, _ = make_fake_packages(tmp_path / "b")
    assert first == second
    assert set(first) == set(PACKAGES)


def test_client_brings_what_the_table_pins(tmp_path):
    packages, client = make_fake_packages(tmp_path / "origin")
    paths = fetch_packages(packages, tmp_path / "cache", client=client)
    assert set(paths) == set(PACKAGES)
