"""The README's code runs as it stands, in order, and does what it says."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def test_every_python_block_of_the_readme_runs_in_order(capsys):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block.replace("weft.Trainer(", "weft.Trainer(progress=False, "), "README.md", "exec"), names)  # noqa: S102, our own text
    shown = capsys.readouterr().out
    accuracy, r2 = (float(line) for line in shown.splitlines()[:2])
    assert accuracy > 0.9 and r2 < 1  # the boundary is a line; R2 after thirty updates is what it is
    x = torch.tensor([float(v) for v in re.search(r"tensor\(\[\[(.*?)\]\]\)", shown)[1].split(",")])
    assert (x - torch.tensor([1.0, 2.0]) / 5**0.5).abs().max() < 0.05  # the projection onto the unit circle


def test_the_two_commands_come_first_and_the_first_example_has_about_twenty_lines():
    text = README.read_text()
    assert text.index("make demo") < text.index("make test") < text.index("```python")
    first = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    assert len([line for line in first.splitlines() if line.strip()]) <= 22
