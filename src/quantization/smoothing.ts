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

/** Tokens are of one size where the largest of their magnitudes is no more than so many times the smallest but zero. */
export const ONE_SIZE = 16;
/** A token this much smaller than the geometric mean of all counts as one of that size: tokens next to zero do not take all. */
export const LEAST_SIZE = 1 / 2;

/**
 * What smoothing subtracts from K or V: the mean of each channel where tokens are of one size ({@link ONE_SIZE}; a token's size is its
 * largest magnitude). Where they are not, the mean would be as large as the large tokens, and small ones that some rows see alone would
 * lose their bits to it: a token then counts by the inverse square of its size. Any constant serves.
 *
 * The CUDA kernels do this; they take sizes from their sample, and the geometric mean from the tokens that a warp reads together. The
 * reference needs it not: its rows that see large tokens have a mean of their own (`rowClasses`).
 *
 * @param x `[length, dim]`
 * @param counted per token, 0: it is left out; default all count
 */
export function smoothingMean(x: Float32Array, dim: number, counted?: Uint8Array): Float32Array {
  const logarithms: number[] = [];
  for (let token = 0; token * dim < x.length; token++) {
    let size = 0;
    for (const value of x.subarray(token * dim, (token + 1) * dim)) {
      if (Number.isFinite(value)) size = Math.max(size, Math.abs(value));
    }
    logarithms.push(counted?.[token] === 0 ? Number.NEGATIVE_INFINITY : Math.log2(size));
  }
  const sized = logarithms.filter((logarithm) => logarithm > Number.NEGATIVE_INFINITY);
  const [smallest, largest] = sized.reduce(
    ([a, b], own) => [Math.min(a, own), Math.max(b, own)],
    [Infinity, -Infinity],
  );
  if (sized.length === 0 || largest - smallest <= Math.log2(ONE_SIZE))
    return channelMean(x, dim, 0, x.length / dim, counted);
  const least = sized.reduce((sum, own) => sum + own / sized.length, 0) + Math.log2(LEAST_SIZE);
  const weights = logarithms.map((own) => (own === Number.NEGATIVE_INFINITY ? 0 : 4 ** (least - Math.max(own, least))));
  const [sums, totals] = [new Float64Array(dim), new Float64Array(dim)];
  for (const [i, value] of x.entries()) {
    if (!Number.isFinite(value)) continue;
    const weight = weights[Math.floor(i / dim)] as number;
    sums[i % dim] = (sums[i % dim] as number) + value * weight;
    totals[i % dim] = (totals[i % dim] as number) + weight;
  }
  return Float32Array.from(sums, (sum, channel) => (totals[channel] === 0 ? 0 : sum / (totals[channel] as number)));
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
