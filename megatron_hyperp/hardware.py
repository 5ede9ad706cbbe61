"""GPUs that runs are planned for and measured on, by NVIDIA's data sheets (SXM versions)."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU and how its like are connected.

    Attributes:
        tflops: peak dense bf16 TFLOP/s, without sparsity.
        memory: bytes that the driver reports.
        node_bytes_per_s: that one GPU sends to others of its node (NVLink, one direction).
        network_bytes_per_s: that it sends to other nodes (one 400 Gbit/s adapter per GPU, 200 for A100).
    """

    tflops: float
    memory: int
    node_bytes_per_s: float
    network_bytes_per_s: float


GPUS = {
    "A100": Gpu(312.0, 80 * GIB, 300e9, 25e9),
    "H100": Gpu(989.0, 79 * GIB, 450e9, 50e9),
    "H200": Gpu(989.0, 140 * GIB, 450e9, 50e9),
    "B200": Gpu(2250.0, 179 * GIB, 900e9, 50e9),
}
