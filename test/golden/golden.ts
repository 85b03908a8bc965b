/**
 * The official kernels' results (SageAttention 2.2.0 on an H200): inputs, quantized tensors, scales, outputs, and an
 * exact result. Names: `q k v k_mean`, `<scheme>.{q_int8,q_scale,k_int8,k_scale}`, `v_fp8_<vmax>.{v_fp8,v_scale}`,
 * `out.<kernel>[.<gran>][.<accum>]`, `exact.{o,lse}`.
 */
import { readFileSync } from 'node:fs';
import { parseSafetensors, type SafetensorsEntry, safetensorsToFloat32 } from '../../src/tensor/safetensors.ts';
import { type Tensor, tensor } from '../../src/tensor/tensor.ts';

export const GOLDEN_NAMES = ['normal-d64-gqa', 'outlier-d64-causal', 'outlier-d128', 'outlier-d128-causal'] as const;
export type GoldenName = (typeof GOLDEN_NAMES)[number];

export interface Golden {
  readonly name: GoldenName;
  readonly isCausal: boolean;
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  /** Names of all `out.*` entries, without the prefix. */
  readonly outputs: readonly string[];
  entry(name: string): SafetensorsEntry;
  float32(name: string): Float32Array;
}

export function readGolden(name: GoldenName): Golden {
  const file = parseSafetensors(readFileSync(new URL(`${name}.safetensors`, import.meta.url)));
  const entry = (key: string) => {
    const found = file.tensors.get(key);
    if (found === undefined) throw new Error(`${name}.safetensors has no '${key}'`);
    return found;
  };
  const operand = (key: string) =>
    tensor(new Uint16Array(entry(key).bytes.buffer), entry(key).shape, { dtype: 'bfloat16' });
  return {
    name,
    isCausal: file.metadata.causal === '1',
    q: operand('q'),
    k: operand('k'),
    v: operand('v'),
    outputs: [...file.tensors.keys()].filter((key) => key.startsWith('out.')).map((key) => key.slice(4)),
    entry,
    float32: (key) => safetensorsToFloat32(entry(key)),
  };
}
