/** The training example, with few steps: exact attention and ours give the same losses. */
import { readFileSync } from 'node:fs';
import tf from '@tensorflow/tfjs';
import { expect, it } from 'vitest';
import { createTrainableAttention, type TfTrainableAttention } from '../../src/integrations/tfjs/index.ts';

it('a character model trains as with exact attention', async () => {
  const { train, picture, exactAttention } = (await import(
    new URL('../../examples/train/model.mjs', import.meta.url).href
  )) as {
    train(text: string, steps: number, attend: TfTrainableAttention): number[];
    picture(curves: Record<string, number[]>): string;
    exactAttention: TfTrainableAttention;
  };
  await tf.setBackend('cpu');
  const text = readFileSync(new URL('../../src/cli/alice-chapter-1.txt', import.meta.url), 'utf8');
  const attention = await createTrainableAttention();
  const exact = train(text, 3, exactAttention);
  const ours = train(text, 3, (q, k, v) => attention(q, k, v, { isCausal: true }));
  expect(exact[2]).toBeLessThan(exact[0] as number);
  ours.forEach((loss, step) => {
    expect(Math.abs(loss / (exact[step] as number) - 1)).toBeLessThan(0.01);
  });
  expect(picture({ exact, ours })).toMatch(/^<svg/);
}, 120_000);
