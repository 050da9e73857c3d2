"""Tensor parallelism on one linear layer, y = x W^T, in two ways, with the bytes that each sends.

    python examples/tensor_parallel_linear.py                                        starts two processes
    torchrun --standalone --nproc-per-node 4 examples/tensor_parallel_linear.py      with four

*Column parallel*: each rank has some rows of W, computes those columns of y, and an **all-gather** makes y whole.
*Row parallel*: each rank has some columns of W and the same columns of x, computes a partial y, and an **all-reduce** adds them up.

A ring all-gather of N bytes sends (n - 1) / n · N from each rank, an all-reduce 2 (n - 1) / n · N: an all-reduce is a
reduce-scatter and an all-gather (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TOKENS, INPUTS, OUTPUTS = 8, 64, 96


class Ring:
    """All-gather and all-reduce by messages around a ring, so that every byte sent is seen and counted."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.sent_bytes = 0

    def shift(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sends `tensor` to the next rank and returns what the previous one sent."""
        received = torch.empty_like(tensor)
        work = dist.isend(tensor, (self.rank + 1) % self.size)
        dist.recv(received, (self.rank - 1) % self.size)
        work.wait()
        self.sent_bytes += tensor.nbytes
        return received

    def all_gather(self, shard: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's shard, in the order of the ranks."""
        shards = [shard] * self.size
        for step in range(1, self.size):
            shard = self.shift(shard)
            shards[(self.rank - step) % self.size] = shard
        return shards

    def reduce_scatter(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The sum over the ranks of `parts[rank]`, for this rank."""
        partial = parts[(self.rank - 1) % self.size]
        for step in range(2, self.size + 1):
            partial = self.shift(partial) + parts[(self.rank - step) % self.size]
        return partial

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks: a reduce-scatter, then an all-gather."""
        parts = [part.contiguous() for part in tensor.chunk(self.size, dim=-1)]
        return torch.cat(self.all_gather(self.reduce_scatter(parts)), dim=-1)


def column_parallel(ring: Ring, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y from this rank's rows of the weight."""
    own = weight.chunk(ring.size, dim=0)[ring.rank]
    return torch.cat(ring.all_gather(x @ own.t()), dim=-1)


def row_parallel(ring: Ring, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y from this rank's columns of the weight, and of x."""
    own = weight.chunk(ring.size, dim=1)[ring.rank]
    return ring.all_reduce(x.chunk(ring.size, dim=-1)[ring.rank] @ own.t())


def main() -> None:
    """One rank: computes y both ways, compares with the whole layer, and prints the bytes."""
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, INPUTS, generator=generator)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    whole = x @ weight.t()
    count = dist.get_world_size()
    if OUTPUTS % count or INPUTS % count:
        raise SystemExit(f"{count} processes: a divisor of {OUTPUTS} and {INPUTS} is needed")
    for name, layer, factor in (("column parallel, all-gather", column_parallel, 1), ("row parallel, all-reduce", row_parallel, 2)):
        ring = Ring()
        error = (layer(ring, x, weight) - whole).abs().max().item()
        expected = factor * (count - 1) * whole.nbytes // count
        if error > 1e-4 or ring.sent_bytes != expected:
            raise SystemExit(f"{name}: error {error}, {ring.sent_bytes} bytes where {expected} are right")
        if ring.rank == 0:
            formula = f"{'2 ' if factor == 2 else ''}(n - 1) / n x {whole.nbytes:,}"
            print(f"{name:28s} each of {count} ranks sent {ring.sent_bytes:,} bytes = {formula}; largest error {error:.1e}")
    dist.destroy_process_group()


def _spawned(rank: int, count: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    main()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free_port = probe.getsockname()[1]
        multiprocessing.start_processes(_spawned, (2, free_port), nprocs=2, start_method="spawn")
