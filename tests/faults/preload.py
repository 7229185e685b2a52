"""What a driver imports, for the process that drivers are forked from."""

import mlflow  # noqa: F401
import ray.tune  # noqa: F401

import autorank.cli
import autorank.driver
import autorank.mlflow_store
import autorank.orchestrate
import autorank.show
import autorank.sweep
import autorank.tracking  # noqa: F401
