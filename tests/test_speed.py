"""Promises about the fast paths: they train the same model and are recorded; where one fails, the run goes on."""

import re
import shutil

import keras
import numpy as np
import pytest
from conftest import INSTALLED, TINY, finish, only_results

import vit
from edgebench import layers, torch_graphs
from edgebench.measure import costs


@pytest.fixture
def results_of(run_vit, digits, tmp_path):
    """Run a command line on the digits, and give the run and its results."""

    def results_of(*flags: str) -> tuple:
        run = run_vit(*f"--no-use-wandb {TINY} --checkpoint-path a.weights.h5 --dataset {digits}".split(), *flags)
        assert run.status == 0, run
        results = only_results(tmp_path)
        shutil.rmtree(tmp_path / "results")
        return run, results

    return results_of


@pytest.mark.slow
@pytest.mark.xdist_group("torch")
@pytest.mark.skipif("torch" not in INSTALLED, reason="torch is not installed")
@pytest.mark.parametrize("augmentation", ["fused", "stock"])
def test_compiled_torch_trains_evaluates_and_is_recorded_as_compiled(augmentation, results_of):
    """Whole batches are compiled, the last, partial one runs eagerly: the model learns as in an eager run.

    Keras' own augmentation draws on the host, which no graph can hold: it runs before the graph.
    """
    flags = ["--keras-backend", "torch", "--num-epochs", "8", "--learning-rate", "0.003", "--measure-seconds", "1"]
    accuracy = {}
    for jit in ("on", "off"):
        run, results = results_of(*flags, "--jit", jit, "--augmentation", augmentation)
        assert results["what"]["jit_compile"] is (jit == "on") and results["what"]["jit_failure"] is None, run
        accuracy[jit] = results["quality"]["test"]["test_accuracy"]
    assert min(accuracy.values()) > 0.6 and accuracy["on"] == pytest.approx(accuracy["off"], abs=0.1)


@pytest.mark.skipif("torch" not in INSTALLED, reason="torch is not installed")
def test_torch_goes_on_eagerly_where_it_cannot_compile(start_vit, digits, tmp_path):
    """Without a C++ compiler, as in many containers: one line, and a note in the results."""
    flags = f"--no-use-wandb {TINY} --checkpoint-path a.weights.h5 --dataset {digits} --num-epochs 1".split()
    environment = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = finish(start_vit(*flags, "--keras-backend", "torch", "--jit", "on", environment=environment))
    assert run.status == 0, run
    assert len(re.findall("warning: torch could not compile the model and runs eagerly", run.stderr)) == 1, run
    what = only_results(tmp_path)["what"]
    assert what["jit_compile"] is False and what["jit_failure"]


@pytest.mark.parametrize("backend", [name for name in INSTALLED if name != "tensorflow"])
def test_number_format_and_attention_are_those_asked_for_and_are_recorded(backend, results_of):
    """In half precision, whose scaled loss has to be unscaled once for every step of two small batches."""
    flags = f"--keras-backend {backend} --num-epochs 1 --dtype-policy mixed_float16 --attention-dropout 0"
    _, results = results_of(*flags.split(), "--gradient-accumulation-steps", "2")
    what = results["what"]
    assert what["dtype_policy"] == "mixed_float16"
    # On a CPU JAX has no fused attention in float16.
    assert "dot_product_attention" in what["attention"] or backend == "jax"
    assert results["quality"]["epochs"][0]["loss"] < 3  # chance: 2.3; a loss that is scaled but not unscaled: thousands


def test_the_memory_estimate_counts_the_very_parameters_of_the_default_model():
    """16 bytes a parameter, whatever the batch, and 4 more for accumulated gradients."""
    size = costs.vit_size(vit.ViTConfig().as_json(), 3, 100)
    one, two = (size.train_memory_bytes(images) for images in (1, 2))
    assert (2 * one - two) / 16 == 21_759_012 and two > one
    assert size.train_memory_bytes(1, accumulates=True) - one == 4 * 21_759_012


def dropout_statistics() -> list[float]:
    """Of two calls: the share kept, the least and the most of a column, and how often neighbours agree."""
    x, layer = np.ones((64, 33, 50), "float32"), layers.Dropout(0.3)

    def drop(x):
        return layer(x, training=True)

    if keras.backend.backend() == "torch":  # as a compiled step traces it
        import torch

        x = keras.ops.convert_to_tensor(x)
        drop = torch.compile(torch_graphs.trace(drop, x))
    first, second = drop(x), drop(x)
    first, second = (np.array(keras.ops.convert_to_numpy(values)) for values in (first, second))
    assert set(np.unique(first)) == {np.float32(0), np.float32(1) / np.float32(0.7)}, np.unique(first)
    kept = first > 0
    shares = [kept.mean(), kept.mean((0, 1)).min(), kept.mean((0, 1)).max()]
    agreements = [(kept == (second > 0)), np.diff(kept.ravel().astype(int)) == 0, kept[1:] == kept[:-1]]
    return [*map(float, shares), *(float(agreement.mean()) for agreement in agreements)]


@pytest.mark.parametrize("backend", [name for name in INSTALLED if name != "tensorflow"])
def test_hashed_dropout_drops_its_share_evenly_and_anew_at_every_call(backend, call_on):
    """3.3 sigma of 105,600 draws is 0.005; of the 2,112 of a column, 0.033. Independent draws agree in 0.7² + 0.3²."""
    share, least, most, *agreements = call_on(backend, dropout_statistics).value
    assert share == pytest.approx(0.7, abs=0.005) and least > 0.66 and most < 0.74
    assert agreements == pytest.approx([0.58] * 3, abs=0.006)
