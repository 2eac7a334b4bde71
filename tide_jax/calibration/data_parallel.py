"""Batches split over devices by rows, with the model on each of them, or on each group of them."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from tide_jax.errors import TideError
from tide_jax.model.sharding import DATA as AXIS
from tide_jax.model.sharding import MODEL, shard

T = TypeVar("T")


class Placement(NamedTuple):
    """Where a pass over batches runs: on JAX's default device, or on a mesh whose axis "data" splits rows."""

    mesh: Mesh | None = None

    @classmethod
    def of(cls, mesh: Mesh | None) -> Placement:
        """Checks a caller's mesh. Raises TideError without an axis "data"."""
        if mesh is None:
            return cls()
        if not isinstance(mesh, Mesh) or AXIS not in mesh.axis_names:
            found = f"axes {mesh.axis_names}" if isinstance(mesh, Mesh) else type(mesh).__name__
            raise TideError(
                f'mesh has {found}, expected a jax.sharding.Mesh with an axis "data": '
                'jax.make_mesh((number of devices,), ("data",))'
            )
        # jax.make_mesh's axes may be explicit, which asks for a sharding of every intermediate array.
        return cls(Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names)))

    @property
    def shards(self) -> int:
        """Parts that a batch is split into."""
        return 1 if self.mesh is None else self.mesh.shape[AXIS]

    @property
    def widths(self) -> int:
        """How many widths a padded batch may have. Each is a compilation, which costs a CPU little beside the padding
        it saves, and an accelerator more."""
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return 8 if platform == "cpu" else 4

    def replicated(self, tree: T) -> T:
        """A pytree on every device."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def model(self, model: T) -> T:
        """A model: split where the mesh has an axis "model" (see `tide_jax.shard`), otherwise on every device."""
        return self.replicated(model) if self.mesh is None or MODEL not in self.mesh.shape else shard(model, self.mesh)

    def split(self, array: np.ndarray) -> Array:
        """An array whose first axis is split over the devices."""
        if self.mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(AXIS)))
