"""Tasks: a trained model, its data, its loss and the metric by which smaller copies of it are judged."""

from autorank.tasks.base import Task
from autorank.tasks.batch import Batch
from autorank.tasks.classification import ClassificationTask
from autorank.tasks.custom import CustomTask
from autorank.tasks.load import load_task

__all__ = ["Batch", "ClassificationTask", "CustomTask", "Task", "load_task"]
