/**
 * Taking away what all tokens share before quantizing: "smooth K" of SageAttention (arXiv 2410.02367), "smooth Q" of
 * SageAttention2 (arXiv 2411.10958).
 */

/**
 * Mean of each channel over tokens `start` to `end`, float32.
 *
 * Elements that are not finite are left out. Any constant may be subtracted from the keys of a sequence without
 * changing the softmax, so this costs nothing in exactness, and a NaN in a masked-out key stays where it is.
 *
 * @param x `[length, dim]`
 * @param counted per token, 0: it is left out; default all count
 */
export function channelMean(
  x: Float32Array,
  dim: number,
  start = 0,
  end = x.length / dim,
  counted?: Uint8Array,
): Float32Array {
  const mean = new Float32Array(dim);
  for (let channel = 0; channel < dim; channel++) {
    let sum = 0;
    let terms = 0;
    for (let token = start; token < end; token++) {
      const value = x[token * dim + channel] as number;
      if (!Number.isFinite(value) || counted?.[token] === 0) continue;
      sum += value;
      terms++;
    }
    mean[channel] = terms === 0 ? 0 : sum / terms;
  }
  return mean;
}

/** `x - mean` in float32, for tokens `start` to `end`, as a new array of just those tokens. */
export function subtractMean(
  x: Float32Array,
  mean: Float32Array,
  start = 0,
  end = x.length / mean.length,
): Float32Array {
  const dim = mean.length;
  const result = new Float32Array(Math.max(0, end - start) * dim);
  for (let i = 0; i < result.length; i++) result[i] = (x[start * dim + i] as number) - (mean[i % dim] as number);
  return result;
}

/**
 * Means of each block of Q's tokens, `[blocks, dim]`: what `smoothQ` subtracts. Its share of the scores,
 * `mean(Q block) . (K - mean K)`, is added back to them (a rank-1 term).
 */
export function blockMeans(x: Float32Array, dim: number, blockSize: number): Float32Array {
  const length = x.length / dim;
  const means = new Float32Array(Math.ceil(length / blockSize) * dim);
  for (let start = 0; start < length; start += blockSize) {
    means.set(channelMean(x, dim, start, Math.min(start + blockSize, length)), (start / blockSize) * dim);
  }
  return means;
}

/**
 * `x` less the mean of its block, float32: what `smoothQ` quantizes. `means` are {@link blockMeans} of the same blocks.
 */
export function subtractBlockMeans(x: Float32Array, dim: number, blockSize: number, means: Float32Array): Float32Array {
  return x.map((value, i) => value - (means[Math.floor(i / dim / blockSize) * dim + (i % dim)] as number));
}
