import json
import math
import random
import time

import numpy as np
import pytest
import torch

from bench.race import __main__ as race
from bench.race import ours, rivals
from bench.race.__main__ import main
from bench.race.contestant import Plan, Setting, faster_dtype, measure, windows
from bench.race.heat import Heat, read_all
from bench.race.ours import parse_flags
from bench.race.rivals import RIVALS, count, nearest_width, rate_factor
from bench.race.tuning import DROPOUTS, MOST_RATES, RATES, best_dropout, best_rate, tune
from runtime.errors import UserError
from training.data import Corpus, Region
from training.options import resolve_options

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
    command = ["--data", str(data), "--output", str(tmp_path / "race"), *QUICK, f"--ours={TINY}"]
    main(command)
    table = capsys.readouterr().out
    results = read_all(tmp_path / "race")
    raced = {result["heat"]["model"]: result for result in results if result["heat"]["measured"] == "held-out"}
    assert set(raced) == {"ours", *RIVALS} and all(result["heat"]["minutes"] == 0.005 for result in raced.values())
    for name, result in raced.items():
        loss = result["loss"]
        assert loss["windows"] < math.log(256) + 0.5 and (loss["carried"] is not None) == (name in ("ours", "gru"))
        assert f"{loss['windows']:.4f}" in table and f"{loss['windows'] / math.log(2):.4f}" in table
        assert result["wall_s"] >= 0.3 and result["steps"] > 0 and result["cpu_s_a_thread"] > 0
        tried = {minutes: {Setting(r["told"]["rate"], r["told"]["dropout"]): r["loss"]["windows"] for r in results
                           if (r["heat"]["model"], r["heat"]["measured"], r["heat"]["minutes"])
                           == (name, "tuning", minutes)} for minutes in (0.001, 0.005)}  # fmt: skip
        rates, dropouts, chosen = *tried.values(), Setting(result["told"]["rate"], result["told"]["dropout"])
        assert {Setting(rate, 0.0) for rate in RATES} <= set(rates) and len(rates) <= MOST_RATES
        assert rates[chosen._replace(dropout=0.0)] == min(rates.values())
        if name != "mingru_pytorch":
            assert {setting.dropout for setting in dropouts} >= set(DROPOUTS)
            assert dropouts[chosen] == min(dropouts.values())
    assert raced["ours"]["bytes_seen"] == 2 * 16 * raced["ours"]["steps"]

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "race").iterdir()}
    main(command)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "race").iterdir()} == written
    with_setting = [*command, "--models", "ours", "--setting", "0.01", "0.1"]
    main([*with_setting, "--seeds", "2", "--curve", "0.1"])
    main([*with_setting, "--clock", "cpu", "--seeds", "3"])
    assert len(written) + 2 == len(list((tmp_path / "race").iterdir()))
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
    rival = rivals.plan(name, 90_000, Setting(5e-3, 0.1 * RIVALS[name].drops)).build(halves[0], 1)
    rival._model.eval()
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
        parameters = count(RIVALS[name].build(nearest_width(name, 1_900_000), 0.1))
    assert abs(parameters / 1_900_000 - 1) < 0.03


def test_race_rate_rises_then_falls_to_a_tenth():
    factors = [rate_factor(spent / 100) for spent in range(101)]
    assert factors[0] == 0.01 and factors[5] == max(factors) == 1 and factors[100] == pytest.approx(0.1)
    assert factors[:6] == sorted(factors[:6]) and factors[5:] == sorted(factors[5:], reverse=True)


def test_race_ours_is_what_train_py_would_build():
    given = parse_flags("--enable-conv --sf_beta 0.8 --dtype bf16", 1_900_000)
    assert given == {"enable_conv": True, "sf_beta": 0.8, "dtype": "bf16", "params": 1_900_000}
    assert "params" not in parse_flags("--dim 64", 1_900_000)
    for flags in ("--train_steps 5", "--lr 1e-2", "--dropout 0.1"):
        with pytest.raises(UserError, match=flags.split()[0]):
            parse_flags(flags, 1_900_000)


def test_race_ours_is_named_by_the_options_in_force(monkeypatch):
    def options(flags, rate=0.01, dropout=0.1):
        return ours.plan(parse_flags(flags, 1_900_000), Setting(rate, dropout)).options

    usual = options("")
    assert usual["lr"] == 0.01 and usual["dropout"] == 0.1 and "seed" not in usual
    assert options("--lane_groups 16 --params 1900000") == usual
    assert len({options(flags)["dtype"] for flags in ("", "--dtype fp32", "--dtype bf16")}) == 3
    for flags in ("--lane_groups 4", "--batch_size 4", "--warmup_steps 5", "--no_enable_conv", "--ff_mult 3",
                  "--dim 96", "--expansion_factor 2", "--sf_beta 0.8", "--weight_decay 0.2", "--dtype bf16",
                  "--no_schedulefree"):  # fmt: skip
        assert options(flags) != usual, flags
    assert options("", rate=0.02) != usual != options("", dropout=0.0)

    def with_another_default(given):
        resolved = resolve_options(given)
        resolved.optimizer.warmup_steps += 1
        return resolved

    monkeypatch.setattr(ours, "resolve_options", with_another_default)
    assert options("") != usual


def test_race_tunes_every_contestant_on_training_bytes_only(data, tmp_path, monkeypatch):
    seen = []

    def plan(*arguments):
        setting = arguments[-1]
        return Plan({"setting": list(setting)}, lambda region, seed: FakeContestant(region, setting))

    def run(heat, contestant, unseen, folder, curve):
        seen.append((heat, contestant.region, unseen))
        loss = math.nan if contestant.setting.rate < 1e-3 else contestant.setting.rate - contestant.setting.dropout
        return {"loss": {"windows": loss}, "steps": 1}

    monkeypatch.setattr(race.ours, "plan", plan)
    monkeypatch.setattr(race.rivals, "plan", plan)
    monkeypatch.setattr(race, "run", run)
    main(["--data", str(data), "--output", str(tmp_path), "--minutes", "8"])
    size = data.stat().st_size
    for heat, region, unseen in seen:
        assert region.begin == 0 and region.end == unseen.begin
        assert (unseen.end == size) == (heat.measured == "held-out") and unseen.end in (size, int(0.9 * size))
    for name in race.MODELS:
        own = [(heat.measured, heat.minutes, *heat.options["setting"]) for heat, _, _ in seen if heat.model == name]
        dropout = 0.0 if name == "mingru_pytorch" else 0.4
        rates = [("tuning", 2, rate, 0.0) for rate in (2e-3, 4e-3, 8e-3, 1e-3, 5e-4)]
        tried = [("tuning", 8, 1e-3, chance) for chance in (0.0, 0.1, 0.2, 0.3, 0.4) if dropout]
        assert own == [*rates, *tried, ("held-out", 8, 1e-3, dropout)]


class FakeContestant:
    parameters, told = 0, {}

    def __init__(self, region, setting):
        self.region, self.setting = region, setting


@pytest.mark.parametrize(
    "best, tried, found",
    [(4e-3, 3, 4e-3), (1e-3, 5, 1e-3), (8e-3, 4, 8e-3), (3.2e-2, 6, 3.2e-2), (1.0, 6, 6.4e-2), (1e-9, 6, 2.5e-4)],
)
def test_race_grid_of_rates_grows_until_its_best_is_inside(best, tried, found):
    losses = {}

    def loss(rate):
        assert rate not in losses
        losses[rate] = abs(math.log(rate / best))
        return losses[rate]

    assert best_rate(loss) == pytest.approx(found) and len(losses) == tried


def test_race_dropout_is_chosen_in_trials_as_long_as_the_race():
    asked = []

    def loss(setting, minutes):
        asked.append((setting, minutes))
        return abs(setting.rate - 4e-3) + abs(setting.dropout - 0.2)

    assert tune(loss, 7, 2, drops=True) == Setting(4e-3, 0.2) and len(asked) == 7
    assert [minutes for setting, minutes in asked] == [2, 2, 2, 7, 7, 7, 7]
    assert tune(loss, 7, 2, drops=False) == Setting(4e-3, 0.0) and len(asked) == 10


@pytest.mark.parametrize("best, tried, found", [(0.0, 2, 0.0), (0.1, 3, 0.1), (0.3, 5, 0.3), (0.9, 5, 0.4)])
def test_race_dropouts_go_on_while_the_highest_is_the_best(best, tried, found):
    losses = {}

    def loss(dropout):
        assert dropout not in losses
        losses[dropout] = abs(dropout - best)
        return losses[dropout]

    assert best_dropout(loss) == found and len(losses) == tried


@pytest.mark.parametrize("slow, expected", [("fp32", "bf16"), ("bf16", "fp32")])
def test_race_dtype_is_the_faster_one(slow, expected):
    assert faster_dtype(lambda dtype: time.sleep(0.05 if dtype == slow else 0)) == expected


def test_race_mingru_pytorch_trains_in_float32_and_its_results_say_so(halves, monkeypatch):
    pytest.importorskip("minGRU_pytorch")
    monkeypatch.setattr(rivals, "faster_dtype", lambda train: "bf16")
    for name, expected in (("mingru_pytorch", "fp32"), ("gru", "bf16")):
        plan = rivals.plan(name, 30_000, Setting(0.01, 0.0))
        assert plan.build(halves[0], 1).told["dtype"] == expected
        assert plan.options.get("dtype") == (expected if expected == "fp32" else None)


@pytest.mark.parametrize("chosen", ["fp32", "bf16"])
def test_race_ours_trains_in_the_faster_dtype_and_finding_it_leaves_no_trace(halves, monkeypatch, chosen):
    def choose(train):
        train("fp32"), train("bf16")
        return chosen

    monkeypatch.setattr(ours, "faster_dtype", choose)
    losses = []
    for flags in (TINY, f"{TINY} --dtype {chosen}"):
        contestant = ours.plan(parse_flags(flags, 0), Setting(0.01, 0.0)).build(halves[0], 1)
        assert contestant.told["dtype"] == chosen
        for _ in range(3):
            contestant.train_step(0.0)
        losses.append(measure(contestant, halves[1]))
    assert losses[0] == losses[1]


def test_race_ours_repeats_and_seeds_differ(halves):
    losses = []
    for seed in (1, 1, 2):
        contestant = ours.plan(parse_flags(f"{TINY} --dtype fp32", 0), Setting(0.01, 0.1)).build(halves[0], seed)
        for _ in range(3):
            contestant.train_step(0.0)
        losses.append(measure(contestant, halves[1]))
    assert losses[0] == losses[1] != losses[2]


def test_race_results_are_named_by_all_that_they_depend_on(tmp_path):
    base = {"model": "gru", "minutes": 1, "clock": "wall", "seed": 1, "threads": 1, "fingerprint": "a",
            "measured": "held-out", "options": {"rate": 0.1}}  # fmt: skip
    changes = {"model": "ours", "minutes": 2, "clock": "cpu", "seed": 2, "threads": 2, "fingerprint": "b",
               "measured": "tuning", "options": {"rate": 0.2}}  # fmt: skip
    paths = {Heat(**base).path(tmp_path)} | {Heat(**base | {k: v}).path(tmp_path) for k, v in changes.items()}
    assert len(paths) == 1 + len(changes)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ([], "--data"),
        (["--data", "absent.txt"], "absent.txt"),
        (["--minutes", "0", "--table"], "above 0"),
        (["--models", "everyone"], "--models"),
        (["--data", "absent.txt", "--setting", "0.01", "1"], "dropout in"),
        (["--data", __file__, "--models", "ours", "mingru_pytorch", "--setting", "0.01", "0.1"], "which has none"),
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
