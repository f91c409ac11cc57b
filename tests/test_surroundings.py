"""Promises about what surrounds a run: settings from outside change nothing unseen, and no convenience is fatal."""

import json

import pytest
from conftest import INSTALLED, TINY, finish, only_results

RUN = [*TINY.split(), "--dataset", "synthetic", "--no-use-wandb", "--num-epochs", "1", "--checkpoint-path=a.weights.h5"]
IGNORED = {
    "KERAS_MAX_EPOCHS": "0",
    "KERAS_MAX_STEPS_PER_EPOCH": "1",
    "KERAS_NNX_ENABLED": "true",
    "KERAS_TORCH_DEVICE": "meta",
    "JAX_DISABLE_JIT": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "NVIDIA_TF32_OVERRIDE": "0",
}


def learned(folder) -> list[dict]:
    return only_results(folder)["quality"]["epochs"]


@pytest.mark.parametrize("backend", [name for name in INSTALLED if name != "tensorflow"])
def test_settings_from_outside_change_nothing_that_is_learned(backend, start_vit, run_vit, tmp_path):
    """They are named one by one. A variable for the backend stays and is in the results. A closed stdout, a cache that cannot
    be written and a variable with the line end of another system do no harm."""
    run_vit("--keras-backend", backend, *RUN, "--results-dir=results")
    expected = learned(tmp_path)
    (tmp_path / "results").rename(tmp_path / "expected")
    (tmp_path / "keras").mkdir()
    changed = {"floatx": "float16", "epsilon": 0.1, "image_data_format": "channels_first"}
    (tmp_path / "keras" / "keras.json").write_text(json.dumps(changed | {"nnx_enabled": True}))
    (tmp_path / "file").touch()
    (tmp_path / ".env").write_text("KMP_BLOCKTIME=200\n")
    odd = {"KERAS_BACKEND": f"{backend.title()}\r\n", "VIT_DEVICE": " CPU\r", "OMP_NUM_THREADS": "1"}
    if backend == "torch":  # JAX would compile everything anew
        odd |= {"XDG_CACHE_HOME": str(tmp_path / "file")}
    process = start_vit(*RUN, environment=IGNORED | odd, wrapper=("sh", "-c", 'exec "$@" >&-', "sh"))
    run = finish(process)
    assert run.status == 0, run.stderr
    assert learned(tmp_path) == expected
    warnings = [line for line in run.stderr.splitlines() if line.startswith("vit.py: warning: ")]
    for text in (*(f"{name}={value}" for name, value in IGNORED.items()), *changed):
        assert sum(text in line for line in warnings) == 1, (text, run.stderr)
    assert ("compiled code is not kept" in run.stderr) == (backend == "torch")
    environment = only_results(tmp_path)["what"]["environment"]
    assert environment["OMP_NUM_THREADS"] == "1" and environment["KMP_BLOCKTIME"] == "200"
    assert not IGNORED.keys() & environment.keys()


@pytest.mark.parametrize("settings", ['{"floatx": "bfloat16"}', '{"epsilon": 1}', "[1]"])
def test_a_keras_json_that_keras_refuses_is_one_line(settings, start_vit, tmp_path):
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras" / "keras.json").write_text(settings)
    assert "keras.json" in finish(start_vit(*RUN)).error_line


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("--num-heads 1000000000", 3, "GB in training"),
        ("--image-size 1000000000", 3, "GB in training"),
        pytest.param("--transformer-layers 400", 2, "lower --transformer-layers", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_nothing_can_hold_is_one_line(flags, status, message, run_vit):
    run = run_vit(*RUN, *flags.split())
    (line,) = [line for line in run.stderr.splitlines() if "Warning" not in line]
    assert run.status == status and line.startswith("vit.py: error: ") and message in line
