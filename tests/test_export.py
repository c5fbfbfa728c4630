"""export.py: out of a checkpoint, back into one, and averages; what generate.py and train.py make of them."""

import dataclasses
import json
import os
import sys

import pytest
import torch

import export
import generate
from mingru.minLM import MinLM, ModelConfig
from runtime.errors import UserError
from training import exported
from training.checkpoint import find_model_file, load_for_use, read_checkpoint, read_own_checkpoint, save_checkpoint
from training.exported import Model, read_model
from training.scoring import score
from training.soup import average

pytest.importorskip("safetensors")

CONFIG = ModelConfig(dim=16, depth=2, conv_kernel_size=3, dropout=0.1)


def fresh_weights(seed: int, config=CONFIG) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return MinLM(config).state_dict()


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with two elites."""
    folder = tmp_path / "run"
    folder.mkdir()
    for rank, link in enumerate(("elite_01.pt", "elite_02.pt")):
        path = save_checkpoint(folder, rank, 7 + rank, 1.25, CONFIG, fresh_weights(rank), {"secret": torch.zeros(9)})
        (folder / link).symlink_to(path.name)
    (folder / "best.pt").symlink_to(os.readlink(folder / "elite_01.pt"))
    return folder


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_bytes(b"some bytes\x1eto be predicted, " * 9)
    return path


def run(*arguments):
    export.main(["--cpu", *map(str, arguments)])


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert sorted(one) == sorted(other)  # a folder keeps no order
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape
        assert tensor.numpy().tobytes() == other[name].numpy().tobytes(), name


def test_export_and_back_is_bit_exact(run_dir, tmp_path, capsys):
    run("--model", run_dir, "--output", tmp_path / "new" / "folder")
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.name for path in files] == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in files}) == 1  # whoever may read the one may read the other
    with pytest.raises(UserError, match=r"got \S+: export\.py --model \S+ --output FILE\.pt makes a checkpoint"):
        find_model_file(tmp_path / "new" / "folder")
    run("--model", tmp_path / "new" / "folder", "--output", tmp_path / "back.pt")
    before, after = read_checkpoint(run_dir / "best.pt"), read_checkpoint(tmp_path / "back.pt")
    assert_same(before["model_state_dict"], after["model_state_dict"])
    assert all(before[key] == after[key] for key in ("format", "model_config", "step", "loss"))
    ids = torch.randint(256, (2, 40), dtype=torch.uint8)
    models = [load_for_use(path, torch.device("cpu"))[0] for path in (run_dir, tmp_path / "back.pt")]
    assert torch.equal(models[0](ids)[0], models[1](ids)[0])
    assert capsys.readouterr().out == ""


def test_export_holds_the_averaged_weights_and_nothing_of_training(run_dir, tmp_path):
    from safetensors.torch import load_file

    run("--model", run_dir / "elite_02.pt", "--output", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(weights, fresh_weights(1))
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content == {
        "format": "gruboros model 1", "model_config": CONFIG.to_dict(), "step": 8, "loss": 1.25,
        "document_delimiter": 0x1E,
    }  # fmt: skip


@pytest.mark.parametrize("delimiter", [0x0A, None])
def test_a_document_delimiter_travels_with_its_model(run_dir, tmp_path, held_out, capsys, delimiter):
    for rank in (0, 1):
        path = save_checkpoint(tmp_path, rank, 9, 1.0, CONFIG, fresh_weights(rank), {}, delimiter)
    run("--model", path, "--output", tmp_path / "folder")
    run("--model", tmp_path / "folder", "--output", tmp_path / "back.pt")
    run("--average", *tmp_path.glob("checkpoint_*.pt"), "--output", tmp_path / "soup.pt")
    for made in ("folder", "back.pt", "soup.pt"):
        assert read_model(tmp_path / made).document_delimiter == delimiter
    capsys.readouterr()
    run("--model", path, "--output", tmp_path / "again.pt", "--score", held_out)
    model, _ = load_for_use(path, torch.device("cpu"))
    bits = f"{score(model, held_out, delimiter):.4f} bits per byte"
    assert capsys.readouterr().out.splitlines() == [f"{bits}, {path}", f"{bits}, {tmp_path / 'again.pt'}"]
    assert bits != f"{score(model, held_out, 0x1E):.4f} bits per byte"
    with pytest.raises(UserError, match=r"expected models that end documents alike, got .*: leave one out"):
        run("--average", path, run_dir, "--output", tmp_path / "no.pt")


def test_imported_checkpoint_speaks_starts_training_and_is_not_resumed(run_dir, tmp_path, run_train, capfdbinary):
    run("--model", run_dir, "--output", tmp_path / "folder")
    run("--model", tmp_path / "folder", "--output", tmp_path / "back.pt")
    capfdbinary.readouterr()
    spoken = []
    for model in (run_dir, tmp_path / "back.pt"):
        generate.main(["--cpu", "--model", str(model), "--prompt", "x", "--max_length", "20", "--seed", "1"])
        spoken.append(capfdbinary.readouterr().out)
    assert spoken[0] == spoken[1] and len(spoken[0]) == 21
    with pytest.raises(UserError, match="--init_from"):
        read_own_checkpoint(tmp_path / "back.pt")
    shape = ["--dim", str(CONFIG.dim), "--depth", str(CONFIG.depth)]
    trained = run_train("tuned", "--init_from", str(tmp_path / "back.pt"), "--train_steps", "1", "--lr", "1e-9", *shape)
    after = load_for_use(trained, torch.device("cpu"))[0].state_dict()
    assert all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in fresh_weights(0).items())


def test_export_takes_weights_of_minGRU_pytorch(tmp_path):
    from minGRU_pytorch.minLM import minLM

    theirs = minLM(num_tokens=256, dim=16, depth=1).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    run("--model", tmp_path / "theirs.pt", "--output", tmp_path / "folder")
    model = read_model(tmp_path / "folder")
    assert model.step is None and model.loss is None
    run("--model", tmp_path / "folder", "--output", tmp_path / "ours.pt")
    ids = torch.randint(256, (1, 9))
    assert torch.allclose(load_for_use(tmp_path / "ours.pt", torch.device("cpu"))[0](ids)[0], theirs(ids), atol=1e-5)


def test_average_is_the_mean_of_every_weight():
    one, other = fresh_weights(0), fresh_weights(1)
    plain = dataclasses.replace(CONFIG, dropout=0.0)
    soup = average([Model(CONFIG, one, 3, 1.0, None), Model(plain, other, 5, 2.0, None)], ["one", "other"])
    assert (soup.config, soup.step, soup.loss) == (CONFIG, 5, None)
    for name, tensor in soup.weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, ((one[name].double() + other[name].double()) / 2).float())
    assert_same(average([Model(CONFIG, one, 3, 1.0, None)] * 3, ["one"] * 3).weights, one)


def test_export_average_is_scored_before_and_after(run_dir, tmp_path, held_out, capsys):
    elites = sorted(run_dir.glob("elite_*.pt"))
    run("--average", *elites, "--output", tmp_path / "soup.pt", "--score", held_out)
    lines = capsys.readouterr().out.splitlines()
    expected = []
    for path in [*elites, tmp_path / "soup.pt"]:
        model, _ = load_for_use(path, torch.device("cpu"))
        expected.append(f"{score(model, held_out, 0x1E):.4f} bits per byte, {path}")
    assert lines == expected and len({line.split()[0] for line in lines}) == 3


def test_export_averages_what_several_flags_name(run_dir, tmp_path):
    run("--average", run_dir / "elite_01.pt", "--average", run_dir / "elite_02.pt", "--output", tmp_path / "soup.pt")
    soup = read_model(tmp_path / "soup.pt").weights
    assert_same(soup, average([read_model(path) for path in run_dir.glob("elite_*.pt")], ["one", "other"]).weights)


def test_export_score_is_that_of_generate(run_dir, tmp_path, held_out, capsys):
    run("--model", run_dir, "--output", tmp_path / "out", "--score", held_out, "--document_delimiter", "none")
    lines = capsys.readouterr().out.splitlines()
    generate.main(["--cpu", "--model", str(run_dir), "--score", str(held_out), "--document_delimiter", "none"])
    said = capsys.readouterr().out.strip()
    assert lines == [f"{said}, {run_dir}", f"{said}, {tmp_path / 'out'}"]


def folder_of(tmp_path, run_dir):
    run("--model", run_dir, "--output", tmp_path / "folder")
    return tmp_path / "folder"


def change_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "No such file"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "as export.py writes it"),
    "config of another format": (lambda f: change_config(f, format="other"), "not of the format"),
    "config without model": (lambda f: change_config(f, model_config=3), "has no model_config"),
    "config of no model": (lambda f: change_config(f, model_config={"dim": "x", "depth": 1}), "expected for dim"),
    "delimiter no byte": (lambda f: change_config(f, document_delimiter=256), "has no byte as document_delimiter"),
    "another shape": (lambda f: change_config(f, model_config={**CONFIG.to_dict(), "dim": 8}), "of shape"),
    "another depth": (lambda f: change_config(f, model_config={**CONFIG.to_dict(), "depth": 3}), "got no layers.2"),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 5000), "as export.py writes it"),
    "weights of other bytes": (lambda f: (f / "model.safetensors").write_bytes(b"text" * 9), "as export.py writes it"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_export_refuses_a_damaged_folder_in_one_line(run_dir, tmp_path, kind):
    folder = folder_of(tmp_path, run_dir)
    damage, said = DAMAGE[kind]
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        run("--model", folder, "--output", tmp_path / "back.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "back.pt").exists()


def test_export_refuses_weights_that_are_not_finite(tmp_path):
    weights = fresh_weights(0)
    weights["norm.weight"][0] = float("nan")
    path = save_checkpoint(tmp_path, 0, 1, None, CONFIG, weights, {})
    with pytest.raises(UserError, match=r"expected finite weights, got others in norm\.weight"):
        run("--model", path, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "expected --model or --average, got both or neither"),
        (["--model", "run", "--average", "run"], "got both or neither"),
        (["--model", "absent"], "no such file"),
        (["--model", "held_out.txt"], "expected a whole checkpoint"),
        (["--model", "run", "--score", "absent"], "expected a readable file"),
        (["--model", "run", "--output", "held_out.txt"], "expected a new --output, got held_out.txt"),
        (["--model", "run", "--output", "held_out.txt/x"], "expected to write held_out.txt/x"),
        (["--average", "run/elite_01.pt", "run/best.pt"], "one file: leave one out"),
        (["--average", "run", "run/best.pt"], "got run and run/best.pt, one file: leave one out"),
        (["--average", "run/elite_01.pt", "other.pt"], "expected models of one shape"),
        (["--model", "run", "--document_delimiter", "xyz"], "expected a byte in hexadecimal"),
    ],
)
def test_export_refuses_in_one_line_and_writes_nothing(
    run_dir, tmp_path, held_out, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    other = dataclasses.replace(CONFIG, dim=8)
    save_checkpoint(tmp_path, 0, 1, None, other, fresh_weights(0, other), {}).rename("other.pt")
    before = sorted(os.listdir())
    monkeypatch.setattr(sys, "argv", ["export.py", "--output", "out", "--cpu", *arguments])
    with pytest.raises(SystemExit) as exit_:
        export.run_main(export.main)
    output = capsys.readouterr()
    assert exit_.value.code == 2 and output.out == "" and len(output.err.splitlines()) == 1 and said in output.err
    assert sorted(os.listdir()) == before


def test_export_on_a_failing_disk_leaves_nothing(run_dir, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exported, "_sync_file", fail)
    with pytest.raises(UserError, match="No space"):
        run("--model", run_dir, "--output", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_says_when_safetensors_is_missing(run_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"expected the package safetensors, got none: run pip install"):
        run("--model", run_dir, "--output", tmp_path / "out")
    run("--model", run_dir, "--output", tmp_path / "weights.pt")  # which needs none
