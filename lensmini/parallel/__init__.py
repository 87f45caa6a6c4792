"""Several processes that train one model: the only package that knows ``torch.distributed``.

Everyone else takes ``rank`` and ``world_size`` as numbers, and a :class:`Group` where tensors have to meet. Nothing here
knows the Lens model: :func:`shard_model` works on any module with a list of blocks.
"""

from lensmini.parallel.matrices import map_matrices
from lensmini.parallel.meshes import fill_parameters, full_tensor, make_mesh, parameter_copies
from lensmini.parallel.processes import Group, LostRankError, die_with_parent, run_processes
from lensmini.parallel.recompute import KEPT_OPERATIONS, recompute_blocks
from lensmini.parallel.sharded_checkpoints import Checkpointer, load_tensors, read_whole, stored_shapes
from lensmini.parallel.sharding import clip_gradients, last_microbatch, replicate_model, shard_model, state_bytes

__all__ = [
    "KEPT_OPERATIONS",
    "Checkpointer",
    "Group",
    "LostRankError",
    "clip_gradients",
    "die_with_parent",
    "fill_parameters",
    "full_tensor",
    "last_microbatch",
    "load_tensors",
    "make_mesh",
    "map_matrices",
    "parameter_copies",
    "read_whole",
    "recompute_blocks",
    "replicate_model",
    "run_processes",
    "shard_model",
    "state_bytes",
    "stored_shapes",
]
