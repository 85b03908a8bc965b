/** Numbers as the page shows them. */

export const count = (value: number) => value.toLocaleString('en');

export const counted = (value: number, noun: string) => `${count(value)} ${noun}${value === 1 ? '' : 's'}`;

/** Three significant digits, without an exponent where that is readable. */
export function short(value: number): string {
  const magnitude = Math.abs(value);
  if (value === 0 || !Number.isFinite(value)) return String(value);
  return magnitude >= 1e-3 && magnitude < 1e5 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

export const percent = (value: number) => `${(100 * value).toPrecision(value < 0.1 ? 2 : 3)} %`;

export const cosine = (value: number) => (value > 0.99 ? value.toFixed(6) : value.toFixed(3));

export function duration(milliseconds: number): string {
  if (milliseconds >= 10_000) return `${(milliseconds / 1000).toFixed(1)} s`;
  return milliseconds >= 1000 ? `${(milliseconds / 1000).toFixed(2)} s` : `${Number(milliseconds.toPrecision(3))} ms`;
}

/** FLOP/s with the unit that fits. */
export function rate(flops: number): string {
  return flops >= 1e12 ? `${short(flops / 1e12)} TFLOP/s` : `${short(flops / 1e9)} GFLOP/s`;
}

export const bytes = (value: number) => `${Math.round(value / 1e6)} MB`;
