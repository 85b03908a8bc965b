/** PyTorch's attention on the same shapes, in a child process: what the kernels are compared with. */
import { spawnSync } from 'node:child_process';
import type { Shape } from './inputs.ts';

export interface TorchTime extends Shape {
  /** `FLASH_ATTENTION` is FlashAttention-2, `CUDNN_ATTENTION` cuDNN's. */
  readonly backend: string;
  readonly milliseconds: number;
}

/** Python: milliseconds of a call, by events around n of them. */
export const TORCH_TIMED = `
def timed(call, n):
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    for _ in range(n): call()
    b.record(); b.synchronize()
    return a.elapsed_time(b) / n
`;

const PROGRAM = `
import json, sys, statistics, torch
from torch.nn.attention import sdpa_kernel, SDPBackend
${TORCH_TIMED}
shapes, backends = json.load(sys.stdin)
results = []
for s in shapes:
    size = (s["batch"], s["heads"], s["tokens"], s["headDim"])
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for name in backends:
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                call = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=s["isCausal"])
                for _ in range(3): call()
                once = timed(call, 1)
                n = max(1, min(200, int(40 / once)))
                timed(call, n)
                results.append({**s, "backend": name, "milliseconds": statistics.median(timed(call, n) for _ in range(5))})
        except Exception as error:
            print(name, s, error, file=sys.stderr)
json.dump({"torch": torch.__version__, "results": results}, sys.stdout)
`;

/** Undefined if there is no python3 with torch; its message is printed. */
export function torchTimes(
  shapes: readonly Shape[],
  backends: readonly string[] = ['FLASH_ATTENTION', 'CUDNN_ATTENTION'],
): { torch: string; results: TorchTime[] } | undefined {
  const { status, stdout, stderr } = spawnSync('python3', ['-c', PROGRAM], {
    input: JSON.stringify([shapes, backends]),
    encoding: 'utf8',
    timeout: 240_000,
    maxBuffer: 2 ** 26,
  });
  if (stderr !== '') console.error(stderr);
  if (status !== 0) {
    console.error(`torch could not be timed: python3 ended with ${status}`);
    return undefined;
  }
  return JSON.parse(stdout) as { torch: string; results: TorchTime[] };
}
