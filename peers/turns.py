"""vit.py or a peer, an epoch at a time: after each one the process stops itself, until it gets SIGCONT. For ratios.py.

    KERAS_BACKEND=jax python peers/turns.py native-jax --dataset synthetic      # a backend or a peer, and the flags of vit.py

Two runs that take turns see the same minutes of a machine whose speed drifts. The pause lies between two epochs, after the
training part has been timed, so that it is in none of vit.py's figures but `quality/epoch_end_s`.

The environment has to name backend and device as well: Keras and JAX read it when they are imported, before the flags.
"""

import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import vit


class StoppingEpochMeter(vit.EpochMeter):
    """vit.py's; what is left of the epoch, as writing the checkpoint, comes when the process goes on."""

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        os.kill(os.getpid(), signal.SIGSTOP)


vit.EpochMeter = StoppingEpochMeter  # before peers.experiment derives its own from it


def main(name: str, flags: list[str]) -> None:
    from peers import experiment

    if name == "native-jax":
        from peers.native_jax import NativeJax

        experiment.main(NativeJax, flags)
    elif name == "native-torch":
        from peers.native_torch import NativeTorch

        experiment.main(NativeTorch, flags)
    else:
        with vit._errors_in_one_line("--debug" in flags):
            config = vit._set_backend_from_env_or_cli(flags)
        vit.main(config)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
