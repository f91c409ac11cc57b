"""Promises about the command line: it takes every spelling, and answers a mistake at once with one line."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from conftest import INSTALLED, ROOT, Run, finish
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit
from edgebench import cli


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--num-epochs", "5"], "num_epochs", 5),
        (["--num_epochs=5"], "num_epochs", 5),
        (["--batch_size=64.0"], "batch_size", 64),
        (["--batch-size", "1e2"], "batch_size", 100),
        (["--learning_rate=1e-05"], "learning_rate", 1e-5),
        (["--no-use-wandb"], "use_wandb", False),
        (["--no_use_wandb"], "use_wandb", False),
        (["--use_wandb=False"], "use_wandb", False),
        (["--use-wandb=false"], "use_wandb", False),
        (["--use-wandb", "False"], "use_wandb", False),
        (["--no-use-wandb", "--use_wandb=true"], "use_wandb", True),
        (["--mlp-head-units", "2048", "1024"], "mlp_head_units", [2048, 1024]),
        (["--mlp_head_units=[2048, 1024]"], "mlp_head_units", [2048, 1024]),
        (["--mlp-head-units", "[8.0]"], "mlp_head_units", [8]),
        (["--mlp_head_units=[]"], "mlp_head_units", []),
        (["--wandb-tags", '["a","b"]'], "wandb_tags", ["a", "b"]),
        (["--wandb_tags=['a', 'b']"], "wandb_tags", ["a", "b"]),
        (["--wandb-tags", "a", "b"], "wandb_tags", ["a", "b"]),
        (["--wandb_entity=None"], "wandb_entity", None),
        (["--wandb-run-name=--odd"], "wandb_run_name", "--odd"),
        (["--projection-dim", "32"], "transformer_units", [64, 32]),
        (["--image-size", "32", "--patch_size=5"], "num_patches", 36),
        (["--results-dir=~/results"], "results_dir", Path.home() / "results"),  # a shell leaves this one alone
        (["--dataset=~/a.npz"], "dataset", str(Path.home() / "a.npz")),
    ],
)
def test_spellings_of_people_and_of_sweeps_are_read(flags, field, value):
    assert getattr(cli.parse(vit.ViTConfig, flags), field) == value


def test_the_defaults_are_the_published_recipe():
    config = vit.ViTConfig()
    assert (config.image_size, config.patch_size, config.projection_dim, config.num_heads) == (72, 6, 64, 4)
    assert (config.transformer_layers, config.transformer_units, config.mlp_head_units) == (8, [128, 64], [2048, 1024])
    assert (config.learning_rate, config.weight_decay, config.batch_size, config.num_epochs) == (1e-3, 1e-4, 256, 10)
    assert (config.validation_split, config.dataset, config.use_wandb) == (0.1, "cifar100", True)
    assert (config.attention_dropout, config.gradient_accumulation_steps) == (0.1, 1)
    assert (config.keras_backend, config.wandb_project) == ("jax", "keras3_edge_baseline")
    assert str(config.checkpoint_path) == "/tmp/checkpoint.weights.h5" and config.num_patches == 144


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config.num-epochs 5", "did you mean --num-epochs?"),
        ("--num-epoch 5", "did you mean --num-epochs?"),
        ("surplus", "surplus"),
        ("--num-epochs", "--num-epochs"),
        ("--num-epochs many", "--num-epochs"),
        ("--num-epochs 2.5", "--num-epochs"),
        ("--use-wandb=maybe", "--use-wandb"),
        ("--mlp-head-units [4,", "--mlp-head-units"),
        ("--image-size 0", "--image-size must be positive"),
        ("--transformer-layers=-1", "--transformer-layers must be positive"),
        ("--mlp-head-units 8 0", "--mlp-head-units must be positive"),
        ("--transformer-units 64 32", "--transformer-units must end in --projection-dim 64"),
        ("--patch-size 73", "--patch-size 73 is larger than --image-size 72"),
        ("--learning-rate nan", "--learning-rate"),
        ("--weight-decay -1", "--weight-decay"),
        ("--validation-split 1", "--validation-split must lie in [0, 1)"),
        ("--validation-split=-0.1", "--validation-split must lie in [0, 1)"),
        ("--seed -1", "--seed"),
        ("--gradient-accumulation-steps 0", "--gradient-accumulation-steps must be positive"),
        ("--gradient-accumulation-steps 3", "--gradient-accumulation-steps 3 does not divide --batch-size 256"),
        ("--fit-batch", "unknown flag '--fit-batch'"),
        ("--dataset cifar1000", "--dataset must be cifar100"),
        ("--dataset missing.npz", "there is no such file"),
        ("--keras-backend theano", "must be one of jax, torch, tensorflow"),
        ("--batch-size 10000000000000000000000", "--batch-size must be below 2**31"),
        ("--mlp-head-units 8 1e22", "--mlp-head-units must be below 2**31"),
        (f"--node-name {'n' * 300}", "--node-name must have 1 to 64 characters"),
        (f"--results-dir {'n' * 300}", "cannot be written"),
        (f"--checkpoint-path {'n' * 250}.weights.h5", "--checkpoint-path"),
        (f"--dataset {'n' * 5000}.npz", "there is no such file"),
        ("--checkpoint-path model.h5", "must end in .weights.h5"),
        ("--checkpoint-path /proc/none/a.weights.h5", "cannot be written"),
    ],
)
def test_a_wrong_value_is_one_clear_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop, cli.errors_in_one_line():
        vit.require_places(vit.read_config(flags.split()))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and message in line
    assert not list(tmp_path.iterdir())


def test_help_and_mistakes_answer_within_a_second_without_a_backend(start_vit):
    """The best of up to ten, as the machine that tests may be busy."""
    runs = {}
    for flags in ("--help", "--num-epochs 0", "--config.num-epochs 5"):
        seconds = []
        while len(seconds) < 10 and not (seconds and min(seconds) < 1):
            began = time.perf_counter()
            environment = {"PYTHONPROFILEIMPORTTIME": "1", "COLUMNS": "100"}
            runs[flags] = finish(start_vit(*flags.split(), environment=environment))
            seconds.append(time.perf_counter() - began)
        assert min(seconds) < 1, seconds
        lines = runs[flags].stderr.splitlines()
        imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
        assert imported and not imported & {"keras", "numpy", "wandb", *vit.BACKENDS}
        assert runs[flags].status == (0 if flags == "--help" else 2)
    assert all(cli.flag(name) in runs["--help"].stdout for name in vit.ViTConfig.__dataclass_fields__)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_value_that_cannot_be_parsed_is_one_line_on_any_console(encoding, start_vit):
    run = finish(start_vit("--seed", "x", environment={"PYTHONIOENCODING": encoding}))
    assert (
        run.error_line.startswith("vit.py: error: Error parsing --seed: invalid literal")
        and "---" not in run.error_line
    )


def test_a_backend_that_is_not_installed_is_named_with_its_remedy(tmp_path):
    """A run where everything but JAX is installed: `-S` hides site-packages, and links bring the rest back."""
    site = tmp_path / "site"
    site.mkdir()
    for package in Path(tyro.__file__).parent.parent.iterdir():
        if not package.name.startswith("jax"):
            (site / package.name).symlink_to(package)
    (tmp_path / "jax").mkdir()  # a folder of that name is not the package
    env = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"} | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-S", str(ROOT / "vit.py"), "--no-use-wandb"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    line = Run(done.returncode, done.stdout, done.stderr).error_line
    assert "the backend jax is not installed: pip install" in line


def test_the_environment_wins_over_the_flag_with_a_warning(tmp_path, monkeypatch, capsys):
    """That the other backend then really runs: test_faults.py, where SIGINT ends a run."""
    monkeypatch.chdir(tmp_path)
    other = [name for name in INSTALLED if name != "jax"]
    if not other:
        pytest.skip("needs a second backend")
    flags = ["--no-use-wandb", "--checkpoint-path", "a.weights.h5"]
    monkeypatch.setenv("KERAS_BACKEND", other[0])
    assert vit.read_config(flags).keras_backend == other[0]
    assert capsys.readouterr().err == ""
    assert vit.read_config([*flags, "--keras-backend=jax"]).keras_backend == other[0]
    assert f"KERAS_BACKEND={other[0]} wins over --keras-backend jax" in capsys.readouterr().err
    monkeypatch.setenv("KERAS_BACKEND", "pytorch")
    with pytest.raises(cli.ExperimentError, match="KERAS_BACKEND must be one of .* not 'pytorch'"):
        vit.read_config(flags)
    monkeypatch.delenv("KERAS_BACKEND")
    assert vit.read_config([*flags, f"--keras-backend={other[0]}"]).keras_backend == other[0]


def test_dotenv_fills_what_neither_flag_nor_environment_gives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("WANDB_PROJECT=from-file\nWANDB_ENTITY=from-file\nKERAS_BACKEND=jax\n")
    for name in ("WANDB_PROJECT", "KERAS_BACKEND"):
        monkeypatch.setenv(name, "")  # so that monkeypatch removes after the test what the file has set
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ENTITY", "from-environment")
    flags = ["--checkpoint-path=a.weights.h5"]
    config = vit.read_config(flags)
    assert (config.wandb_project, config.wandb_entity) == ("from-file", "from-environment")
    assert vit.read_config([*flags, "--wandb-project=from-flag"]).wandb_project == "from-flag"


FLAGS = [cli.flag(name) for name in vit.ViTConfig.__dataclass_fields__ if name != "checkpoint_path"]
HOSTILE = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "[", "[1", "[[1]]", "{}", "None", "True", "-", "--", "-1", "1e999", "\0", "é\n"]),
    st.sampled_from(["[" * 300, "9" * 5000]),
)
ARGUMENT = st.one_of(
    HOSTILE,
    st.sampled_from(FLAGS),
    st.builds("{}={}".format, st.sampled_from(FLAGS), HOSTILE),
    st.builds("--{}".format, HOSTILE),
)


ALLOWED = [HealthCheck.function_scoped_fixture]


@settings(max_examples=200, deadline=None, suppress_health_check=ALLOWED, derandomize=True)
@given(st.lists(ARGUMENT, max_size=6))
def test_any_arguments_give_a_configuration_or_one_line(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    try:
        with cli.errors_in_one_line():
            config = vit.read_config([*argv, f"--checkpoint-path={tmp_path}/a.weights.h5"])
    except SystemExit as stop:
        captured = capsys.readouterr()
        if stop.code:
            lines = [line for line in captured.err.splitlines() if "warning" not in line]
            assert stop.code == 2 and len(lines) == 1 and lines[0].startswith("vit.py: error: ")
        else:
            assert "usage: vit.py" in captured.out or "--tyro" in " ".join(argv)
    else:
        assert isinstance(config, vit.ViTConfig)


def test_help_is_grouped_begins_with_examples_and_shows_no_empty_default(run_vit):
    run = run_vit("--help")
    boxes = re.findall(r"^.. (\S+) options ─", run.stdout, re.MULTILINE)
    assert boxes == ["model", "training", "device", "measuring", "data-and-files", "Weights-and-Biases"], run
    assert run.stdout.partition("--image-size")[0].count("python vit.py") >= 3
    assert "{None}" not in run.stdout and "(default: )" not in run.stdout
