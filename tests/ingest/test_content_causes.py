"""The doctor's causes of the list, the pictures and the settings."""

import dataclasses
from typing import TYPE_CHECKING

import pytest

from declip_ingest.causes import Evidence
from declip_ingest.doctor import rank_causes
from declip_ingest.repeats import RepeatedImage
from declip_ingest.stages import DownloadShards

if TYPE_CHECKING:
    from tests.ingest.ledger_tables import CONTENT_TROUBLES, rows, stats_of, web
else:
    # conftest.py puts this folder on the path.
    from ledger_tables import CONTENT_TROUBLES, rows, stats_of, web

INGEST = DownloadShards(root="x")


def causes(*made, ingest=INGEST, repeats=()):
    return rank_causes(Evidence(stats=stats_of(*made), ingest=ingest, repeats=repeats))


@pytest.mark.parametrize("name", CONTENT_TROUBLES)
def test_a_ledger_made_to_show_one_trouble_is_told_as_that_trouble(name):
    assert [cause.name for cause in causes(*CONTENT_TROUBLES[name])] == [name]


def test_the_settings_that_refuse_are_named_with_their_values():
    ingest = dataclasses.replace(INGEST, min_image_size=200, max_aspect_ratio=3.0)
    made = [web(), rows(200, "image_too_small"), rows(90, "aspect_ratio_too_large")]
    (cause,) = causes(*made, ingest=ingest)
    assert "--ingest.min-image-size is 200" in cause.evidence[0]
    assert "--ingest.max-aspect-ratio is 3.0" in cause.evidence[1]


def test_the_column_of_hashes_is_named():
    ingest = dataclasses.replace(INGEST, hash_column="md5_of_page")
    (cause,) = causes(*CONTENT_TROUBLES["wrong_hash_column"], ingest=ingest)
    assert "'md5_of_page'" in cause.title
    assert "400 of 460 (87 %)" in cause.evidence[0]


def test_pictures_from_many_urls_are_a_cause_though_their_rows_succeeded():
    image = RepeatedImage(sha256="ab" * 32, num_urls=40, key="000010005", url="http://x/1.jpg")
    (cause,) = causes(web(), repeats=[image])
    assert (cause.name, cause.num_rows) == ("placeholders", 40)
    assert "000010005" in cause.evidence[0]


def test_a_killed_decoder_is_given_more_of_what_it_lacked():
    (cause,) = causes(*CONTENT_TROUBLES["decoder_trouble"])
    assert cause.remedy == (
        "declip refetch --reason decoder --ingest.decode-timeout-seconds 60 "
        f"--ingest.decode-memory-bytes {2 << 30}",
    )


def test_hosts_without_a_robots_file_are_tried_again():
    (cause,) = causes(web(), rows(60, "robots_unavailable"))
    assert "declip refetch --reason robots_unavailable" in cause.remedy
