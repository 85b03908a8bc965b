"""torch's own ring attention (context parallelism) on the shapes of distributed.ts, for comparison.

    torchrun --nproc-per-node 2 bench/cuda/ring-torch.py OUTPUT.json [tokens,...]
"""
import json
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import _cp_options, set_rotate_method
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, DIM = 32, 128

dist.init_process_group("nccl")
rank, world = dist.get_rank(), dist.get_world_size()
torch.cuda.set_device(rank)
mesh = init_device_mesh("cuda", (world,), mesh_dim_names=("cp",))
rows = []


def timed(call, count):
    times = []
    for i in range(2 + count):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times[2:])


for tokens in [int(text) for text in (sys.argv[2] if len(sys.argv) > 2 else "16384,65536").split(",")]:
    for causal in (False, True):
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
            if backend == "FLASH_ATTENTION" and tokens > 100000:
                continue
            for rotate in ("allgather", "alltoall"):
                torch.manual_seed(0)
                size = (1, HEADS, tokens, DIM)
                q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
                row = {"tokens": tokens, "isCausal": causal, "backend": backend, "rotate": rotate, "ranks": world}
                try:
                    _cp_options.enable_load_balance = causal
                    set_rotate_method(rotate)
                    with torch.no_grad(), sdpa_kernel(getattr(SDPBackend, backend)):
                        buffers = [q, k, v]
                        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2], no_restore_buffers=set(buffers)):
                            call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
                            row["milliseconds"] = timed(call, 3 if tokens > 100000 else 7)
                except Exception as error:
                    row["error"] = str(error)[:300]
                rows.append(row)
                if rank == 0:
                    print(row, flush=True)
                    with open(sys.argv[1], "w") as file:
                        json.dump({"torch": torch.__version__, "heads": HEADS, "headDim": DIM, "rows": rows}, file, indent=2)
                del q, k, v
                torch.cuda.empty_cache()
dist.destroy_process_group()
