"""The benchmark's lists are what they say, and it counts what it reads."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sources.py"


@pytest.mark.slow
def test_every_kind_of_list_is_read(tmp_path):
    captions = pa.table({"caption": ["a red apple", "two dogs", "ein Haus, groß"]})
    pq.write_table(captions, tmp_path / "captions.parquet")
    kinds = ["cc12m_hashes", "yfcc15m_v1", "yfcc15m_v2", "datacomp", "csv"]
    call = [sys.executable, SCRIPT, "--captions", tmp_path / "captions.parquet", "--rows", "1000"]
    call += ["--kinds", *kinds, "--shard-size", "100", "--json", tmp_path / "out.json"]
    subprocess.run(call, check=True, capture_output=True, timeout=300)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["list"] for row in rows] == kinds
    for row in rows:
        assert row["num_rows"] == 1000
        assert row["num_kept"] + sum(row["reasons"].values()) == 1000
        assert row["num_tasks"] == -(-row["num_kept"] // 100)
        assert row["peak_mib"] > row["imported_mib"] > 0
    assert rows[0]["reasons"] == {"duplicate_url": 20, "missing_caption": 5, "missing_url": 5}
