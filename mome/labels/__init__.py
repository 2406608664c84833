"""The class table, the prompt resolver and the data sets' label numbers. Knows nothing of the model; no torch."""

from mome.labels.datasets import LabelMap, dataset_names, load_dataset
from mome.labels.resolve import Resolved
from mome.labels.table import Label, LabelTable, load_table

__all__ = ["Label", "LabelMap", "LabelTable", "Resolved", "dataset_names", "load_dataset", "load_table"]
