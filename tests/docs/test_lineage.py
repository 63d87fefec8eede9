"""The lineage of the bundled network is told once, in a data file; page, card and weights to start from agree with it.

`python -m tests.docs.test_lineage` writes the page anew.
"""

from __future__ import annotations

import torch

from models.card import ZOO, read_card
from models.training.export import SIMULATED
from tests.lineage import LINEAGE, ROOT, START, told

PAGE = ROOT / "models" / "LINEAGE.md"
HEAD = """# Where the weights of {network} come from

Written by `python -m tests.docs.test_lineage` from [training/start/lineage.toml](training/start/lineage.toml). The
newest stage comes first, and each started from the next. The weights themselves are in
[training/start/{weights}](training/start/{weights}). No single command makes them again: studies were
simulated beforehand, and some of them by earlier states of the simulator. What each stage was worth stands in the
[appendix of experiments](EXPERIMENTS.md).

"""


def page() -> str:
    rows = ["| stage | became | how | learned from | what was new |", "| --- | --- | --- | --- | --- |"]
    for number, stage in zip(range(len(LINEAGE["stages"]), 0, -1), LINEAGE["stages"], strict=True):
        became = f"`{stage['network']}`" if "network" in stage else ""
        rows.append(f"| {number} | {became} | {stage['how']} | {stage['data']} | {stage['note']} |")
    return HEAD.format(**LINEAGE) + "\n".join([*rows, ""])


def test_the_page_of_the_lineage_is_that_of_its_data_file() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_weights_to_start_from_say_of_themselves_what_the_data_file_says() -> None:
    saved = torch.load(START / LINEAGE["weights"], weights_only=True)
    assert f"{saved['step']} steps on: {saved['config']['data']}" == told()


def test_the_card_of_the_network_says_what_the_data_file_says() -> None:
    card = read_card(ZOO / LINEAGE["network"])
    assert f"{card.steps} steps on: {card.training_data}" == told().replace("simulated", SIMULATED, 1)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
