import contextlib
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from bench.injection import Injection
from gossip.state import Rule, Schema
from mingru.minLM import MinLM, MinLMState, ModelConfig
from runtime.errors import UserError
from training import checkpoint
from training.checkpoint import (
    CheckpointError,
    build_model,
    checkpoint_bytes,
    checkpoint_name,
    list_checkpoints,
    load_for_use,
    read_checkpoint,
    read_own_checkpoint,
    save_checkpoint,
)
from training.digest import is_sealed

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
    training = dict.fromkeys("family scalars state lanes totals mixes fitness genes dice torch_rng".split())
    for value, fits in ((1.0, True), (float("nan"), False)):
        training["tensors"] = {"y.weight": torch.tensor([0.0, value])}
        path = save_checkpoint(tmp_path, 0, 1, None, CONFIG, MinLM(CONFIG).state_dict(), training)
        if fits:
            read_own_checkpoint(path)
        else:
            with pytest.raises(CheckpointError, match="finite"):
                read_own_checkpoint(path)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


@pytest.mark.injects(Injection.FLIPPED_CHECKPOINT)
@pytest.mark.parametrize("reader", [read_checkpoint, load_for_use], ids=["to resume", "to use"])
def test_one_flipped_bit_is_found_wherever_it_is(tmp_path, reader):
    path = save(tmp_path)
    content, dice = path.read_bytes(), random.Random(0)
    tensors = content.index(torch.full((64,), 0.5).numpy().tobytes())
    comment = content.index(b"gruboros blake3 ")
    places = {
        "its digest does not match": [tensors, tensors + 4000, 100, comment - 3, len(content) - 1, comment + 20]
        + [dice.randrange(200, comment) for _ in range(40)],
        "got": [0, 3, comment - 2, comment - 1, comment, comment + 9],  # then it may not even seem to be ours
    }
    for message, flipped in places.items():
        for place in flipped:
            flip(path, place)
            with pytest.raises(CheckpointError, match=message):
                reader(path, *([torch.device("cpu")] if reader is load_for_use else []))
            path.write_bytes(content)
    read_checkpoint(path)


@pytest.mark.injects(Injection.TRUNCATED_CHECKPOINT)
def test_a_checkpoint_that_was_cut_anywhere_is_refused(tmp_path):
    path = save(tmp_path)
    content = path.read_bytes()
    comment = content.index(b"gruboros blake3 ")
    for length in (0, 1, 100, len(content) // 2, comment - 22, comment - 2, comment, comment + 40, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="got"):
            read_checkpoint(path)
    path.write_bytes(content[: len(content) // 2] + content[len(content) // 2 + 512 :])  # a hole, and the end is there
    with pytest.raises(CheckpointError, match="digest does not match"):
        read_checkpoint(path)


def test_a_checkpoint_of_ours_without_its_digest_is_refused(tmp_path):
    path = save(tmp_path)
    content = path.read_bytes()
    comment = content.index(b"gruboros blake3 ")
    path.write_bytes(content[: comment - 2] + b"\0\0")  # as torch.save leaves it
    assert torch.load(path, weights_only=True)["step"] == 1
    with pytest.raises(CheckpointError, match="digest, got"):
        read_checkpoint(path)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_sealed_checkpoint_is_a_plain_zip_file_for_everybody_else(tmp_path, mapped):
    path = save(tmp_path, fill=0.25)
    content = torch.load(path, weights_only=True, mmap=mapped)
    assert float(content["model_state_dict"]["token_emb.weight"][3, 3]) == 0.25
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None and len(file.comment) == 80
        digest = blake3(path.read_bytes()[: -len(file.comment) - 2]).hexdigest()
        assert file.comment == f"gruboros blake3 {digest}".encode()


@pytest.mark.injects(Injection.CHECKPOINT_DELETED)
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    path = save(tmp_path, fill=0.25)
    (tmp_path / "best.pt").symlink_to(path.name)

    def checked(file) -> bool:
        path.unlink()  # what another rank's tidying does
        return is_sealed(file)

    monkeypatch.setattr(checkpoint, "is_sealed", checked)
    content = read_checkpoint(tmp_path / "best.pt", mapped=False)
    assert bool((content["model_state_dict"]["token_emb.weight"] == 0.25).all())
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "best.pt")  # now a link that leads nowhere


def test_checkpoint_bytes_bound_what_is_written(run_train):
    for name, flags in (("tiny", ["--no_enable_conv"]), ("conv", ["--batch_size", "9", "--dim", "64", "--depth", "5"])):
        run_dir = run_train(name, "--train_steps", "2", "--val_every", "0", *flags)
        (file,) = list_checkpoints(run_dir)
        content = read_checkpoint(file.path)
        tensors = content["training"]["tensors"]
        schema = Schema.of(tensors, dict.fromkeys(tensors, Rule.WEIGHT), {})
        parameters = sum(tensor.numel() for tensor in content["model_state_dict"].values())
        bound = checkpoint_bytes(schema, parameters, MinLMState(**content["training"]["state"]))
        assert 0 <= bound - file.path.stat().st_size < 64 * 1024 + 1024 * len(tensors)


def test_a_flipped_byte_of_a_file_without_a_digest_never_shows_a_traceback(tmp_path):
    path = tmp_path / "foreign.pt"
    torch.save({"model_config": CONFIG.to_dict(), "model_state_dict": MinLM(CONFIG).state_dict(), "step": 1}, path)
    content = path.read_bytes()
    start, dice = content.index(b"model_config") - 60, random.Random(0)
    for _ in range(150):
        place = dice.randrange(start, start + 1000)  # the pickle of the structure, not the tensors' numbers
        path.write_bytes(content[:place] + bytes([dice.randrange(256)]) + content[place + 1 :])
        with contextlib.suppress(UserError):
            load_for_use(path, torch.device("cpu"))
