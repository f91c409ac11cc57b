"""Promises about the table of ratios: real pairs that take turns, the right ratios of them, and open where nothing was measured."""

import copy
import json

import pytest
from test_benchmark import BASE

import vit
from edgebench import cli
from edgebench.compare.items import PEERS
from peers import ratios

RATES = {  # images/s of three epochs, by row: of a, and of b
    "jax-stock": ((100, 90, 88), (50, 60, 40)),
    "jax-by-hand": ((100, 90, 100), (100, 100, None)),  # b has failed
}
IMAGES = 45_000


def write_pairs(out) -> None:
    for name, sides in RATES.items():
        folder = out / "cpu" / name / "01"
        for side, rates in zip("ab", sides, strict=True):
            (folder / side).mkdir(parents=True)
            if None in rates:
                continue
            document = copy.deepcopy(BASE)
            document["time"]["epoch_s"] = [999.0, 99.0, *(IMAGES / rate for rate in rates)]
            (folder / side / "run.json").write_text(json.dumps(document))
        turns = {side: [2 + IMAGES / rate for rate in rates if rate] for side, rates in zip("ab", sides, strict=True)}
        (folder / "turns.json").write_text(json.dumps(turns))


def rows_of(out) -> dict[str, list[str]]:
    lines = [line for line in ratios.build_table(out).splitlines() if line.startswith("|")]
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[1:-1]] for line in lines}


def test_a_ratio_is_the_median_of_the_pairs_with_its_quartiles(tmp_path):
    """Also: the first two epochs do not count, nor does a pair that one side has failed."""
    write_pairs(tmp_path)
    rows = rows_of(tmp_path)
    cells = rows["CPU: JAX: fused against stock augmentation, both compiled"]
    assert cells[2:] == ["2.00× (1.75–2.10)", "90.0 / 50.0", "2.0 / 2.0", "3 in 1 run"]
    assert rows["CPU: Keras on JAX against JAX by hand"][2] == ratios.NOT_RUN
    open_rows = [cells[2] for what, cells in rows.items() if what.startswith("GPU: ")]
    assert open_rows == [ratios.NOT_RUN] * (len(ratios.GPU.rows) + 1)
    assert rows["`python vit.py --help`"][2] == ratios.NOT_RUN


def test_every_side_is_one_that_the_programs_know():
    for suite in (ratios.CPU, ratios.GPU):
        assert len({row.name for row in suite.rows}) == len(suite.rows)
        for side in [side for row in suite.rows for side in (row.a, row.b)]:
            assert side.backend in (*cli.BACKENDS, *PEERS)
            cli.parse(vit.ViTConfig, side.flags.split())
    assert ratios.MEMORY_ROW in [row.name for row in ratios.GPU.rows]


@pytest.fixture
def images(tmp_path):
    ratios.write_images(tmp_path / "images.npz", 8, 2)
    flags = (
        f"--dataset {tmp_path}/images.npz --image-size 8 --patch-size 4 --projection-dim 8 --num-heads 2 --batch-size 8"
    )
    flags += " --transformer-layers 1 --mlp-head-units 16 --validation-split 0.33 --measure-seconds 0 --no-use-wandb"
    return flags.split()


@pytest.mark.slow
@pytest.mark.any_version
def test_a_run_of_either_kind_goes_on_by_an_epoch_in_its_turn(images, tmp_path):
    """Also: a side that fails says why, and nothing is left running."""
    row = ratios.Row("x", "x", "x", ratios.Side("jax"), ratios.Side("native-jax"))
    assert ratios.run_pair(row, "cpu", [*images, "--num-epochs", "4"], 2, tmp_path / "01") is None
    pair = ratios.read_pair(tmp_path / "01")
    for name in "ab":
        assert len(pair.train_s(name)) == len(pair.turns_s[name]) == 2
        assert all(0 < s < turn for s, turn in zip(pair.train_s(name), pair.turns_s[name], strict=True))
    assert (pair.a.backend, pair.b.backend, pair.images()) == ("jax", "native-jax", 16)

    row = ratios.Row("x", "x", "x", ratios.Side("native-jax", "--augmentation stock"), ratios.Side("jax"))
    why = ratios.run_pair(row, "cpu", [*images, "--num-epochs", "4"], 2, tmp_path / "02")
    assert why == (
        "native-jax --augmentation stock: vit.py: error: the hand-written peers have no --augmentation stock, only fused"
    )
    assert ratios.read_pair(tmp_path / "02") is None and not list(tmp_path.glob("02/*/best*"))
