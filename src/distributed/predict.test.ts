import { describe, expect, it } from 'vitest';
import { predict, type Rates, shapeOf } from './predict.ts';

const shape = (tokens: number, isCausal: boolean) => shapeOf({ tokens, heads: 32, headDim: 128, isCausal });
const rates: Rates = { attention: 900e12, memory: 4e12, link: 450e9, latency: 5e-6 };
const wire = { query: 2, keyValue: 1 };

describe('predict', () => {
  it('hides a ring behind its compute exactly where a shard is long enough', () => {
    // L / P >= (e / 2) (F / W) (Hkv / Hq): a step's copy takes no longer than its products.
    const bound = (wire.keyValue / 2) * (rates.attention / rates.link);
    const exposedOf = (shard: number) =>
      predict(shape(4 * shard, false), { ring: 4, ulysses: 1 }, { ...rates, latency: 0 }, wire).exposed;
    expect(exposedOf(2 * bound)).toBeCloseTo(0, 8);
    expect(exposedOf(bound / 4)).toBeGreaterThan(1e-5);
  });

  it('divides the work, and a causal zigzag takes half the time of a full one', () => {
    const one = predict(shape(65536, false), { ring: 1, ulysses: 1 }, rates, wire);
    const eight = predict(shape(65536, false), { ring: 8, ulysses: 1 }, rates, wire);
    expect(one.total).toBeCloseTo(one.compute, 9);
    expect(one.total / eight.total).toBeGreaterThan(7);
    expect(one.total / eight.total).toBeLessThanOrEqual(8);
    const causal = predict(shape(65536, true), { ring: 8, ulysses: 1 }, rates, wire);
    expect(causal.total / eight.total).toBeGreaterThan(0.45);
    expect(causal.total / eight.total).toBeLessThan(0.6);
  });

  it('waits for slow links', () => {
    const slow = { ...rates, link: 25e9 };
    for (const topology of [
      { ring: 8, ulysses: 1 },
      { ring: 1, ulysses: 8 },
    ]) {
      const [fast, waiting] = [rates, slow].map((each) => predict(shape(16384, false), topology, each, wire));
      expect(waiting?.total).toBeGreaterThan((fast?.total as number) * 1.5);
      expect(waiting?.compute).toBe(fast?.compute);
    }
  });
});
