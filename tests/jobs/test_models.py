import json
import resource

from jobs.cli import main
from jobs.models import describe_models, format_models
from vitok.variants import RELEASED


def test_every_released_model_is_listed_with_its_size_and_cost(capsys) -> None:
    assert main(["models"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(RELEASED) < set(rows)
    for name, row in rows.items():
        assert (row[-1] == "released") == (name in RELEASED), name
    assert rows["5B-f16x64"][1:6] == ["456M", "4.54B", "12", "256", "1024"]
    assert rows["linear-B/16x64"][1:3] == ["49.2K", "85.6M"]


def test_models_of_any_name_are_described_as_json(capsys) -> None:
    assert main(["models", "v1/S-L/16x16", "Bd2-B/32x64", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], first["compression_ratio"], first["released"]) == (
        "v1/S-L/16x16",
        48.0,
        False,
    )
    assert (second["tokens_256p"], second["tokens_512p"]) == (64, 256)
    # Matrix products alone: a little more than two operations for each parameter and token.
    parameters = second["encoder_parameters"] + second["decoder_parameters"]
    assert 1 < second["flops_256p"] / (2 * parameters * 64) < 1.1
    assert second["flops_512p"] > 4 * second["flops_256p"]


def test_a_name_that_is_none_is_refused(capsys) -> None:
    assert main(["models", "Xd4-B/16x64"]) == 1
    assert "there is no size X" in capsys.readouterr().err


def test_columns_stand_under_their_headings() -> None:
    header, *rows = format_models(describe_models(["B-B/8x4", "Td4-T/16x64"])).splitlines()
    end = header.index("decoder") + len("decoder")
    assert [row[:end].split()[-1] for row in rows] == ["85.1M", "4.54B"]


def test_a_model_of_billions_of_parameters_is_described_without_its_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (model,) = describe_models(["Td4-T/1x16x64"])
    assert model.decoder_parameters > 4e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak - before < 1e6, "in kilobytes; the weights would take 20 million"
