import contextlib
import pickle
import random
from pathlib import Path

import pytest
import torch

from mingru.minLM import MinLM, ModelConfig
from runtime.errors import UserError
from training.checkpoint import (
    CheckpointError,
    build_model,
    checkpoint_name,
    list_checkpoints,
    load_for_use,
    read_checkpoint,
    read_own_checkpoint,
    save_checkpoint,
)

CONFIG = ModelConfig(dim=16, depth=1)


def save(run_dir: Path, rank=0, step=1, loss: float | None = 1.0, fill=0.5) -> Path:
    weights = {name: torch.full_like(value, fill) for name, value in MinLM(CONFIG).state_dict().items()}
    return save_checkpoint(run_dir, rank, step, loss, CONFIG, weights, {"tensors": {}})


def test_checkpoint_name_is_read_back(tmp_path):
    assert checkpoint_name(0, 500, 1.23454) == "checkpoint_rank_0000_step_000500_loss_1.2345.pt"
    for rank, step, loss in [(0, 500, 1.2345), (511, 12, None), (12345, 12345678, 0.0)]:
        (tmp_path / checkpoint_name(rank, step, loss)).touch()
    found = {(file.rank, file.step, file.loss) for file in list_checkpoints(tmp_path)}
    assert found == {(0, 500, 1.2345), (511, 12, None), (12345, 12345678, 0.0)}


def test_list_checkpoints_passes_over_everything_else(tmp_path):
    path = save(tmp_path)
    (tmp_path / "best.pt").symlink_to(path.name)
    (tmp_path / "checkpoint_rank_0001_step_000001_loss_1.0000.pt").symlink_to(path.name)
    for name in ("archive_001.pt", f".{path.name}.123.tmp", "checkpoint_rank_0_step_1_loss_1.pt", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.path for file in list_checkpoints(tmp_path)] == [path]


def test_load_for_use_gives_the_stored_weights_of_a_file_or_a_run(tmp_path):
    worse, best = save(tmp_path, step=1, loss=2.0, fill=0.25), save(tmp_path, step=2, loss=1.0, fill=0.75)
    (tmp_path / "latest.pt").symlink_to(worse.name)
    model, info = load_for_use(tmp_path, torch.device("cpu"))
    assert info["path"].name == "latest.pt" and model.token_emb.weight[0, 0].item() == 0.25
    (tmp_path / "best.pt").symlink_to(best.name)
    model, info = load_for_use(tmp_path, torch.device("cpu"))
    assert not model.training and model.token_emb.weight[0, 0].item() == 0.75
    assert (info["step"], info["loss"]) == (2, 1.0)
    assert load_for_use(worse, torch.device("cpu"))[0].config == CONFIG


def test_load_for_use_refuses_a_folder_without_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match=r"best\.pt"):
        load_for_use(tmp_path, torch.device("cpu"))


class Malice:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def broken_files(tmp_path: Path) -> dict[str, Path]:
    good = save(tmp_path).read_bytes()
    contents = {
        "empty": b"",
        "text": b"This is no checkpoint.\n" * 100,
        "cut": good[: len(good) // 2],
        "cut at the end": good[:-20],
        "pickle": pickle.dumps({"model_state_dict": 1}),
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = tmp_path / f"{name}.pt"
        paths[name].write_bytes(content)
    paths["code"] = tmp_path / "code.pt"
    torch.save({"format": Malice()}, paths["code"])
    paths["list"] = tmp_path / "list.pt"
    torch.save([1, 2], paths["list"])
    paths["strange"] = tmp_path / "strange.pt"
    torch.save({"weights": torch.zeros(3)}, paths["strange"])
    paths["missing"] = tmp_path / "missing.pt"
    return paths


@pytest.mark.parametrize(
    "kind", ["empty", "text", "cut", "cut at the end", "pickle", "code", "list", "strange", "missing"]
)
def test_load_for_use_refuses_what_is_no_checkpoint_in_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_for_use(broken_files(tmp_path)[kind], torch.device("cpu"))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("expected")
    assert not Path("pwned").exists()


def test_build_model_refuses_weights_of_another_shape():
    weights = MinLM(ModelConfig(dim=32, depth=1)).state_dict()
    with pytest.raises(CheckpointError, match="fit"):
        build_model(CONFIG, weights, torch.device("cpu"))


def test_read_own_checkpoint_refuses_foreign_ones(tmp_path):
    torch.save({"model_config": {}, "model_state_dict": {}}, tmp_path / "foreign.pt")
    read_checkpoint(tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="--init_from"):
        read_own_checkpoint(tmp_path / "foreign.pt")


def test_save_checkpoint_on_a_failing_disk_leaves_the_older_one_and_no_rest(tmp_path, monkeypatch):
    path = save(tmp_path, fill=0.25)
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, fill=0.75)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert float(read_checkpoint(path)["model_state_dict"]["token_emb.weight"][0, 0]) == 0.25


def test_read_own_checkpoint_refuses_weights_that_are_not_finite(tmp_path):
    training = dict.fromkeys("family scalars state lanes totals mixes tracker dice torch_rng".split())
    for value, fits in ((1.0, True), (float("nan"), False)):
        training["tensors"] = {"y.weight": torch.tensor([0.0, value])}
        path = save_checkpoint(tmp_path, 0, 1, None, CONFIG, MinLM(CONFIG).state_dict(), training)
        if fits:
            read_own_checkpoint(path)
        else:
            with pytest.raises(CheckpointError, match="finite"):
                read_own_checkpoint(path)


def test_a_flipped_byte_never_shows_a_traceback(tmp_path):
    path = save(tmp_path)
    content = path.read_bytes()
    start, dice = content.index(b"model_config") - 60, random.Random(0)
    for _ in range(150):
        place = dice.randrange(start, start + 1500)  # the pickle of the structure, not the tensors' numbers
        path.write_bytes(content[:place] + bytes([dice.randrange(256)]) + content[place + 1 :])
        with contextlib.suppress(UserError):
            load_for_use(path, torch.device("cpu"))
