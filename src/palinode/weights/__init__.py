"""Points and directions: checkpoints, their differences, and weighted sums of them.

The method is `θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0)`. Here `θ_D` is a `Checkpoint` (a point), `θ_1 − θ_0`
a `Direction`, and the whole expression a `WeightedSum` (a point again) that stays a formula until
`save` writes it, one slice at a time.
"""

from palinode.weights.adapters import LoraAdapter
from palinode.weights.arithmetic import Rounding
from palinode.weights.atomic import check_output
from palinode.weights.checkpoint import Checkpoint, Direction, Point, Saved, WeightedSum, save
from palinode.weights.geometry import Dose, Profile, profile
from palinode.weights.tensors import TensorInfo
from palinode.weights.vectors import StoredVector, open_direction, save_vector

__all__ = [
    "Checkpoint", "Direction", "Dose", "LoraAdapter", "Point", "Profile", "Rounding", "Saved", "StoredVector",
    "TensorInfo", "WeightedSum", "check_output", "open_direction", "profile", "save", "save_vector",
]  # fmt: skip
