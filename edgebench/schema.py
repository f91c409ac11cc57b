"""The version of the results file. It stands apart because what reads results must not import Keras, as what writes them does."""

SCHEMA_VERSION = 3  # raised whenever a name or a meaning changes; results.schema.json describes it
