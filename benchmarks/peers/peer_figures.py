"""What is measured on every peer's compressed model, in the same way as on autorank's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from efficiency_tasks import setting
from torch import nn

from autorank import measure
from autorank.evaluate import evaluate
from autorank.plan import apply
from autorank.recover import reestimate_batch_norm
from autorank.restore import BATCH_NORM_BATCH
from autorank.tasks import Task
from autorank.types import Plan

TEST_IMAGES = 2000
"""Test images for the figures without training."""


def recovered(task: Task, name: str, model: nn.Module) -> nn.Module:
    """Return the model with re-estimated batch-norm statistics, as a trial does it; without batch norm as it is."""
    images = setting(name, "none").recovery["calibration"]
    batches = task.train_batches(-(-images // BATCH_NORM_BATCH), BATCH_NORM_BATCH, 0)
    return reestimate_batch_norm(model, batches) or model


def difference(task: Task, a: nn.Module, b: nn.Module) -> float:
    """Return the largest difference of two models' outputs on validation images, over the largest output."""
    batch = next(iter(task.batches("validation", 64)))
    with torch.no_grad():
        left, right = a.eval()(*batch.inputs), b.eval()(*batch.inputs)
    return float((left - right).abs().max() / right.abs().max())


def figures(task: Task, name: str, dense: nn.Module, model: nn.Module, plan: Plan) -> dict[str, Any]:
    """Return measured MACs, accuracies before and after batch-norm re-estimation, and the plan with its difference.

    Parameters
    ----------
    task : Task
    name : str
        Of the task.
    dense, model : Module
        Before and after the peer.
    plan : Plan
        What autorank calls the same decomposition.
    """
    whole, _ = measure.count(dense, task.example_inputs)
    cost, _ = measure.count(model, task.example_inputs)
    ours, _ = apply(dense, plan)
    ours_cost, _ = measure.count(ours, task.example_inputs)
    after = recovered(task, name, model)
    return {
        "task": name,
        "macs": cost.macs,
        "macs_kept": cost.macs / whole.macs,
        "params_kept": cost.params / whole.params,
        "plan_macs_kept": ours_cost.macs / whole.macs,
        "plan_difference": difference(task, ours, model),
        "validation": {
            "dense": evaluate(dense, task, "validation").score,
            "before": evaluate(model, task, "validation").score,
            "after_batch_norm": evaluate(after, task, "validation").score,
        },
        "test": {
            "dense": evaluate(dense, task, "test", limit=TEST_IMAGES).score,
            "before": evaluate(model, task, "test", limit=TEST_IMAGES).score,
            "after_batch_norm": evaluate(after, task, "test", limit=TEST_IMAGES).score,
        },
        "ranks": {layer: list(choice.rank) for layer, choice in plan.layers},
        "plan": plan.to_json(),
    }


def write(row: dict[str, Any], path: Path) -> None:
    """Print the figures in one line and write them."""
    print(
        f"{row['peer']} asked {row['asked']}: MACs kept {row['macs_kept']:.4f} (plan {row['plan_macs_kept']:.4f}, "
        f"outputs differ by {row['plan_difference']:.1e}), validation {row['validation']['before']:.2f} / "
        f"{row['validation']['after_batch_norm']:.2f}, test {row['test']['before']:.2f} / "
        f"{row['test']['after_batch_norm']:.2f}, {row['seconds']:.0f} s",
        flush=True,
    )
    path.write_text(json.dumps(row, indent=1) + "\n")
