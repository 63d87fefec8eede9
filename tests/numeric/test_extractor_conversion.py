"""Converting the brain extractor: the networks that come out say what those that went in say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.extractor import FOLDER, Extractor
from models.training.extractor import NETWORKS, NOTICE, ConversionError, convert


class Small(torch.nn.Module):
    """A network with the ends of deepbet's: halved, doubled again, softmax over two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Conv3d(1, 8, 3, stride=2, padding=1)
        self.norm = torch.nn.InstanceNorm3d(8)
        self.up = torch.nn.ConvTranspose3d(8, 2, 2, stride=2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.up(torch.relu(self.norm(self.down(image)))), 1)


def unpacked(folder: Path) -> Path:
    torch.manual_seed(0)
    for name in [NOTICE, *(f"data/models/{network}.pt" for network in NETWORKS.values())]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name == NOTICE:
            (folder / name).write_text("a notice", encoding="utf-8")
        else:
            torch.jit.trace(Small().eval(), torch.rand(1, 1, 8, 8, 8)).save(folder / name)
    return folder


@pytest.mark.filterwarnings("ignore")  # of tracing, by which only this test makes TorchScript
def test_a_converted_extractor_agrees_with_its_source_and_loads(tmp_path: Path) -> None:
    source, made = unpacked(tmp_path / "source"), tmp_path / "made"
    assert max(convert(source, made).parity.values()) < 0.01
    Extractor(made)
    assert (made / "LICENSE").read_text(encoding="utf-8") == "a notice"


def test_a_source_that_lacks_a_file_of_the_known_release_is_not_converted(tmp_path: Path) -> None:
    (tmp_path / "wheel.whl").write_bytes(b"no archive")
    for source in (tmp_path, tmp_path / "wheel.whl"):
        with pytest.raises(ConversionError, match=r"does not hold"):
            convert(source, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_bundled_extractor_was_made_by_this_command() -> None:
    assert "lowgad convert" in (FOLDER / "card.toml").read_text(encoding="utf-8")
