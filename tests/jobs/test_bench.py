import json

import pytest
import torch

from jobs.cli import main


def test_attention_benchmark_ends_with_its_figures_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = torch.get_num_threads()
    sizes = {"row-tokens": 70, "tokens-per-image": 16, "num-heads": 2, "head-dim": 8}
    sizes |= {"repeats": 1, "threads": 1}
    try:
        arguments = [text for name, n in sizes.items() for text in (f"--{name}", str(n))]
        assert main(["bench", "attention", *arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.pop("benchmark") == "attention"
    assert figures.pop("threads") == 1
    assert figures.pop("torch") == torch.__version__
    assert figures.pop("machine")
    assert set(figures) == {
        f"{candidate}_{part}_ms"
        for candidate in (
            "per_image_explicit",
            "per_image_sdpa",
            "length_groups_sdpa",
            "padded_sdpa",
        )
        for part in ("forward", "backward")
    }
    assert all(milliseconds > 0 for milliseconds in figures.values())
