"""From the best weights of a run to a file for the device: build it, prove that it agrees with Keras, measure it."""
