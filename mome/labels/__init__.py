"""The class table, the resolver of prompts, and the label numbers of data sets. Imports neither torch nor the model."""

from mome.labels.dataset import LabelMap, dataset_names, load_dataset
from mome.labels.label import Label
from mome.labels.resolve import Resolved
from mome.labels.table import LabelTable, load_table

__all__ = ["Label", "LabelMap", "LabelTable", "Resolved", "dataset_names", "load_dataset", "load_table"]
