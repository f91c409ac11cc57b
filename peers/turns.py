"""vit.py or a peer, one epoch at a time: after each the process stops itself until it gets SIGCONT. For peers/ratios.py.

    KERAS_BACKEND=jax python peers/turns.py native-jax --dataset synthetic      # a backend or a peer, and the flags of vit.py

Two runs that take turns see the same minutes of a machine whose speed drifts. The pause is between two epochs, after the
training part has been timed, so that of vit.py's figures only `quality/epoch_end_s` contains it.

The environment has to name backend and device as well: Keras and JAX read it when they are imported, before the flags.
"""

import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import keras

import vit
from edgebench import process
from edgebench.cli import errors_in_one_line


class StopAfterEpoch(keras.callbacks.Callback):
    """Stops the process at the end of every epoch."""

    def on_epoch_end(self, epoch, logs=None):
        os.kill(os.getpid(), signal.SIGSTOP)


def main(name: str, flags: list[str]) -> None:
    """Run the backend or the peer of this name."""
    callbacks = [StopAfterEpoch()]
    if name == "native-jax":
        from peers import experiment
        from peers.native_jax import NativeJax

        experiment.main(NativeJax, flags, callbacks)
    elif name == "native-torch":
        from peers import experiment
        from peers.native_torch import NativeTorch

        experiment.main(NativeTorch, flags, callbacks)
    else:
        with errors_in_one_line("--debug" in flags):
            config = vit.read_config(flags)
        process.set_environment(config.device, config.compile_cache)
        vit.main(config, callbacks)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
