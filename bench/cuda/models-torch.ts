/**
 * Whole transformer blocks of public models at their real sizes with random weights, in PyTorch: they make the q, k and v that the kernels
 * are measured on, and PyTorch's attention is timed on the same.
 */
import { spawnSync } from 'node:child_process';
import { TORCH_TIMED } from './torch.ts';

/** As the model's public configuration has it. */
export interface ModelShape {
  readonly name: string;
  /** What the tokens are. */
  readonly tokensAre: string;
  readonly tokens: number;
  readonly layers: number;
  readonly hidden: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly ffn: number;
  readonly isCausal: boolean;
  /** Of q and k: over a head's channels, over all of a token's, or none. */
  readonly qkNorm: 'layer-head' | 'rms-head' | 'rms-all' | 'none';
  /** Rotary position: the channels of each axis of the grid, or of the one of a text. */
  readonly rope: { readonly channels: readonly number[]; readonly theta: number } | null;
  /** Frames, rows and columns of tokens; what is left are tokens of text without a position. */
  readonly grid: readonly number[];
  /** Norms that a vector of the time step scales and shifts. */
  readonly modulated: boolean;
}

export interface ModelActivations {
  readonly name: string;
  /** Files of bfloat16, `[1,heads,tokens,headDim]`, by operand. */
  readonly files: Readonly<Record<'q' | 'k' | 'v', string>>;
  readonly exact: readonly { readonly backend: string; readonly milliseconds: number }[];
  /** Of one block with cuDNN's or FlashAttention-2's attention. */
  readonly blockMilliseconds: number;
}

const PROGRAM = `
import json, os, statistics, sys, torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend
${TORCH_TIMED}
given = json.load(sys.stdin)
torch.manual_seed(given["seed"])
device, dtype = "cuda", torch.bfloat16

def linear(i, o, bias=True):
    layer = torch.nn.Linear(i, o, bias=bias, device=device, dtype=dtype)
    return layer.requires_grad_(False)

def rms(x):
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)

def angles(m):
    # [tokens, headDim / 2]: positions of each axis times the frequencies of its channels
    grid, tokens = m["grid"], m["tokens"]
    axes = torch.meshgrid(*[torch.arange(n, device=device, dtype=torch.float32) for n in grid], indexing="ij")
    parts = []
    for axis, channels in zip(axes, m["rope"]["channels"]):
        steps = torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels
        parts.append(axis.reshape(-1, 1) / m["rope"]["theta"] ** steps)
    positioned = torch.cat(parts, 1)
    return F.pad(positioned, (0, 0, 0, tokens - positioned.shape[0]))

def rotated(x, turn):
    # x [1, heads, tokens, headDim]
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = turn.cos(), turn.sin()
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2).to(dtype)

class Block:
    def __init__(self, m):
        h, d = m["hidden"], m["headDim"]
        self.m = m
        bias = m["modulated"]
        self.q, self.k = linear(h, m["heads"] * d, bias), linear(h, m["kvHeads"] * d, bias)
        self.v, self.o = linear(h, m["kvHeads"] * d, bias), linear(m["heads"] * d, h, bias)
        self.up, self.down = linear(h, m["ffn"], bias), linear(m["ffn"], h, bias)
        self.gate = None if bias else linear(h, m["ffn"], False)
        self.steps = [0.3 * torch.randn(h, device=device, dtype=dtype) for _ in range(4)] if bias else None

    def norm(self, x, which):
        if self.steps is None: return rms(x)
        scale, shift = self.steps[2 * which], self.steps[2 * which + 1]
        return F.layer_norm(x, (x.shape[-1],)) * (1 + scale) + shift

    def qkv(self, x):
        m = self.m
        y = self.norm(x, 0)
        q, k, v = self.q(y), self.k(y), self.v(y)
        if m["qkNorm"] == "rms-all": q, k = rms(q), rms(k)
        split = lambda t, n: t.unflatten(-1, (n, m["headDim"])).transpose(1, 2)
        q, k, v = split(q, m["heads"]), split(k, m["kvHeads"]), split(v, m["kvHeads"])
        if m["qkNorm"] == "layer-head": q, k = (F.layer_norm(t, (m["headDim"],)) for t in (q, k))
        if m["qkNorm"] == "rms-head": q, k = rms(q), rms(k)
        if m["rope"] is not None:
            turn = angles(m)
            q, k = rotated(q, turn), rotated(k, turn)
        return q.contiguous(), k.contiguous(), v.contiguous()

    def rest(self, x, attended):
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        y = self.norm(x, 1)
        inner = F.gelu(self.up(y), approximate="tanh") if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.down(inner)

def attend(m, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=m["isCausal"], enable_gqa=m["heads"] != m["kvHeads"])

results = []
with torch.inference_mode():
    for m in given["models"]:
        x = torch.randn(1, m["tokens"], m["hidden"], device=device, dtype=dtype)
        for depth in range(given["depth"]):
            block = Block(m)
            q, k, v = block.qkv(x)
            if depth + 1 < given["depth"]: x = block.rest(x, attend(m, q, k, v))
        files = {}
        for name, t in (("q", q), ("k", k), ("v", v)):
            files[name] = os.path.join(given["folder"], m["name"].replace(" ", "-") + "-" + name + ".bf16")
            t.view(torch.int16).cpu().numpy().tofile(files[name])
        exact = []
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            try:
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    call = lambda: attend(m, q, k, v)
                    for _ in range(2): call()
                    n = max(1, min(100, int(100 / timed(call, 1))))
                    exact.append({"backend": backend, "milliseconds": statistics.median(timed(call, n) for _ in range(5))})
            except Exception as error:
                print(m["name"], backend, error, file=sys.stderr)
        whole = lambda: block.rest(x, attend(m, *block.qkv(x)))
        whole()
        results.append({"name": m["name"], "files": files, "exact": exact,
                        "blockMilliseconds": statistics.median(timed(whole, 1) for _ in range(5))})
        del block, q, k, v, x
        torch.cuda.empty_cache()
json.dump({"torch": torch.__version__, "results": results}, sys.stdout)
`;

/**
 * @param depth blocks that the activations go through before the last one's q, k and v are taken
 * @throws {Error} there is no python3 with torch and numpy, or it failed
 */
export function modelActivations(
  models: readonly ModelShape[],
  folder: string,
  seed: number,
  depth = 2,
): { readonly torch: string; readonly results: readonly ModelActivations[] } {
  const { status, stdout, stderr } = spawnSync('python3', ['-c', PROGRAM], {
    input: JSON.stringify({ models, folder, seed, depth }),
    encoding: 'utf8',
    timeout: 400_000,
    maxBuffer: 2 ** 26,
  });
  if (stderr !== '') console.error(stderr);
  if (status !== 0) throw new Error(`the blocks could not be computed: python3 ended with ${status}`);
  return JSON.parse(stdout) as ReturnType<typeof modelActivations>;
}
