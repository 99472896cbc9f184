"""Targets for compiling without a GPU: XLA's description of one, in its protocol's text format."""

# Makers' data sheets: NVIDIA H100 SXM5 and H200; CUDA programming guide, compute capability 9.0.
COMMON = dict(
    threads_per_block_limit=1024, threads_per_warp=32, shared_memory_per_block=48 * 1024,
    shared_memory_per_core=228 * 1024, shared_memory_per_block_optin=227 * 1024,
    threads_per_core_limit=2048, core_count=132, fpus_per_core=128,
    block_dim_limit_x=2**31 - 1, block_dim_limit_y=65535, block_dim_limit_z=65535,
    thread_dim_limit_x=1024, thread_dim_limit_y=1024, thread_dim_limit_z=64,
    l2_cache_size=50 * 2**20, registers_per_core_limit=65536, registers_per_block_limit=65536,
    clock_rate_ghz=1.98,
)  # fmt: skip
GPUS = {
    "h100": dict(memory_bandwidth=3_350_000_000_000, device_memory_size=80 * 10**9),
    "h200": dict(memory_bandwidth=4_800_000_000_000, device_memory_size=141 * 10**9),
}


def target_config(name: str, cudnn: tuple[int, int, int] = (9, 10, 0)) -> str:
    """The text for `jax.experimental.topologies.get_topology_desc(target_config=...)`.

    >>> "core_count: 132" in target_config("h200")
    True
    """
    info = [f"  {key}: {value}" for key, value in (COMMON | GPUS[name]).items()]
    version = " ".join(
        f"{part}: {n}" for part, n in zip(("major", "minor", "patch"), cudnn, strict=True)
    )
    return "\n".join(
        [
            "gpu_device_info {",
            *info,
            "  cuda_compute_capability { major: 9 minor: 0 }",
            '  device_vendor: "NVIDIA Corporation"',
            "  device_address_bits: 64",
            f'  name: "NVIDIA {name.upper()}"',
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {version} }}",
            f'device_description_str: "NVIDIA {name.upper()}"',
        ]
    )
