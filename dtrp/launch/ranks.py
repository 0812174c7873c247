"""Which rank hosts which stage of which replica."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .join import join


class Ranks:
    """The ranks of a run, and the place of this process among them.

    Args:
        rows: the ranks by replica and stage, ``rows[replica][stage]``.
        rank: of this process.

    Attributes:
        all: every rank, replica by replica: the order of the chain of `dtrp.comm.collectives`.
        replica, stage: the place of this rank.
        num_replicas, num_stages: the numbers of rows and columns.
        replicas: the ranks that host this rank's stage.
        before, after: the ranks of the stages before and after; None at the ends.
    """

    def __init__(self, rows: tuple[tuple[int, ...], ...], rank: int) -> None:
        self.rows, self.rank = rows, rank
        self.all = [member for row in rows for member in row]
        self.num_replicas, self.num_stages = len(rows), len(rows[0])
        self.replica, self.stage = divmod(self.all.index(rank), self.num_stages)
        self.replicas = [row[self.stage] for row in rows]
        row, stage = rows[self.replica], self.stage
        self.before = row[stage - 1] if stage > 0 else None
        self.after = row[stage + 1] if stage + 1 < self.num_stages else None


def find_ranks(group: Any, mesh: Any, timeout_s: float) -> Ranks | None:
    """The ranks of ``group`` or ``mesh``, else of the default group; None: this process works alone.

    A process that torchrun has started joins the default group first.

    Args:
        group: a process group, or None.
        mesh: a `DeviceMesh` of (replicas, stages), or None.
        timeout_s: how long to wait for other ranks.

    Raises:
        TypeError, ValueError: no pipeline can be made of this group or mesh.
    """
    if group is not None and mesh is not None:
        raise ValueError("group= and mesh= both say which ranks take part; pass one of the two")
    if mesh is not None:
        return _ranks_of_mesh(mesh)
    if group is not None:
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not in the group; only ranks of the group make a Pipeline on it")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group is a {type(group).__name__}; pass a process group, as from torch.distributed.new_group"
            )
        return Ranks((tuple(dist.get_process_group_ranks(group)),), dist.get_rank())
    if not dist.is_available():
        return None
    join(timeout_s)
    if dist.is_initialized() and dist.get_world_size() > 1:
        return Ranks((tuple(range(dist.get_world_size())),), dist.get_rank())
    return None


def _ranks_of_mesh(mesh: Any) -> Ranks:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh is a {type(mesh).__name__}; pass init_device_mesh(device_type, (replicas, stages), "
            "mesh_dim_names=('replica', 'stage'))"
        )
    names = mesh.mesh_dim_names
    if mesh.ndim != 2 or names not in (None, ("replica", "stage")):
        raise ValueError(
            f"mesh has the dimensions {names or mesh.ndim}; it needs two, ('replica', 'stage'): "
            "init_device_mesh(device_type, (replicas, stages), mesh_dim_names=('replica', 'stage'))"
        )
    rows = tuple(tuple(int(rank) for rank in row) for row in mesh.mesh.tolist())
    if not any(dist.get_rank() in row for row in rows):
        raise ValueError(f"rank {dist.get_rank()} is not in the mesh; only ranks of the mesh make a Pipeline on it")
    return Ranks(rows, dist.get_rank())
