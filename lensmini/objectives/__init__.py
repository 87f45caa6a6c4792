"""Pure losses: tensors in, one value per sample out. They take callables and tensors, never modules or configs."""

from lensmini.objectives.flow_matching import flow_matching_loss
from lensmini.objectives.times import sample_times, training_mu

__all__ = ["flow_matching_loss", "sample_times", "training_mu"]
