import json
import math
import random

import numpy as np
import pytest
import torch

from bench.race import rivals
from bench.race.__main__ import main
from bench.race.contestant import measure, windows
from bench.race.heat import Heat, read_all
from bench.race.ours import Ours, parse_flags
from bench.race.rivals import RIVALS, Rival, count, nearest_width, rate_factor
from runtime.errors import UserError
from training.data import Corpus, Region

QUICK = ["--minutes", "0.005", "--rate_minutes", "0.001", "--params", "90000", "--threads", "1"]
TINY = "--dim 16 --depth 1 --batch_size 2 --chunk_size 16"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("race") / "text"
    path.write_text("".join(random.Random(1).choices(["the ", "cat ", "sat ", "on ", "a ", "mat.\n"], k=4000)))
    return path


@pytest.fixture(scope="module")
def halves(data):
    return Corpus([data], None).split(0.1)


class Guesser:
    """Gives the byte before the share `p`, the others the rest alike; its state counts the chunks of a lane."""

    parameters, carries, told = 0, True, {}

    def loss(self, chunk, state):
        ids_BS = torch.from_numpy(chunk.ids_BS)
        same = (ids_BS[:, 1:] == ids_BS[:, :-1]).float()
        seen = 0 if state is None else state
        return (-same * math.log(0.5) - (1 - same) * math.log(0.5 / 255)).mean() - 0.01 * min(seen, 1), seen + 1


@pytest.fixture
def quick(monkeypatch):
    """Small batches, one thread."""
    monkeypatch.setattr(rivals, "BATCH", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_race_runs_every_model_once_and_reports_each(data, tmp_path, capsys, quick):
    command = ["--data", str(data), "--output", str(tmp_path / "race"), *QUICK, f"--ours={TINY} --lr 1e-2"]
    main(command)
    table = capsys.readouterr().out
    results = read_all(tmp_path / "race")
    raced = {result["heat"]["model"]: result for result in results if result["heat"]["minutes"] == 0.005}
    assert set(raced) == {"ours", *RIVALS} and len(results) == 4 + 2 * 3
    for name, result in raced.items():
        loss = result["loss"]
        assert loss["windows"] < math.log(256) + 0.5 and (loss["carried"] is not None) == (name in ("ours", "gru"))
        assert f"{loss['windows']:.4f}" in table and f"{loss['windows'] / math.log(2):.4f}" in table
        assert result["wall_s"] >= 0.3 and result["steps"] > 0 and result["cpu_s_a_thread"] > 0
        tried = {r["heat"]["rate"]: r["loss"]["windows"] for r in results
                 if r["heat"]["model"] == name and r["heat"]["minutes"] == 0.001}  # fmt: skip
        if name != "ours":
            assert set(tried) == set(RIVALS[name].rates) and tried[result["heat"]["rate"]] == min(tried.values())
    assert raced["ours"]["bytes_seen"] == 2 * 16 * raced["ours"]["steps"] and raced["ours"]["told"]["rate"] == 0.01

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "race").iterdir()}
    main(command)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "race").iterdir()} == written
    main([*command, "--models", "ours", "--seeds", "2", "--curve", "0.1"])
    assert len(written) + 1 == len(list((tmp_path / "race").iterdir()))
    main([*command, "--models", "ours", "--clock", "cpu", "--seeds", "3"])
    (third,) = (r for r in read_all(tmp_path / "race") if r["heat"]["seed"] == 3)
    assert third["cpu_s_a_thread"] >= 0.3 and third["heat"]["clock"] == "cpu"
    (second,) = (r for r in read_all(tmp_path / "race") if r["heat"]["seed"] == 2)
    times = [point["seconds"] for point in second["curve"]]
    assert times == sorted(times) and 0.1 <= times[0] and times[-1] < second["wall_s"] and len(times) >= 2


def test_race_measures_every_byte_and_carries_the_state(halves):
    held_out = Region(halves[0].corpus, 0, 16 * 600 + 1)
    content = held_out.read(0, len(held_out))
    same = np.mean(content[1:] == content[:-1])
    expected = -same * math.log(0.5) - (1 - same) * math.log(0.5 / 255)
    measured = measure(Guesser(), held_out)
    assert measured["windows"] == pytest.approx(expected, abs=1e-6)  # and no state ever comes in
    assert measured["carried"] == pytest.approx(expected - 0.01 * (600 - 256) / 600, abs=1e-6)


@pytest.mark.parametrize("length", [2, 257, 258, 256 * 64 + 1, 256 * 130 + 7])
def test_race_windows_have_every_byte_but_the_first_as_target_once(length):
    content = np.arange(length) % 251
    region = FakeRegion(content.astype(np.uint8))
    targets = np.concatenate([row[1:] for chunk in windows(region) for row in chunk.ids_BS])
    assert np.array_equal(targets, region.content[1:])


class FakeRegion:
    def __init__(self, content):
        self.content = content

    def __len__(self):
        return len(self.content)

    def read(self, begin, end):
        return self.content[begin:end]


@pytest.mark.parametrize("name", RIVALS)
def test_race_rivals_learn_and_see_nothing_ahead(name, halves, quick):
    rival = Rival(name, 90_000, max(RIVALS[name].rates), halves[0], seed=1)
    ids_BT = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))
    changed_BT = ids_BT.clone()
    changed_BT[:, 20] = (changed_BT[:, 20] + 1) % 256
    with torch.no_grad():
        before, after = rival._model(ids_BT)[0], rival._model(changed_BT)[0]
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-4)
    first = measure(rival, halves[1])["windows"]
    for _ in range(4):
        rival.train_step(0.1)
    assert measure(rival, halves[1])["windows"] < first - 0.3


@pytest.mark.parametrize("name", RIVALS)
def test_race_rivals_have_the_parameters_asked_for(name):
    with torch.device("meta"):
        parameters = count(RIVALS[name].build(nearest_width(RIVALS[name], 1_900_000)))
    assert abs(parameters / 1_900_000 - 1) < 0.03


def test_race_rate_rises_then_falls_to_a_tenth():
    factors = [rate_factor(spent / 100) for spent in range(101)]
    assert factors[0] == 0.01 and factors[5] == max(factors) == 1 and factors[100] == pytest.approx(0.1)
    assert factors[:6] == sorted(factors[:6]) and factors[5:] == sorted(factors[5:], reverse=True)


def test_race_ours_is_what_train_py_would_build():
    given = parse_flags("--enable-conv --lr 0.02 --dtype bf16", 1_900_000)
    assert given == {"enable_conv": True, "lr": 0.02, "dtype": "bf16", "params": 1_900_000}
    assert "params" not in parse_flags("--dim 64", 1_900_000)
    with pytest.raises(UserError, match="--train_steps"):
        parse_flags("--train_steps 5", 1_900_000)


def test_race_ours_repeats_and_seeds_differ(halves):
    losses = []
    for seed in (1, 1, 2):
        ours = Ours(parse_flags(TINY, 0), halves[0], seed)
        for _ in range(3):
            ours.train_step(0.0)
        losses.append(measure(ours, halves[1]))
    assert losses[0] == losses[1] != losses[2]


def test_race_results_are_named_by_all_that_they_depend_on(tmp_path):
    base = {"model": "gru", "minutes": 1, "clock": "wall", "seed": 1, "parameters": 5, "threads": 1, "fingerprint": "a",
            "rate": 0.1}  # fmt: skip
    changes = {"model": "ours", "minutes": 2, "clock": "cpu", "seed": 2, "parameters": 6, "threads": 2,
               "fingerprint": "b", "rate": 0.2, "flags": "--lr 1"}  # fmt: skip
    paths = {Heat(**base).path(tmp_path)} | {Heat(**base | {k: v}).path(tmp_path) for k, v in changes.items()}
    assert len(paths) == 1 + len(changes)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ([], "--data"),
        (["--data", "absent.txt"], "absent.txt"),
        (["--minutes", "0", "--table"], "above 0"),
        (["--models", "everyone"], "--models"),
    ],
)
def test_race_mistakes_are_one_line(flags, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint) as caught:
        main(flags)
    assert "\n" not in str(caught.value)


def test_race_a_damaged_result_is_named(tmp_path):
    (tmp_path / "gru_1min_wall_seed1_0.json").write_text(json.dumps({"heat": {"model": "gru"}}))
    with pytest.raises(UserError, match="gru_1min_wall_seed1_0"):
        main(["--table", "--output", str(tmp_path)])
