"""Settings come from five places, the later one wins, and each value says where it is from."""

from pathlib import Path

import pytest

from mlx_kontext import RequestError, config


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user folder and a working folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "user_file", lambda: tmp_path / "user.toml")
    for name in config.DEFAULTS:
        monkeypatch.delenv(f"MLX_KONTEXT_{name.upper()}", raising=False)
    return tmp_path


def test_later_places_win(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.settings()["model"] == config.Setting("black-forest-labs/FLUX.1-Kontext-dev", "default")
    (places / "user.toml").write_text('model = "user"\ndtype = "float32"\n')
    assert config.settings()["model"] == config.Setting("user", str(places / "user.toml"))
    (places / "mlx-kontext.toml").write_text('model = "project"\n')
    assert config.settings()["model"].value == "project"
    monkeypatch.setenv("MLX_KONTEXT_MODEL", "demo")
    assert config.settings()["model"] == config.Setting("demo", "MLX_KONTEXT_MODEL")
    assert config.settings()["dtype"].value == "float32"


@pytest.mark.parametrize("text", ["model = 3\n", 'modle = "x"\n', "model = \n", "[model]\n", "\x00"])
def test_mistakes_are_told(places: Path, text: str) -> None:
    (places / "mlx-kontext.toml").write_text(text)
    with pytest.raises(RequestError, match=r"mlx-kontext\.toml"):
        config.settings()
