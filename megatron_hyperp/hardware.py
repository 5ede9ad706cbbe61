"""GPUs that runs are planned for and measured on, by NVIDIA's data sheets (SXM versions)."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU and how its like are connected.

    Attributes:
        name: of the product.
        tflops: peak dense bf16 TFLOP/s, without sparsity.
        memory: bytes that the driver reports.
        node_bytes_per_s: that one GPU sends to others of its node (NVLink, one direction).
        network_bytes_per_s: that it sends to other nodes (one 400 Gbit/s adapter per GPU, 200 for A100).
    """

    name: str
    tflops: float
    memory: int
    node_bytes_per_s: float
    network_bytes_per_s: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312.0, 80 * GIB, 300e9, 25e9),
        Gpu("H100", 989.0, 79 * GIB, 450e9, 50e9),
        Gpu("H200", 989.0, 140 * GIB, 450e9, 50e9),
        Gpu("B200", 2250.0, 179 * GIB, 900e9, 50e9),
    )
}
