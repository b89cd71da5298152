"""Damaged files and killed writers, in short; benchmarks/disk_tier.py --only harm runs more."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "disk_damage.py"


def harm(what, count, folder):
    """Run in a child, since what must not happen may end the process."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(count), "1", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def fast_folder(tmp_path):
    """A folder in memory where there is one: 300 openings would wait for 2,000 syncs."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_a_flipped_bit_is_a_miss_or_a_new_index(fast_folder):
    found = harm("flips", 300, fast_folder)
    assert found["runs"] == 300
    assert found["misses"] > 0
    assert found["rebuilds"] > 0
    assert found["hits"] > 30 * found["runs"]  # of 37 records: a flip costs its own record only


def test_a_truncated_file_is_misses_or_a_new_index(fast_folder):
    found = harm("truncations", 50, fast_folder)
    assert found["runs"] == 50
    assert found["misses"] > 0
    assert found["rebuilds"] > 0


def test_a_killed_writer_loses_nothing_that_was_durable(tmp_path):
    found = harm("kills", 20, tmp_path)
    assert found["kills"] == 20
    assert found["durable"] > 100
