import sys

import pytest

from ndp_gym import presets
from ndp_gym.cli import main
from ndp_gym.commands.list import LISTINGS, fitting
from tests.conftest import make_trace


def test_every_model_and_its_size_is_listed(capsys):
    assert main(["list", "models"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in presets.names("models"))
    assert "46.7" in shown
    assert "assumed" in shown


def test_every_system_is_listed_and_sources_on_request(capsys):
    assert main(["list", "systems"]) == 0
    brief = capsys.readouterr().out
    assert all(name in brief for name in presets.names("systems"))
    assert "in_place" in brief
    assert "fetch" in brief
    assert main(["list", "systems", "--sources"]) == 0
    shown = capsys.readouterr().out
    assert "seed_ndp: arXiv 2512.04476" in shown
    assert "mse_g128: clip-searched RTN" in shown


def test_policies_are_listed_from_the_checkout(capsys):
    assert main(["list", "policies"]) == 0
    assert "policies.lru:Lru" in capsys.readouterr().out


def test_without_the_policies_folder_the_listing_says_how_to_name_one(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "policies", None)
    monkeypatch.setattr("importlib.import_module", missing_policies)
    assert main(["list", "policies"]) == 0
    assert "module:attribute" in capsys.readouterr().out


def missing_policies(name: str) -> object:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_traces_can_be_listed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"not a trace")
    make_trace(n_conversations=3).save(tmp_path / "few.safetensors")  # for evaluation only
    assert main(["list", "traces"]) == 0
    shown = capsys.readouterr().out
    assert "train/val/test" in shown
    assert "other.safetensors" not in shown
    assert "0/0/4" in next(line for line in shown.splitlines() if "few.safetensors" in line)


def test_unknown_kind_is_one_sentence_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as error:
        main(["list", "planets"])
    assert error.value.code == 2
    assert "invalid choice: 'planets'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["models", "systems", "policies"])
@pytest.mark.parametrize("width", [80, 100])
def test_a_narrow_screen_shows_fewer_columns_and_whole_cells(capsys, monkeypatch, kind, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    listing = LISTINGS[kind](False)
    shown, left_out = fitting(listing, width)
    assert "".join(lines).count(f"Not shown at {width} columns: {', '.join(left_out)}"[:60]) == 1
    for row in listing.rows:
        cells = [row[index] for index in shown if index < len(listing.columns) - 1]
        assert any(all(cell in line for cell in cells) for line in lines)


def test_a_wide_screen_shows_every_column():
    for kind in ("models", "systems"):
        assert fitting(LISTINGS[kind](False), 180)[1] == []
