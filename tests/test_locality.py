"""Which cores go to which rank."""

import os
import subprocess
import sys

import pytest

from runtime.errors import UserError
from runtime.locality import bound, bus_addresses, cores_near, format_cores, parse_cores, share
from tests.ranks import ROOT, clean_environment

# nvidia-smi --query-gpu=uuid,pci.bus_id --format=csv,noheader
LISTING = "GPU-aa, 00000000:1B:00.0\nGPU-bb, 00000000:1C:00.0\nGPU-cc, 00010000:9A:00.0\n"


@pytest.fixture
def machine(tmp_path):
    """Two GPUs near cores 0-3 and 8-11, one near 4-7 and 12-15; core c and c + 8 are one physical core."""
    for address, near in (("0000:1b:00.0", "0-3,8-11"), ("0000:1c:00.0", "0-3,8-11"), ("10000:9a:00.0", "4-7,12-15")):
        (tmp_path / "pci" / address).mkdir(parents=True)
        (tmp_path / "pci" / address / "local_cpulist").write_text(near + "\n")
    for core in range(16):
        (tmp_path / "cpus" / f"cpu{core}" / "topology").mkdir(parents=True)
        siblings = f"{core % 8},{core % 8 + 8}\n"
        (tmp_path / "cpus" / f"cpu{core}" / "topology" / "thread_siblings_list").write_text(siblings)
    return {"pci": tmp_path / "pci", "cpus": tmp_path / "cpus"}


@pytest.mark.parametrize("text, cores", [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("0-1,4-5", {0, 1, 4, 5})])
def test_core_lists_are_read_and_written(text, cores):
    assert parse_cores(text) == cores
    assert format_cores(cores) == text.strip()


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "0,,1", "3000000000"])
def test_core_lists_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="expected a list of cores"):
        parse_cores(text)


def test_bus_addresses_are_the_kernels():
    assert bus_addresses(LISTING) == {"aa": "0000:1b:00.0", "bb": "0000:1c:00.0", "cc": "10000:9a:00.0"}


def test_gpus_that_share_cores_get_whole_physical_ones(machine):
    found = cores_near(["aa", "bb", "cc"], bus_addresses(LISTING), set(range(16)), **machine)
    assert [format_cores(cores) for cores in found] == ["0-1,8-9", "2-3,10-11", "4-7,12-15"]


def test_visible_gpus_alone_share_in_their_own_order(machine):
    found = cores_near(["cc", "bb"], bus_addresses(LISTING), set(range(16)), **machine)
    assert [format_cores(cores) for cores in found] == ["4-7,12-15", "0-3,8-11"]


def test_cores_that_may_not_be_used_are_left_out(machine):
    usable = {0, 8, 2, 10}
    found = cores_near(["aa", "bb", "cc"], bus_addresses(LISTING), usable, **machine)
    assert [format_cores(cores) for cores in found] == ["0,8", "2,10", "0,8"]  # nothing near the third is usable
    assert cores_near(["dd"], bus_addresses(LISTING), usable, **machine) == [usable]  # nothing is known of it


def test_fewer_cores_than_ranks_are_shared(machine):
    assert share([0, 8], 3, machine["cpus"]) == [{0, 8}] * 3


def test_bound_holds_for_what_is_started_in_the_block():
    before = os.sched_getaffinity(0)
    with bound({min(before)}):
        said = subprocess.run(
            [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], capture_output=True, text=True
        ).stdout
    assert said == f"{ {min(before)} }\n" and os.sched_getaffinity(0) == before


def test_launch_binds_each_rank_to_its_cores(tmp_path):
    last = max(os.sched_getaffinity(0))
    script = tmp_path / "script.py"
    script.write_text("import os; os.write(1, f'{sorted(os.sched_getaffinity(0))}\\n'.encode())")
    command = [sys.executable, "-m", "runtime.launch", "--ranks", "2", "--cores", "0", str(last), "--", str(script)]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == sorted(["[0]", f"[rank 1] [{last}]"])
