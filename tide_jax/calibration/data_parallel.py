"""Data parallelism: splits batches over devices by rows; each device, or group of devices, holds the model."""

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
    """Devices of a pass over batches: JAX's default device, or a mesh whose axis "data" splits rows."""

    mesh: Mesh | None = None

    @classmethod
    def for_mesh(cls, mesh: Mesh | None) -> Placement:
        """Checks the mesh. Raises TideError if it has no axis "data"."""
        if mesh is None:
            return cls()
        if not isinstance(mesh, Mesh) or AXIS not in mesh.axis_names:
            actual = f"axes {mesh.axis_names}" if isinstance(mesh, Mesh) else type(mesh).__name__
            raise TideError(
                f'mesh has {actual}, expected a jax.sharding.Mesh with an axis "data"; pass '
                'jax.make_mesh((number of devices,), ("data",))'
            )
        # jax.make_mesh may make explicit axes, which require a sharding for every intermediate array.
        return cls(Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names)))

    @property
    def shards(self) -> int:
        """Number of parts of a batch."""
        return 1 if self.mesh is None else self.mesh.shape[AXIS]

    @property
    def widths(self) -> int:
        """Number of widths that padded batches may have.

        Each is a compilation. On a CPU that costs little compared with the padding it saves, on an accelerator more.
        """
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        return 8 if platform == "cpu" else 4

    def replicate(self, tree: T) -> T:
        """Copies a pytree to every device."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def place_model(self, model: T) -> T:
        """Places a model: split if the mesh has an axis "model" (see `tide_jax.shard`), otherwise on every device."""
        return self.replicate(model) if self.mesh is None or MODEL not in self.mesh.shape else shard(model, self.mesh)

    def split_rows(self, array: np.ndarray) -> Array:
        """Splits the first axis of an array over the devices."""
        if self.mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(AXIS)))
